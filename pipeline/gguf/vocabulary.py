"""A tokenizer as a GGUF file's metadata has it, in the words of tokenizer.json.

Two kinds: byte-level pairs with their merges and a way to split text into words, and SentencePiece,
whose merges follow from the scores of the pieces.

Source: llama.cpp's `llama-vocab.cpp`; transformers, `convert_slow_tokenizer.py`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pipeline.gguf.header import ARCHITECTURE_KEY, CorruptGguf, Metadata

Fields = dict[str, Any]

_PREFIX = "tokenizer.ggml."
TOKENS = _PREFIX + "tokens"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
MAX_PIECE = 512  # longer ones are no words: looking for their halves would take for ever
SPACE = "\u2581"  # how SentencePiece writes a space

_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_AND_SLASHES = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_CL100K = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_TEKKEN = "|".join((*_WORDS, r"\p{N}", _REST_AND_SLASHES))
_O200K = "|".join((*(f"{each}{_ENDINGS}?" for each in _WORDS), r"\p{N}{1,3}", _REST_AND_SLASHES))
_GPT2, _DIGITS = "", "digits"
# How text is split before pairs are merged, by the name that a file gives it.
PRE_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2),
        **dict.fromkeys(
            ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS
        ),
        **dict.fromkeys(
            ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"), _CL100K
        ),
        **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _QWEN2),
        "tekken": _TEKKEN,
        **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    }
)
# Of these, a word that is a token is one, whatever its merges would give.
_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
# Of these, a text starts with the token that begins texts, where the file does not say.
_BEGIN = _WORDS_FIRST - {"falcon3"}
_COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})
# No file says that Phi 3's special tokens take the spaces behind them along, all but these.
_KEEPING_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def tokenizer_fields(metadata: Metadata) -> Fields:
    """tokenizer.json. Raises CorruptGguf."""
    kind = metadata.text(f"{_PREFIX}model")
    tokens, types = _tokens(metadata)
    pre = metadata.text(f"{_PREFIX}pre") or "default"
    if kind == "gpt2":
        parts = _byte_pairs(metadata, tokens, pre)
    elif kind == "llama":
        parts = _sentence_pieces(metadata, tokens, types)
    else:
        raise CorruptGguf(f"its tokenizer is {str(kind)[:40]!r}: gpt2 and llama are read")
    begins_by_default = kind == "llama" or pre in _BEGIN
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, **each} for index, each in _added(metadata, tokens, types).items()
        ],
        **parts["around"],
        "post_processor": _ends_of_text(metadata, tokens, begins_by_default=begins_by_default),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def tokenizer_config_fields(metadata: Metadata) -> Fields:
    """tokenizer_config.json: the template, and which tokens are special. Raises CorruptGguf."""
    tokens, types = _tokens(metadata)
    fields: Fields = {
        "added_tokens_decoder": {
            str(index): each for index, each in _added(metadata, tokens, types).items()
        },
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = _token_id(metadata, f"{key}_token_id", tokens)
        if index is not None:
            fields[f"{name}_token"] = tokens[index]
    template = metadata.text("tokenizer.chat_template")
    return fields if template is None else fields | {"chat_template": template}


def _tokens(metadata: Metadata) -> tuple[list[str], list[int]]:
    """Every token's text and type."""
    tokens = metadata.texts(TOKENS)
    if not tokens:
        raise CorruptGguf("its tokenizer has no tokens")
    if len(set(tokens)) != len(tokens):
        raise CorruptGguf("its tokenizer has two tokens of the same text")
    types = metadata.numbers(f"{_PREFIX}token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CorruptGguf(f"its tokenizer has {len(tokens)} tokens, and types of {len(types)}")
    return tokens, types


def _added(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> dict[int, Fields]:
    """Those that are found in a text as they are, before anything else."""
    has_pieces = metadata.text(f"{_PREFIX}model") == "llama"
    takes_spaces = has_pieces and metadata.text(ARCHITECTURE_KEY) == "phi3"
    return {
        index: {
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": takes_spaces and kind == CONTROL and tokens[index] not in _KEEPING_SPACES,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in {CONTROL, USER_DEFINED}
    }


def _token_id(metadata: Metadata, key: str, tokens: Sequence[str]) -> int | None:
    index = metadata.size(_PREFIX + key)
    if index is not None and index >= len(tokens):
        raise CorruptGguf(f"its {_PREFIX}{key} is {index}, and it has {len(tokens)} tokens")
    return index


def _byte_pairs(metadata: Metadata, tokens: Sequence[str], pre: str) -> Fields:
    merges = metadata.texts(f"{_PREFIX}merges")
    if merges is None:
        raise CorruptGguf(f"its {_PREFIX}merges are missing")
    if pre not in PRE_TOKENIZERS:
        raise CorruptGguf(
            f"its tokenizer splits text as {pre[:40]!r}: {', '.join(PRE_TOKENIZERS)} are read"
        )
    split = PRE_TOKENIZERS[pre]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split in {_GPT2, _DIGITS},
    }
    steps: list[Fields] = [byte_level]
    if split == _DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    elif split:
        isolated = {"behavior": "Isolated", "invert": False}
        steps = [{"type": "Split", "pattern": {"Regex": split}, **isolated}, byte_level]
    return {
        "around": {
            "normalizer": {"type": "NFC"} if pre in _COMPOSED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        },
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": _model(
            tokens, [_pair(merge) for merge in merges], words_first=pre in _WORDS_FIRST
        ),
    }


def _pair(merge: str) -> list[str]:
    left, space, right = merge.partition(" ")
    if not space:
        raise CorruptGguf(f"its tokenizer has the merge {merge[:40]!r}, which is no pair")
    return [left, right]


def _sentence_pieces(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> Fields:
    scores = metadata.numbers(f"{_PREFIX}scores")
    if scores is None or len(scores) != len(tokens):
        raise CorruptGguf(f"its {_PREFIX}scores are missing, or not those of its tokens")
    has_prefix = metadata.flag(f"{_PREFIX}add_space_prefix") is not False
    unknown = _token_id(metadata, "unknown_token_id", tokens)
    if unknown is None and UNKNOWN in types:
        unknown = types.index(UNKNOWN)
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == NORMAL
    }
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    unspaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "around": {
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaced]},
            "pre_tokenizer": None,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [unspaced, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _model(
            tokens,
            _merges(pieces),
            unknown=None if unknown is None else tokens[unknown],
            has_bytes=True,
        ),
    }


