"""The text of tokens as they come, with a small tokenizer of every kind that models have."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from pipeline.engine.text_stream import TextStream
from pipeline.engine.tokenizer import Tokenizer

WORDS = [
    "a",
    "b",
    "the",
    "cat",
    "\u2581",
    "\u2581the",
    "\u2581cat",
    "\u2581\u2581",
    "é",
    "한",
    ".",
    ",",
    "'",
    "s",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LAMA = (decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse())


def numbered(tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def finished(model, decoder, special=("<s>", "<|end|>"), added=("<tool>", "é!", "  ")):
    tokenizer = HfTokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in added])
    return tokenizer


def byte_level(decoder=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = numbered([*alphabet, "Ġthe", "Ġcat", "íķľ", "íķ", "ł", "Ġ한"])
    # An added token with characters of the alphabet that mean other bytes there is the library's
    # own muddle.
    tokenizer = finished(
        models.BPE(vocab, []), decoder or decoders.ByteLevel(), added=("<tool>", "  ")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_fallback(*decoder):
    vocab = numbered(["<unk>", *BYTES, *WORDS])
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return finished(model, decoders.Sequence(list(decoder)))


def unigram(*decoder):
    pieces = [(token, -1.0) for token in numbered(["<unk>", *BYTES, *WORDS])]
    return finished(models.Unigram(pieces, 0, byte_fallback=True), decoders.Sequence(list(decoder)))


def word_piece():
    pieces = [
        "[UNK]",
        "a",
        "the",
        "cat",
        "##s",
        "##é",
        "##한",
        ".",
        ",",
        "'",
        "do",
        "not",
        "n",
        "##t",
    ]
    return finished(models.WordPiece(numbered(pieces), unk_token="[UNK]"), decoders.WordPiece())


def end_of_word():
    vocab = numbered(["a", "b", "the</w>", "cat</w>", "é", "한</w>", "."])
    return finished(models.BPE(vocab, [], end_of_word_suffix="</w>"), decoders.BPEDecoder())


def speech():
    vocab = numbered(["<pad>", "|", "a", "b", "c", "é"])
    return finished(models.WordLevel(vocab, unk_token="a"), decoders.CTC())


KINDS = {
    "byte-level": byte_level,
    "byte-level-stripped": lambda: byte_level(
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ),
    "llama-2": lambda: byte_fallback(*LAMA, decoders.Strip(" ", 1, 0)),
    "gemma": lambda: byte_fallback(*LAMA),
    "two-spaces": lambda: byte_fallback(*LAMA, decoders.Strip(" ", 2, 0)),
    "unigram": lambda: unigram(decoders.ByteFallback(), decoders.Metaspace()),
    "unigram-metaspace-first": lambda: unigram(decoders.Metaspace(), decoders.ByteFallback()),
    "unigram-no-prefix": lambda: unigram(
        decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")
    ),
    "word-piece": word_piece,
    "end-of-word": end_of_word,
    "speech": speech,
    "none": lambda: finished(models.WordLevel(numbered(WORDS), unk_token="a"), None),
}

CHARS = "é한ไ🦙\u200d語 a"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Every kind of tokenizer: the library's, and ours."""
    directory = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, build in KINDS.items():
        path = directory / f"{name}.json"
        build().save(str(path))
        found[name] = Tokenizer(path)
    return found


