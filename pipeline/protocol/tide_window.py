"""Texts without end in memory of a fixed size: the first few tokens stay, and the latest.

A window has `size` rows of keys and values for a slot. When they are full and another token comes,
the oldest behind the first `num_sinks` are dropped, `num_dropped` at once; the rest moves down, and
its keys are turned back by as many positions. So positions stay below `size`, whatever has gone by,
and rows stand as far from each other as their tokens do. The first tokens stay because models put
on them what they find nowhere else ("attention sinks").

What a slot holds is thus a function of the tokens alone: not of the steps they came in, which are
cut where rows are dropped.

Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
"""

from collections.abc import Iterator

from pipeline.errors import InputError
from transport.frozen import frozen

DEFAULT_SINKS = 4
# The most tokens of a request under a window: a bound for what is counted and sent for each.
MAX_TEXT = 1 << 20
# Such a part of a window goes at once: fewer cost more moving, more leave less to look back on.
_DROPPED_PART = 16


@frozen
class TideWindow:
    """`size` rows a slot, of which the first `num_sinks` stay. Raises InputError if it is none."""

    size: int
    num_sinks: int = DEFAULT_SINKS

    def __post_init__(self) -> None:
        """A row beside the sinks goes, and one stays: less is no window."""
        if self.num_sinks < 0:
            raise InputError(f"a window cannot keep {self.num_sinks} sinks; give 0 or more")
        if self.size < self.num_sinks + 2:
            raise InputError(
                f"a window of {self.size} positions is too small for {self.num_sinks} sinks; "
                f"give at least {self.num_sinks + 2}"
            )

    @property
    def num_dropped(self) -> int:
        """Rows that go at once."""
        return max(1, (self.size - self.num_sinks) // _DROPPED_PART)

    def keeps(self, length: int, held: int) -> bool:
        """Whether a slot that holds `held` tokens can go back to its first `length`.

        Not to what was before rows were dropped: from there on it has to be computed anew.
        """
        if length == 0 or held <= self.size:
            return True
        return length >= held - 1 - (held - 1 - self.size) % self.num_dropped

    def pieces(self, position: int, num_tokens: int) -> Iterator[int]:
        """How many tokens from `position` on fit without a drop, then how many at a time."""
        room = self.size - position
        if room <= 0:
            room += (-room // self.num_dropped + 1) * self.num_dropped
        while num_tokens > 0:
            count = min(room, num_tokens)
            yield count
            num_tokens -= count
            room = self.num_dropped
