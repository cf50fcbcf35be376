"""MXFP4, as gpt-oss stores its experts: floats of four bits, 32 of which share a power of two.

`NAME_blocks` uint8 [n, out, in / 32, 16], each byte two numbers, the lower half the first;
`NAME_scales` uint8 [n, out, in / 32], exponents above -127. All experts of a layer are one stack.

Source: OCP Microscaling Formats 1.0; transformers, `integrations/mxfp4.py`.
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from pipeline.dtypes import FLOAT32, Floats, HostArray
from pipeline.weights.checkpoint_header import StoredTensor, as_rows
from pipeline.weights.packings.base import CorruptPacking, PackedWeight, Sides
from transport.frozen import frozen

GROUP, BLOCK_BYTES = 32, 16
BIAS = 127  # of exponents
NOT_A_NUMBER = 255  # as an exponent
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_HALF, *(-each for each in _HALF)], FLOAT32)
# Both numbers of each byte.
_PAIRS = np.stack((np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)), axis=1)


@frozen
class Mxfp4:
    """The stacks of experts of a model."""

    is_in_out = False
    row_weights = 1

    def find(self, names: Collection[str]) -> Iterator[PackedWeight]:
        """The weights among these tensors that are packed so."""
        for main in names:
            name = main.removesuffix("_blocks")
            if name != main and f"{name}_scales" in names:
                yield PackedWeight(name, main, {"scales": f"{name}_scales"}, self)

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """By the blocks, if there are as many scales. Raises CorruptPacking."""
        if main.dtype != "U8" or len(main.shape) != 4 or main.shape[3] != BLOCK_BYTES:
            raise CorruptPacking(f"is {main.dtype} {list(main.shape)}, no stack of MXFP4 blocks")
        scales = sides["scales"]
        if scales.dtype != "U8" or scales.shape != main.shape[:3]:
            raise CorruptPacking(
                f"has scales {scales.dtype} {list(scales.shape)}, its blocks mean U8 "
                f"{list(main.shape[:3])}"
            )
        count, num_out, groups, _ = main.shape
        return count, num_out, groups * GROUP

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """All scales are numbers. Raises CorruptPacking."""
        del shape
        if (sides["scales"] == NOT_A_NUMBER).any():
            raise CorruptPacking("has scales that are no numbers")

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Outputs `first`.. of all matrices', each of all its inputs."""
        scales = sides["scales"].reshape(as_rows(sides["scales"].shape))
        exponents = scales[first : first + len(rows)].astype(np.int32) - BIAS
        numbers = _PAIRS[rows].reshape(len(rows), -1, GROUP)
        found: Floats = np.ldexp(numbers, exponents[:, :, None]).reshape(len(rows), -1)
        return found

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """They are in four bits, whose errors are four bits' own."""
        del sides
        return False

    def int4(self, first: int, rows: HostArray, sides: Sides) -> None:
        """These levels are not evenly spaced."""
