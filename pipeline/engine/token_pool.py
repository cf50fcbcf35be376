"""How many tokens requests may hold together, and who is let in: counts alone.

Stages share memory among slots as they fill. So a request is admitted while what it has and a share
of what may come fit beside the others; should they all grow, the youngest gives way.
"""

import math
from collections.abc import Iterable

from pipeline.engine.limits import Limits
from pipeline.engine.request import RequestState

# Of what a request may still grow by so much is kept free for it. Few are as long as they may be,
# and to give way costs little: tokens that are known are read again, many at a time.
GROWTH_SHARE = 2


class TokenPool:
    """What the smallest of all stages has room for, once that is known."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # None: as many as slots have positions.
        self.num_tokens: int | None = None

    @property
    def size(self) -> float:
        """Tokens that all slots may hold together, infinite if nothing bounds them."""
        return math.inf if self.num_tokens is None else self.num_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens that one request may hold, its prompt included."""
        limits, size = self._limits, self.num_tokens
        has_room = size is None or size >= self.rows(limits.max_seq_len)
        return limits.max_seq_len if has_room or size is None else size

    def rows(self, num_tokens: int) -> int:
        """What so many tokens of a request take: under a window no more than that."""
        window = self._limits.window
        return num_tokens if window is None else min(num_tokens, window.size)

    def held(self, states: Iterable[RequestState]) -> int:
        """What requests hold once all is sent that is known of them."""
        if self._limits.window is None:  # asked at every step
            return sum([len(each.request.prompt_ids) + len(each.token_ids) for each in states])
        return sum(self.rows(state.num_known) for state in states)

    def fits(self, state: RequestState, running: Iterable[RequestState], num_other: int) -> bool:
        """Whether one more may come, beside requests and `num_other` rows that stay for now."""
        if self.num_tokens is None:
            return True
        needed = sum(map(self._with_growth, running))
        return needed + self._with_growth(state) + num_other <= self.num_tokens

    def _with_growth(self, state: RequestState) -> int:
        """What a request is likely to need; no text is taken to outgrow its share of the pool."""
        assert self.num_tokens is not None, "asked only where there is a bound"
        left = state.request.max_tokens - len(state.token_ids)
        share = min(left, self.num_tokens // self._limits.num_slots) // GROWTH_SHARE
        return self.rows(state.num_known + share)
