"""How many prompt tokens a step may take, so that those who are being answered hardly notice.

What steps cost is learnt from what stages tell of each. A few rows cost what reading the weights
does, more cost each the same, whether they are of prompts or of generated tokens: so what counts is
seconds a row, of steps as large as those to come. A generated token passes all stages, behind as
many other steps; so the gap before it is as often the slowest stage's time as there are stages, and
what lies between these. Pure: time is handed in.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.engine.prefill_chunks import MIN_CHUNK_TOKENS

# A gap may be so many usual ones, however long these are: stages that are slow, or far from each
# other, would else read no prompt at all.
USUAL_GAPS = 4
# A first guess, and the least that is worth reading all weights for.
FIRST_TOKENS, LEAST_TOKENS = 32, 8
# Of what may be. Steps differ, and nearly all are to be shorter; and larger ones gain nothing once
# their rows take longer than the weights.
AIM = 0.7
# The weight of what has just been seen.
NEW = 0.25
# As many steps may be under way for each stage, where stages are far from each other.
MOST_STEPS = 4


class _Sent(NamedTuple):
    """A step under way: when it was sent, how many tokens it has, how many of prompts."""

    at: float
    num_tokens: int
    num_read: int
    # Whether no prompts were under way, and whether nothing was.
    is_usual: bool
    is_alone: bool


class Pace:
    """Learns what steps cost, and says how many tokens of prompts the next one may take."""

    def __init__(self, max_gap: float, num_stages: int) -> None:
        """`max_gap`: between two tokens of a request, seconds."""
        self._max_gap = max_gap
        self._num_stages = num_stages
        self._sent: dict[int, _Sent] = {}
        # Of each stage, seconds: of a step without prompts; and of one with some, which has so many
        # tokens.
        self._steps: list[float] = []
        self._seconds: list[float] = []
        self._num_tokens = 1.0
        # From one generated token to the next while no prompt is read, and what of any step's way
        # lies between the stages.
        self._usual_gap: float | None = None
        self._between: float | None = None

    def sent(self, step: int, num_tokens: int, num_read: int, now: float) -> None:
        """A step leaves, with so many tokens, and so many of these of prompts."""
        is_usual = not num_read and not any(each.num_read for each in self._sent.values())
        self._sent[step] = _Sent(now, num_tokens, num_read, is_usual, not self._sent)

    def came(self, step: int, seconds: Sequence[float], now: float) -> None:
        """Its result is here; `seconds`: what each stage took to compute it."""
        sent = self._sent.pop(step, None)
        if sent is None or not seconds:
            return
        way = now - sent.at
        between = max(0.0, way - sum(seconds))
        # What waits for others is on its way longer: the shortest counts.
        if self._between is None or between < self._between:
            self._between = between
        elif sent.is_alone:
            self._between += NEW * (between - self._between)
        if not sent.num_read:
            self._steps = _mixed(self._steps, seconds)
            if sent.is_usual:
                (self._usual_gap,) = _mixed(
                    [] if self._usual_gap is None else [self._usual_gap], [way]
                )
        else:
            past = [*self._seconds, self._num_tokens]
            *self._seconds, self._num_tokens = _mixed(past, [*seconds, sent.num_tokens])

    def forget(self) -> None:
        """What is under way is lost; what steps cost stays known."""
        self._sent.clear()

    def num_tokens(self, most: int, num_others: int) -> int:
        """Tokens of prompts that the next step may take, beside so many generated ones."""
        if not self._seconds:
            # Nothing is told where there is nobody to tell it.
            return min(most, FIRST_TOKENS) if self._steps else most
        between = self._between or 0.0
        stage_seconds = max(0.0, AIM * self.target - between) / self._num_stages
        num_tokens = stage_seconds * self._num_tokens / max(*self._seconds, 1e-9)
        num_prompt = int(min(num_tokens, most + num_others)) - num_others
        return min(most, max(LEAST_TOKENS, num_prompt))

    @property
    def least_tokens(self) -> int:
        """Tokens below which a step of prompts takes nearly as long.

        It takes a stage twice as long as any must, and no more of them are needed than may be
        under way.
        """
        if not self._steps or not self._seconds:
            return MIN_CHUNK_TOKENS
        on_way = (self._between or 0.0) / ((MOST_STEPS - 1) * self._num_stages)
        num_tokens = max(
            max(2 * step, on_way) * self._num_tokens / max(took, 1e-9)
            for step, took in zip(self._steps, self._seconds, strict=True)
        )
        return max(LEAST_TOKENS, int(num_tokens))

    @property
    def target(self) -> float:
        """The longest gap that is to be, seconds."""
        return max(self._max_gap, USUAL_GAPS * (self._usual_gap or 0.0))

    def num_steps(self, num_tokens: int) -> int:
        """Steps of so many tokens that keep the slowest stage busy, others being on their way."""
        if not self._steps or not self._seconds or self._between is None:
            return self._num_stages
        share = num_tokens / self._num_tokens
        seconds = [
            max(step, share * took) for step, took in zip(self._steps, self._seconds, strict=True)
        ]
        needed = round((sum(seconds) + self._between) / max(*seconds, 1e-9))
        return min(max(needed, self._num_stages), MOST_STEPS * self._num_stages)


def _mixed(past: Sequence[float], new: Sequence[float]) -> list[float]:
    if len(past) != len(new):
        return list(new)
    return [(1 - NEW) * old + NEW * now for old, now in zip(past, new, strict=True)]
