"""A step to send, and the one after it where that is certain but for its token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pipeline.protocol.last_stage_inputs import NOTHING_ASKED, Asked
from pipeline.protocol.messages import Abort, Done, Start
from pipeline.protocol.step_header import StepHeader
from pipeline.sampling.draw import Draw
from transport.frozen import frozen

# What stages hear of a request's life, on their control channels.
Notice = Start | Done | Abort


@frozen
class Step:
    """A step to send: its header, and the token ids for the first stage."""

    header: StepHeader
    token_ids: tuple[int, ...]
    # For each segment that wants a token, whose it is; others want to know of a prompt's rows.
    owners: tuple[int, ...]
    # Whether requests take part that had read their prompt before.
    is_decoding: bool = False
    # What the last stage is told of how to answer.
    asked: Asked = NOTHING_ASKED
    # Slots that nobody owns any more once this has come back.
    freed: tuple[int, ...] = ()
    # Each segment's request, of steps that carry tokens.
    requests: tuple[int, ...] = ()
    # How many of its tokens are read, and not generated.
    num_read: int = 0
    # Those that end with it, for they wanted no more than to read their prompt.
    ended: tuple[int, ...] = ()

    def answered(self) -> Iterator[tuple[int, int]]:
        """Whose each part of its result is, and from which position on."""
        for request_id, segment, want in zip(
            self.requests, self.header.segments, self.header.wants, strict=False
        ):
            if want:
                yield request_id, segment.position


@frozen
class FollowUp:
    """A step that is certain but for its one token: the one that the step under way returns."""

    due: StepHeader
    header: StepHeader
    # Tokens after which there is no such step.
    ends: frozenset[int]
    # How the last stage is to draw the token after that one, if it draws; what stands for that one
    # at the end of its text is not it. Nor is its mask what it will be where `behind` says how the
    # token behind a given one is drawn.
    how: Draw | None = None
    behind: Callable[[int], Draw] | None = None

    def asked(self, token_id: int) -> Asked:
        """What the last stage is told once its one token is known."""
        if self.behind is not None:
            return Asked(draws=(self.behind(token_id),))
        how = self.how
        if how is None:
            return NOTHING_ASKED
        if not how.text.size:
            return Asked(draws=(how,))
        text = np.append(how.text[:-1], np.uint32(token_id))
        return Asked(draws=(replace(how, text=text),))


class Promise:
    """A follow-up that may be sent ahead, and must then be the next step whatever happens.

    It is open until its token comes; then its step is due, or it is void: the token was an end.
    """

    def __init__(self) -> None:
        self.open: FollowUp | None = None
        self._due: Step | None = None

    @property
    def is_given(self) -> bool:
        """Whether it still decides what the next step is."""
        return self.open is not None or self._due is not None

    def give(self, follow_up: FollowUp) -> FollowUp:
        """Open it."""
        self.open = follow_up
        return follow_up

    def come(self, token_ids: Sequence[int], owners: tuple[int, ...]) -> None:
        """Take the result of the step under way."""
        follow_up, self.open = self.open, None
        if follow_up is not None and token_ids[0] not in follow_up.ends:
            asked = follow_up.asked(token_ids[0])
            header = follow_up.header
            self._due = Step(header, tuple(token_ids), owners, True, asked, requests=owners)

    def take(self) -> Step | None:
        """The step that is due, which it is once."""
        step, self._due = self._due, None
        return step

    def void(self) -> None:
        """Forget it: what it may have been sent on is lost."""
        self.open = self._due = None
