"""Text to token ids and back; the only place that sees a prompt's text."""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from pipeline.engine.end_tokens import read_end_tokens
from pipeline.engine.text_stream import REPLACEMENT, TextStream
from pipeline.errors import PromptError, TokenizerError
from pipeline.files import is_file
from pipeline.gguf.model_files import is_gguf, read_model_file

MAX_TOKENIZER_BYTES = 1 << 28  # the largest vocabularies there are take a tenth of it
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A `tokenizer.json`, and what the files beside it say of the tokens that end a text."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises InputError, mostly TokenizerError."""
        if not is_gguf(path.parent) and not is_file(path):
            raise TokenizerError(
                f"no tokenizer at {path}; give the model directory's tokenizer.json"
            )
        try:
            raw = read_model_file(path, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise TokenizerError(f"cannot read {path}: {error.strerror}") from error
        try:
            self._tokenizer = HfTokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error
        # Left behind by training, which wants batches of one length. A prompt is what it is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.get_added_tokens_decoder()
        decoder = self._tokenizer.decoder
        spelled = b"" if decoder is None else decoder.__getstate__()
        self._is_byte_level = b'"ByteLevel"' in spelled
        self._has_byte_tokens = b'"ByteFallback"' in spelled
        self._directory = path.parent
        # Now, while stages load, and not once they are there.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self._num_ids = max(ids, default=-1) + 1
        self._num_rows: int | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id a prompt may hold, added tokens included."""
        return self._num_ids if self._num_rows is None else min(self._num_ids, self._num_rows)

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end a text by the files beside the tokenizer. Raises TokenizerError."""
        ends = read_end_tokens(self._directory)
        named = {self._tokenizer.token_to_id(token) for token in ends.tokens}
        return ends.token_ids | {token_id for token_id in named if token_id is not None}

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the tokens that are left out of what is decoded."""
        return tuple(token.content for token in self._added.values() if token.special)

    @cached_property
    def text_token_ids(self) -> tuple[int, ...]:
        """The tokens that text is made of, in order: none that was added, to mark something."""
        ids = set(self._tokenizer.get_vocab(with_added_tokens=False).values())
        return tuple(sorted(ids - self._added.keys()))

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Hold the ids against the model's; from now on prompts are, too.

        Raises TokenizerError when ordinary text can give tokens the model does not have. Added
        tokens beyond it, such as a fine-tune's padding, harm only a prompt that spells them.
        """
        beyond = range(model_vocab_size, self._num_ids)
        always = self._tokenizer.encode("").ids  # what is put around every text
        if any(each in always or self._comes_of_text(each) for each in beyond):
            raise TokenizerError(
                f"the tokenizer has {self._num_ids} tokens, the model {model_vocab_size}; "
                "give the tokenizer.json that belongs to the model"
            )
        self._num_rows = model_vocab_size

    def _comes_of_text(self, token_id: int) -> bool:
        """Whether text that spells no added token can be given this token."""
        if token_id in self._added or self._tokenizer.id_to_token(token_id) is None:
            return False
        text = self.decode_plain((token_id,))
        if REPLACEMENT in text:  # some bytes of a character
            return self.raw_bytes(token_id) is not None
        return token_id in self._tokenizer.encode(text, add_special_tokens=False).ids

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise PromptError for an id that the model does not have, as far as that is known."""
        largest = max(token_ids, default=-1)
        if self._num_rows is not None and largest >= self._num_rows:
            raise PromptError(
                f"the prompt holds token {largest}, and the model has only 0 to "
                f"{self._num_rows - 1}; leave out what spells it"
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens the tokenizer itself adds.

        Raises PromptError.
        """
        if not text:
            raise PromptError("the prompt is empty; give at least one token of text")
        try:
            # As a batch, since only that lets other threads run meanwhile.
            (encoding,) = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except (TypeError, UnicodeEncodeError) as error:
            raise PromptError("the prompt is not valid Unicode text") from error
        except Exception as error:  # the library's own: a vocabulary without an unknown token
            raise PromptError(f"the tokenizer cannot spell the prompt: {error}") from error
        self.check_ids(encoding.ids)
        return tuple(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        text = self.decode_plain(token_ids)
        if REPLACEMENT not in text:
            return text
        stream = TextStream(self)  # the library gives up a whole run of byte tokens for one of them
        return "".join(map(stream.push, token_ids)) + stream.finish()

    def decode_plain(self, token_ids: Sequence[int]) -> str:
        """The library's text of these, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def special_text(self, token_id: int) -> str:
        """What a special token is called; empty for every other."""
        added = self._added.get(token_id)
        return added.content if added is not None and added.special else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; they need not be whole characters."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # rows of the head beyond the vocabulary
            return b""
        match = None if self._is_byte_level else _BYTE_TOKEN.fullmatch(token)
        if match:
            return bytes.fromhex(match[1])
        return self.raw_bytes(token_id) or token.replace("\u2581", " ").encode()

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The bytes that the decoder itself makes of a token; None if it makes characters."""
        token = self._tokenizer.id_to_token(token_id) or ""
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if match:
            return bytes.fromhex(match[1])
        if not self._is_byte_level:
            return None
        table = _byte_of_char()
        if all(char in table for char in token):
            return bytes(table[char] for char in token)
        return token.encode()

    @cached_property
    def plain_word(self) -> tuple[int, ...]:
        """A token that is a plain word, if there is one: what stands for all text before."""
        for token_id in range(self._num_ids):
            text = self.decode_plain((token_id,))
            if text.isascii() and text.isalnum():
                return (token_id,)
        return ()

    def is_shown(self, token_id: int) -> bool:
        """Whether it is a token, and no special one."""
        return not self.special_text(token_id) and self._tokenizer.id_to_token(token_id) is not None


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The printable characters byte-level vocabularies write bytes with (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