def _merges(pieces: Mapping[str, float]) -> list[list[str]]:
    """All pairs that are a piece together, in the order in which they are merged."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    found = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece) if len(piece) <= MAX_PIECE else 0):
            left = ranks.get(piece[:cut])
            right = None if left is None else ranks.get(piece[cut:])
            if right is not None:
                found.append((-score, left, right, piece, cut))
    return [[piece[:cut], piece[cut:]] for *_, piece, cut in sorted(found)]


def _model(
    tokens: Sequence[str],
    merges: list[list[str]],
    *,
    unknown: str | None = None,
    has_bytes: bool = False,
    words_first: bool = False,
) -> Fields:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": has_bytes,
        "byte_fallback": has_bytes,
        "ignore_merges": words_first,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }


def _ends_of_text(
    metadata: Metadata, tokens: Sequence[str], *, begins_by_default: bool
) -> Fields | None:
    """What is put around every text."""
    has_begin = metadata.flag(f"{_PREFIX}add_bos_token")
    begin = end = None
    if has_begin or (has_begin is None and begins_by_default):
        begin = _token_id(metadata, "bos_token_id", tokens)
    if metadata.flag(f"{_PREFIX}add_eos_token"):
        end = _token_id(metadata, "eos_token_id", tokens)
    if begin is None and end is None:
        return None

    def special(index: int | None) -> list[Fields]:
        return [] if index is None else [{"SpecialToken": {"id": tokens[index], "type_id": 0}}]

    text: Fields = {"Sequence": {"id": "A", "type_id": 0}}
    pair: Fields = {"Sequence": {"id": "B", "type_id": 1}}
    around = {index for index in (begin, end) if index is not None}
    return {
        "type": "TemplateProcessing",
        "single": [*special(begin), text, *special(end)],
        "pair": [*special(begin), text, *special(end), pair],
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}
            for index in sorted(around)
        },
    }
