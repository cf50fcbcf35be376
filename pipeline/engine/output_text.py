"""A continuation's text, from its tokens to where a stop string ends it."""

from collections.abc import Collection, Sequence

from pipeline.engine.text_stream import TextStream
from pipeline.engine.tokenizer import Tokenizer
from pipeline.sampling.stop_strings import StopChecker


class StoppedText:
    """Turns tokens into the text that is certain of them, up to the first stop string.

    Special tokens are left out of the text, unless `shows_special_tokens`; a stop string that
    spells one ends it all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        *,
        shows_special_tokens: bool = False,
        shown: Collection[str] = (),
    ) -> None:
        """`shown`: special tokens that are part of the text all the same."""
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stop = StopChecker(stops, tokenizer.special_tokens)
        self._shows_special_tokens = shows_special_tokens
        self._shown = frozenset(shown)
        # Characters of the text that the tokens so far stand for, certain or not.
        self.num_decoded = 0

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the text, if one has."""
        return self._stop.found

    def push(self, token_id: int) -> tuple[str, bool]:
        """What the next token makes certain, and whether the text has ended before it."""
        special = self._tokenizer.special_text(token_id)
        if special:
            is_shown = self._shows_special_tokens or special in self._shown
            return self._check(special, is_shown=is_shown)
        return self._check(self._stream.push(token_id))

    def finish(self) -> tuple[str, bool]:
        """What was held back, now that no token follows."""
        text, is_stopped = self._check(self._stream.finish())
        return text if is_stopped else text + self._stop.finish(), is_stopped

    def _check(self, text: str, *, is_shown: bool = True) -> tuple[str, bool]:
        self.num_decoded += len(text) if is_shown else 0
        return self._stop.push(text, is_shown=is_shown)
