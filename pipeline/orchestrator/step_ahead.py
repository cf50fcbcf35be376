"""The step after a token, laid out before the token comes: sans-IO.

While a lone request's step is in the stages, all of the next one is known but its token. So the
orchestrator need only copy that from one frame to the other, and the stages compute again while it
makes sure of the result as it would of any, and turns it into text.
"""

from functools import lru_cache

from pipeline.engine.step import FollowUp
from pipeline.errors import LinkLost
from pipeline.protocol.batch import Segment
from pipeline.protocol.last_stage_inputs import NOTHING_ASKED, Asked, end_of_text
from pipeline.protocol.links import step_form
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import (
    TIMING_BYTES,
    StageTiming,
    StepHeader,
    StepKind,
    encode_step,
)
from pipeline.protocol.step_limits import step_tensors
from pipeline.protocol.step_results import expected_results
from transport.errors import MisuseError
from transport.tensor_frames import Frame, FrameForm, FrameKind

TOKEN_BYTES = 4


class Ahead:
    """What may be sent ahead on one pair of data channels, and what has been."""

    def __init__(self, num_stages: int) -> None:
        self._timings = (StageTiming(0, 0, 0),) * num_stages
        # How a result begins that answers what is due: all but its timings and its token.
        self._due = b""
        self._results: FrameForm | None = None
        # The step, and where its token has to be.
        self._step: FrameForm | None = None
        self._places: list[int] = []
        self._mask_place = 0
        self._prepared: FollowUp | None = None
        self._sent: StepHeader | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether there is something to send ahead."""
        return self._prepared is not None

    def prepare(self, follow_up: FollowUp | None) -> None:
        """Lay a step out; None: there is none."""
        self._prepared = None
        if follow_up is None or self._sent is not None:
            return  # one has left, and its own result is not due yet
        how = follow_up.how
        asked = NOTHING_ASKED if how is None else Asked(draws=(how,))
        tensors = step_tensors(follow_up.header, (0,), asked)
        try:
            step = FrameForm(Frame(FrameKind.DATA, encode_step(follow_up.header), tensors))
        except MisuseError:
            return  # it takes more than one record
        places = [start for start, _ in step.places]
        self._mask_place = 0
        if how is not None:
            draw_start, draw_bytes = places[1], tensors[1].spec.nbytes
            places[1:] = [draw_start + end_of_text(how)] if how.text.size else []
            if follow_up.behind is not None:
                self._mask_place = draw_start + draw_bytes - len(how.allowed)
        self._step, self._places = step, places
        (want,) = follow_up.header.wants
        self._results = results = _results(want, len(self._timings))
        due = follow_up.due._replace(timings=self._timings)
        header = encode_step(due)[: -len(self._timings) * TIMING_BYTES]
        self._due = bytes(results.plain[: results.header_start]) + header
        self._prepared = follow_up

    def follow(self, plain: memoryview, vocab_size: int) -> FrameForm | None:
        """The frame to send ahead now that `plain` has come; None if that is not what was due.

        Whether the result is sound in every other way is looked at afterwards: a step too many
        does no harm where the session ends.
        """
        follow_up, self._prepared = self._prepared, None
        results, step = self._results, self._step
        if follow_up is None or results is None or step is None:
            return None
        if len(plain) != len(results.plain) or plain[: len(self._due)] != self._due:
            return None
        start = results.places[0][0]
        token = plain[start : start + TOKEN_BYTES]
        token_id = int.from_bytes(token, "little")
        if token_id >= vocab_size or token_id in follow_up.ends:
            return None
        for place in self._places:
            step.plain[place : place + TOKEN_BYTES] = token
        if self._mask_place and not self._set_mask(step, follow_up, token_id):
            return None
        self._sent = follow_up.header
        return step

    def _set_mask(self, step: FrameForm, follow_up: FollowUp, token_id: int) -> bool:
        """Put the mask behind the token that has come where room was left; whether it fits."""
        (how,) = follow_up.asked(token_id).draws
        assert follow_up.how is not None  # else nothing would be masked
        mask = how.allowed
        if len(mask) != len(follow_up.how.allowed):
            return False
        step.plain[self._mask_place : self._mask_place + len(mask)] = mask
        return True

    def has_sent(self, header: StepHeader) -> bool:
        """Whether this step, the next one in order, has been sent ahead.

        Raises LinkLost where another has: only new channels help.
        """
        sent, self._sent = self._sent, None
        if sent not in {None, header}:
            raise LinkLost(0, f"step {header.step} is not the one that was sent ahead")
        return sent is not None


@lru_cache(maxsize=16)
def _results(want: Want, num_stages: int) -> FrameForm:
    """What a result of one segment looks like."""
    timings = (StageTiming(0, 0, 0),) * num_stages
    header = StepHeader(StepKind.STEP, 0, (Segment(0, 0, 1),), (want,), timings)
    return step_form(header, expected_results(header, 0, 0))
