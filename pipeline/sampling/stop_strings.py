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
        # The stop string that has ended the text.
        self.found: str | None = None

    def push(self, text: str, *, is_shown: bool = True) -> tuple[str, bool]:
        """Text that is certain now, and whether the text has ended."""
        if self.found is not None:
            return "", True
        first = self._num_shown - len(self._held)
        if is_shown:
            self._held += text
        for char in text:
            complete = self._complete(char, is_shown=is_shown)
            if complete:
                start, self.found = min(complete)
                certain, self._held = self._held[: start - first], ""
                return certain, True
        num_certain = min(self._starts_of_open(), default=self._num_shown) - first
        certain, self._held = self._held[:num_certain], self._held[num_certain:]
        return certain, False

    def finish(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _complete(self, char: str, *, is_shown: bool) -> list[tuple[int, str]]:
        """The stop strings that are complete with this character, and where each begins."""
        complete = []
        if self._spelled:
            self._offsets.append(self._num_shown)
            found = [each.text for each in self._spelled if each.advance(char)]
            complete = [(self._offsets[-len(text)], text) for text in found]
        if is_shown:
            self._num_shown += 1
            found = [each.text for each in self._shown if each.advance(char)]
            complete += [(self._num_shown - len(text), text) for text in found]
        return complete

    def _starts_of_open(self) -> list[int]:
        """Where what may become a stop string begins."""
        spelled = [each.num_matched for each in self._spelled if each.num_matched]
        starts = [self._offsets[-length] for length in spelled]
        return starts + [self._num_shown - each.num_matched for each in self._shown]


class _Pattern:
    """How much of one string the end of the text matches."""

    def __init__(self, text: str) -> None:
        self.num_matched = 0
        self.text = text
        # For each length of a match: the next shorter one that also ends there.
        self._shorter = [0] * (len(text) + 1)
        for end in range(1, len(text)):
            self._shorter[end + 1] = self._step(self._shorter[end], text[end])

    def advance(self, char: str) -> bool:
        """Take a character; whether the string is complete with it."""
        self.num_matched = self._step(self.num_matched, char)
        return self.num_matched == len(self.text)

    def _step(self, num_matched: int, char: str) -> int:
        while num_matched and self.text[num_matched] != char:
            num_matched = self._shorter[num_matched]
        return num_matched + (self.text[num_matched] == char)
