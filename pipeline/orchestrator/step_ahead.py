"""The step after a token, laid out before the token comes: sans-IO.

While a lone request's step is in the stages, all of the next one is known but its token. So the
orchestrator need only copy that from one frame to the other, and the stages compute again while it
makes sure of the result as it would of any, and turns it into text.
"""

from pipeline.engine.step import FollowUp
from pipeline.errors import LinkLost
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import step_form
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import (
    TIMING_BYTES,
    StageTiming,
    StepHeader,
    StepKind,
    encode_step,
)
from pipeline.protocol.step_limits import token_specs
from transport.tensor_frames import FrameForm

TOKEN_BYTES = 4


class Ahead:
    """What may be sent ahead on one pair of data channels, and what has been."""

    def __init__(self, num_stages: int) -> None:
        self._results = _form((StageTiming(0, 0, 0),) * num_stages)
        self._step = _form(())
        self._timings = (StageTiming(0, 0, 0),) * num_stages
        # How a result begins that answers what is due: all but its timings and its token.
        self._due = b""
        self._prepared: FollowUp | None = None
        self._sent: StepHeader | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether there is something to send ahead."""
        return self._prepared is not None

    def prepare(self, follow_up: FollowUp | None) -> None:
        """Lay a step out; None: there is none."""
        if self._sent is not None:
            follow_up = None  # it has left, and its own result is not due yet
        self._prepared = follow_up
        if follow_up is not None:
            step = self._step
            step.plain[step.header_start : step.header_stop] = encode_step(follow_up.header)
            results, due = self._results, follow_up.due._replace(timings=self._timings)
            header = encode_step(due)[: -len(self._timings) * TIMING_BYTES]
            self._due = bytes(results.plain[: results.header_start]) + header

    def follow(self, plain: memoryview, vocab_size: int) -> FrameForm | None:
        """The frame to send ahead now that `plain` has come; None if that is not what was due.

        Whether the result is sound in every other way is looked at afterwards: a step too many
        does no harm where the session ends.
        """
        follow_up, self._prepared = self._prepared, None
        results, step = self._results, self._step
        due = self._due
        if follow_up is None or len(plain) != len(results.plain) or plain[: len(due)] != due:
            return None
        start = results.places[0][0]
        token = plain[start : start + TOKEN_BYTES]
        token_id = int.from_bytes(token, "little")
        if token_id >= vocab_size or token_id in follow_up.ends:
            return None
        start = step.places[0][0]
        step.plain[start : start + TOKEN_BYTES] = token
        self._sent = follow_up.header
        return step

    def has_sent(self, header: StepHeader) -> bool:
        """Whether this step, the next one in order, has been sent ahead.

        Raises LinkLost where another has: only new channels help.
        """
        sent, self._sent = self._sent, None
        if sent not in {None, header}:
            raise LinkLost(0, f"step {header.step} is not the one that was sent ahead")
        return sent is not None


def _form(timings: tuple[StageTiming, ...]) -> FrameForm:
    header = StepHeader(StepKind.STEP, 0, (Segment(0, 0, 1),), (Want.TOKEN,), timings)
    return step_form(header, token_specs(1))
