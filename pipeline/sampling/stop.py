"""Ends a text at the first of several strings, as the text arrives piece by piece."""

from collections import deque
from collections.abc import Collection, Sequence


class StopChecker:
    """Passes text on, but holds back whatever may still turn out to be a stop string.

    The stop string that is complete first ends the text, just before it (of several complete at
    once, the longest). Where the text was cut into pieces makes no difference. Each character
    costs the same, however long the strings (Knuth, Morris and Pratt 1977).

    Special tokens are not shown. A stop string that spells one of `specials` is therefore looked
    for twice: in what is shown, and in that with the special tokens where they were.
    """

    def __init__(self, stops: Sequence[str], specials: Collection[str] = ()) -> None:
        self._shown = [_Pattern(stop) for stop in stops]
        spelled = [stop for stop in stops if any(each and each in stop for each in specials)]
        self._spelled = [_Pattern(stop) for stop in spelled]
        # For each of the last characters, shown or not: how many shown ones were before it.
        self._offsets: deque[int] = deque(maxlen=max(map(len, spelled), default=0))
        self._num_shown = 0
        self._held = ""
        self._is_stopped = False

    def push(self, text: str, *, is_shown: bool = True) -> tuple[str, bool]:
        """Text that is certain now, and whether the text has ended."""
        if self._is_stopped:
            return "", True
        first = self._num_shown - len(self._held)
        if is_shown:
            self._held += text
        for char in text:
            starts = self._starts_of_complete(char, is_shown=is_shown)
            if starts:
                certain, self._held = self._held[: min(starts) - first], ""
                self._is_stopped = True
                return certain, True
        num_certain = min(self._starts_of_open(), default=self._num_shown) - first
        certain, self._held = self._held[:num_certain], self._held[num_certain:]
        return certain, False

    def finish(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _starts_of_complete(self, char: str, *, is_shown: bool) -> list[int]:
        """Where the stop strings begin that are complete with this character."""
        starts = []
        if self._spelled:
            self._offsets.append(self._num_shown)
            found = [length for each in self._spelled if (length := each.advance(char))]
            starts = [self._offsets[-length] for length in found]
        if is_shown:
            self._num_shown += 1
            found = [length for each in self._shown if (length := each.advance(char))]
            starts += [self._num_shown - length for length in found]
        return starts

    def _starts_of_open(self) -> list[int]:
        """Where what may become a stop string begins."""
        spelled = [each.num_matched for each in self._spelled if each.num_matched]
        starts = [self._offsets[-length] for length in spelled]
        return starts + [self._num_shown - each.num_matched for each in self._shown]


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
