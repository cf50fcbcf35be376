"""What lets how much of an MLP's rows through: of one half of each row, by the other."""

import math
from typing import Literal

from transport.frozen import frozen


@frozen
class Gate:
    """silu(gate) * up, gelu(gate) * up by tanh, or the same of what is clamped.

    `clamped`: g sigmoid(alpha g) (1 + u), with g the gate up to `limit`, and u `up` within it on
    both sides.
    """

    kind: Literal["silu", "gelu_tanh", "clamped"]
    alpha: float = 1.0
    limit: float = math.inf


SILU, GELU = Gate("silu"), Gate("gelu_tanh")
