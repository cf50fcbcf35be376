"""How Ray spreads stages over nodes: all that a start has to know of it, for the flag."""

from typing import Literal

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
