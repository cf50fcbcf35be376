"""MLPs side by side of which each row passes through a few: what kernels are told of them."""

from typing import Protocol

from pipeline.dtypes import Array
from pipeline.kernels.gates import SILU, Gate
from transport.frozen import frozen


class ExpertMLPs(Protocol):
    """Gated MLPs side by side, and what sends rows through some of them, as one operation."""

    def __call__(self, x: Array, logits: Array, out: Array, residual: Array | None) -> None:
        """What those chosen make of rows [n, hidden], and the residual, into out [n, hidden].

        Shapes: logits [n, experts]; `residual` may be `out`.
        """


@frozen
class Routing:
    """How many experts logits choose of a row, and how much each counts."""

    num_chosen: int
    # Whether shares are a softmax of the logits of those chosen, or of all logits.
    are_normalised: bool
    gate: Gate = SILU
