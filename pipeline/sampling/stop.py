"""Ends a text at the first of several strings, as the text arrives piece by piece."""

from collections.abc import Sequence


class StopChecker:
    """Passes text on, but holds back whatever may still turn out to be a stop string.

    The stop string that is complete first ends the text, just before it (of several complete at
    once, the longest). Where the text was cut into pieces makes no difference. Each character
    costs the same, however long the strings (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self._is_stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain now, and whether the text has ended."""
        if self._is_stopped or not self._patterns:
            return ("", True) if self._is_stopped else (text, False)
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            complete = max(pattern.advance(char) for pattern in self._patterns)
            if complete:
                self._is_stopped, self._held = True, ""
                return pending[: end - complete], True
        num_held = max(pattern.num_matched for pattern in self._patterns)
        certain = len(pending) - num_held
        self._held = pending[certain:]
        return pending[:certain], False

    def finish(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """How much of one string the end of the text matches."""

    def __init__(self, text: str) -> None:
        self.num_matched = 0
        self._text = text
        # For each length of a match: the next shorter one that also ends there.
        self._shorter = [0] * (len(text) + 1)
        for end in range(1, len(text)):
            self._shorter[end + 1] = self._step(self._shorter[end], text[end])

    def advance(self, char: str) -> int:
        """Take a character; the string's length if it is complete, else 0."""
        self.num_matched = self._step(self.num_matched, char)
        return self.num_matched if self.num_matched == len(self._text) else 0

    def _step(self, num_matched: int, char: str) -> int:
        while num_matched and self._text[num_matched] != char:
            num_matched = self._shorter[num_matched]
        return num_matched + (self._text[num_matched] == char)
