"""A text and its tokens: who reads it has to come upon the tokens that were chosen."""

from collections.abc import Sequence
from functools import cached_property

from pipeline.engine.text_stream import TextStream
from pipeline.engine.tokenizer import Tokenizer
from pipeline.sampling.masks import AllowedTokens

# Tokens at the end of an unfinished text that what follows may yet split otherwise.
_NUM_UNSETTLED = 4


class CoverTokenizer:
    """A tokenizer, for texts that stand alone although they follow a prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def mask(self) -> AllowedTokens:
        """Leaves out what can be no part of a text: marks, ends, rows beyond the vocabulary."""
        return AllowedTokens(self.tokenizer.text_token_ids)

    @property
    def num_tokens(self) -> int:
        """How many tokens a text can be made of."""
        return len(self.tokenizer.text_token_ids)

    @cached_property
    def _anchor(self) -> tuple[str, tuple[int, ...]]:
        """What has to stand before a text, so that a space it begins with is kept."""
        encode = self.tokenizer.encode
        plain = encode(" a", add_special_tokens=False)
        if self.text(plain) == " a":
            return "", ()
        return "\n", encode("\n", add_special_tokens=False)

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text. Raises PromptError."""
        anchor, anchor_ids = self._anchor
        if not text:
            return ()
        return self.tokenizer.encode(anchor + text, add_special_tokens=False)[len(anchor_ids) :]

    def text(self, token_ids: Sequence[int], anchor_ids: Sequence[int] = ()) -> str:
        """The text of tokens that follow some others."""
        stream = TextStream(self.tokenizer, anchor_ids)
        return "".join(map(stream.push, token_ids)) + stream.finish()

    def cover(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, as it follows a prompt."""
        return self.text(token_ids, self._anchor[1])

    def survives(self, token_ids: Sequence[int], num_needed: int) -> bool:
        """Whether their text is split into these tokens again, as a model's own text is.

        And where whitespace at its end has been lost, into the first so many of them.
        """
        text = self.cover(token_ids)
        shortened = self.ids(text.rstrip())[:num_needed]
        return self.ids(text) == tuple(token_ids) and shortened == tuple(token_ids[:num_needed])

    def may_survive(self, token_ids: Sequence[int]) -> bool:
        """False where nothing that follows will make these tokens those of their text."""
        num_settled = max(0, len(token_ids) - _NUM_UNSETTLED)
        return self.ids(self.cover(token_ids))[:num_settled] == tuple(token_ids[:num_settled])