def spelled(library, char):
    """The ids of a character's bytes, where the vocabulary has bytes."""
    ids = [library.token_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
    if None in ids:
        encoded = library.encode(char, add_special_tokens=False).ids
        return encoded if library.decode(encoded) == char else []
    return ids


def stream_of(tokenizer, prompt, ids):
    stream = TextStream(tokenizer, prompt)
    return [stream.push(token_id) for token_id in ids], stream.finish()


PIECES = st.lists(st.one_of(st.sampled_from(CHARS), st.integers(0, 400)), max_size=12)


def ids_of(library, pieces):
    size = library.get_vocab_size()
    found = []
    for piece in pieces:
        found += spelled(library, piece) if isinstance(piece, str) else [piece % size]
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=PIECES, generated=PIECES)
@example(prompt=[], generated=list("한국어로 대답합니다. ภาษาไทย 🦙"))
@example(prompt=["a"], generated=list("한한 한"))
@example(prompt=list("a" * 30), generated=[3, 4, *"한한"])
def test_what_is_streamed_is_the_growth_of_the_decoded_text(kinds, kind, prompt, generated):
    tokenizer = kinds[kind]
    library = tokenizer._tokenizer
    prompt, generated = ids_of(library, prompt), ids_of(library, generated)
    before, whole = library.decode(prompt), library.decode(prompt + generated)
    pieces, rest = stream_of(tokenizer, prompt, generated)
    if "\ufffd" in before + whole:  # the library gives up a run of bytes whole
        return
    assert whole.startswith(before)
    assert "".join(pieces) + rest == whole[len(before) :]
    assert rest == ""


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-stripped"])
@given(prompt=PIECES, generated=PIECES)
def test_bytes_that_are_no_text_come_out_as_the_library_has_them(kinds, kind, prompt, generated):
    tokenizer = kinds[kind]
    library = tokenizer._tokenizer
    prompt, generated = ids_of(library, prompt), ids_of(library, generated)
    before, whole = library.decode(prompt), library.decode(prompt + generated)
    pieces, rest = stream_of(tokenizer, prompt, generated)
    if "\ufffd" not in before:
        assert "".join(pieces) + rest == whole[len(before) :]


@pytest.mark.parametrize("kind", ["llama-2", "gemma", "unigram", "unigram-metaspace-first"])
def test_a_broken_byte_spoils_no_character_beside_it(kinds, kind):
    tokenizer = kinds[kind]
    (broken, *_) = spelled(tokenizer._tokenizer, "語")
    run = ids_of(tokenizer._tokenizer, ["한", "국"])
    ids = [*run[:3], broken, *run[3:]]
    pieces, rest = stream_of(tokenizer, spelled(tokenizer._tokenizer, "a"), ids)
    assert "".join(pieces) + rest == "한\ufffd국"
    assert tokenizer.decode(ids) == "한\ufffd국"
    pieces, rest = stream_of(tokenizer, (), run[:5])
    assert ("".join(pieces), rest) == ("한", "\ufffd")
    assert tokenizer.decode(run[:5]) == "한\ufffd"


@pytest.mark.parametrize("kind", ["byte-level", "llama-2", "unigram"])
def test_no_half_of_a_character_comes_out_before_it_is_whole(kinds, kind):
    tokenizer = kinds[kind]
    pieces, rest = stream_of(tokenizer, (), spelled(tokenizer._tokenizer, "🦙"))
    assert [*pieces, rest] == ["", "", "", "🦙", ""]


@pytest.mark.parametrize("kind", ["byte-level", "llama-2", "unigram"])
def test_a_special_token_and_an_unknown_one_say_nothing_even_inside_a_character(kinds, kind):
    tokenizer = kinds[kind]
    first, *others = spelled(tokenizer._tokenizer, "語")
    special = tokenizer._tokenizer.token_to_id("<|end|>")
    pieces, rest = stream_of(tokenizer, (special,) * 40, [first, special, 10**6, *others])
    assert "".join(pieces) + rest == "語"


@pytest.mark.parametrize("kind", ["byte-level", "llama-2"])
def test_a_character_that_a_prompt_left_unfinished_comes_out_whole(kinds, kind):
    tokenizer = kinds[kind]
    prompt = ids_of(tokenizer._tokenizer, list("한국어로 대답"))
    pieces, rest = stream_of(tokenizer, prompt[:-1], prompt[-1:])
    assert "".join(pieces) + rest == "답"


def test_a_token_costs_the_same_however_long_the_run_of_bytes(kinds):
    tokenizer = kinds["llama-2"]
    run = ids_of(tokenizer._tokenizer, ["한"]) * 3000
    stream = TextStream(tokenizer, run)
    decoded = 0
    decode = tokenizer.decode_plain

    def counting(ids):
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    tokenizer.decode_plain = counting
    try:
        assert "".join(map(stream.push, run)) == "한" * 3000
    finally:
        del tokenizer.decode_plain
    assert decoded <= 8 * len(run)
