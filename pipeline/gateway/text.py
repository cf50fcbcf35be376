"""What the gateway needs of a tokenizer beyond the pipeline's: raw encoding, a token's bytes."""

import json
import re
from functools import cached_property, lru_cache
from pathlib import Path

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import PromptError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class GatewayTokenizer(Tokenizer):
    """A `tokenizer.json` for serving."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises TokenizerError."""
        super().__init__(path)
        decoder = json.loads(self._tokenizer.to_str()).get("decoder")
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)
        self._added = {
            token_id: token.content
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered chat, which holds its special tokens already."""
        if not text:
            raise PromptError("the prompt is empty; give at least one token of text")
        encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encodings[0].ids)

    def special_text(self, token_id: int) -> str:
        """What a special token is called; empty for every other."""
        token = self._tokenizer.get_added_tokens_decoder().get(token_id)
        return token.content if token is not None and token.special else ""

    @cached_property
    def max_token_chars(self) -> int:
        """No token stands for more characters of a text than this."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; they need not be whole characters."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # rows of the head beyond the vocabulary
            return b""
        if self._is_byte_level:
            table = _byte_of_char()
            return b"".join(
                bytes((table[char],)) if char in table else char.encode() for char in token
            )
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The printable characters byte-level vocabularies write bytes with (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
