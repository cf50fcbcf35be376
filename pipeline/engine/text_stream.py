"""Text from tokens as they come, whole characters only."""

import codecs
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

# What stands where bytes are no UTF-8.
REPLACEMENT = "\ufffd"
# Of a prompt: enough tokens to have text, and to hold the bytes of a character that it ends in.
_NUM_EDGE = 8


class TokenTexts(Protocol):
    """What a tokenizer knows of tokens' texts."""

    @property
    def plain_word(self) -> tuple[int, ...]:
        """A token that is a plain word, if there is one: what stands for all text before."""
        ...

    def decode_plain(self, token_ids: Sequence[int]) -> str:
        """The library's text of these, special tokens left out."""
        ...

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The bytes that the decoder itself makes of a token; None if it makes characters."""
        ...

    def is_shown(self, token_id: int) -> bool:
        """Whether it is a token, and no special one."""
        ...


class TextStream:
    """Turns token ids into text as they come, holding back bytes that are no whole character yet.

    What has come out at the end is the text of prompt and tokens less the text of the prompt. Only
    where bytes are no UTF-8 does it differ from what the library decodes: each malformed part is
    one U+FFFD, and characters beside it stay.

    A token's text depends on what stands before it: a decoder strips the space a text begins with,
    sets one between words, or drops a repetition. None looks back further than one token, so a
    token is decoded behind its neighbour and, for the text before that, some word. It costs the
    same wherever it stands.
    """

    def __init__(self, tokenizer: TokenTexts, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids` are what the generated tokens follow."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_begun = False
        # What the next token is decoded behind; all there is until that has a text.
        self._before: tuple[int, ...] = ()
        for token_id in self._edges(prompt_ids):
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if not self._tokenizer.is_shown(token_id):
            return ""
        return self._utf8.decode(self._bytes(token_id))

    def finish(self) -> str:
        """What was held back: an incomplete character prints as U+FFFD."""
        return self._utf8.decode(b"", final=True)

    def _edges(self, prompt_ids: Sequence[int]) -> Iterable[int]:
        """Where the prompt's text begins, and what it ends in."""
        if len(prompt_ids) <= 2 * _NUM_EDGE:
            return prompt_ids
        is_shown = self._tokenizer.is_shown
        head = list(islice(filter(is_shown, prompt_ids), _NUM_EDGE))
        tail = list(islice(filter(is_shown, reversed(prompt_ids)), _NUM_EDGE))
        return [*head, *reversed(tail)]

    def _bytes(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        before = tokenizer.decode_plain(self._before)
        text = tokenizer.decode_plain((*self._before, token_id))
        grown = text.removeprefix(before) if text.startswith(before) else REPLACEMENT
        raw = tokenizer.raw_bytes(token_id) if REPLACEMENT in grown else None
        if raw is not None:
            self._has_begun, self._before = True, tokenizer.plain_word
            return raw
        if not text.startswith(before):  # a decoder that takes back what it has said
            grown = tokenizer.decode_plain((*tokenizer.plain_word, token_id))
            grown = grown.removeprefix(tokenizer.decode_plain(tokenizer.plain_word))
        self._has_begun = self._has_begun or bool(grown)
        kept = tokenizer.plain_word if self._has_begun else self._before[-_NUM_EDGE:]
        self._before = (*kept, token_id)
        return grown.encode("utf-8", "replace")
