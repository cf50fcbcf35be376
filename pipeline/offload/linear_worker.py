"""The worker: multiplies what it is sent by public weights, and knows nothing else."""

from collections.abc import Sequence

from pipeline.offload.linear_wire import question_untrusted
from pipeline.offload.ring_linear import HeldLinear
from pipeline.remote_parts.wire import Message, PartRefusal, to_tensor
from transport.tensor_frames import Tensor


class LinearWorker:
    """One session; there is nothing of it to be kept."""

    def __init__(self, linears: Sequence[HeldLinear]) -> None:
        self._linears = linears

    def answer(self, header: bytes, tensors: tuple[Tensor, ...]) -> Message:
        """Rows times the weights of a linear. Raises PartRefusal."""
        index, rows = question_untrusted(header, tensors)
        if index >= len(self._linears):
            raise PartRefusal(f"there are {len(self._linears)} linears here, none is {index}")
        linear = self._linears[index]
        if rows.shape[1] != linear.num_in:
            raise PartRefusal(
                f"{linear.name} takes rows of {linear.num_in}, these have {rows.shape[1]}"
            )
        return b"", (to_tensor(linear.product(rows)),)

    def close(self) -> None:
        """Nothing is kept of a session."""
