"""The ends of a model: what turns tokens into what the first stage takes, and back."""

from collections.abc import Sequence
from typing import Protocol

from pipeline.engine.home_times import Times
from pipeline.engine.step import Step
from pipeline.protocol.step_header import StepHeader
from pipeline.protocol.step_limits import step_tensors
from pipeline.protocol.step_results import StepResult, step_result
from transport.tensor_frames import Tensor


class ModelEnds(Protocol):
    """What goes to the first stage with a step, and what the last one's answer means."""

    @property
    def are_remote(self) -> bool:
        """Whether a token travels as such, so that it may be sent on before it is looked at."""
        ...

    def begin(self, step: Step) -> tuple[StepHeader, tuple[Tensor, ...]]:
        """The step as it travels."""
        ...

    def end(self, step: Step, header: StepHeader, tensors: Sequence[Tensor]) -> StepResult:
        """The result of a step from what came back for it, its specs checked.

        Raises MessageError for what cannot be an answer to it.
        """
        ...

    def take_times(self) -> Times | None:
        """What has been spent here since the last time, by part; None where that is nothing."""
        ...


class RemoteEnds:
    """The first and the last stage hold them."""

    are_remote = True

    def begin(self, step: Step) -> tuple[StepHeader, tuple[Tensor, ...]]:
        """Token ids, and what is asked of the last stage."""
        return step.header, step_tensors(step.header, step.token_ids, step.asked)

    def end(self, step: Step, header: StepHeader, tensors: Sequence[Tensor]) -> StepResult:
        """What the last stage says."""
        del step
        return step_result(header, tensors)

    def take_times(self) -> None:
        """Nothing is computed here."""


REMOTE_ENDS = RemoteEnds()
