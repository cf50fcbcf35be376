"""Int4 as shards have it: rows of outputs, two inputs in a byte, with scales and zeros of groups.

Of weight STEM.weight: `STEM.int4` uint8 [out, in / 2], the first of two inputs in the lower half;
`STEM.int4_scale` and `STEM.int4_zero` float16 [out, groups]. What they mean: weights/int4.py.
"""

from collections.abc import Collection, Iterator, Mapping

from pipeline.dtypes import Floats, HostArray
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import Int4, dequantise_int4, unpack_nibbles
from pipeline.weights.packings.base import (
    CorruptPacking,
    PackedWeight,
    Sides,
    check_sides,
    find_by_parts,
)
from pipeline.weights.quantization import num_groups
from transport.frozen import frozen

OWN_PARTS = ("int4", "int4_scale", "int4_zero")


@frozen
class OwnInt4:
    """Weights that were in four bits when the shard was cut."""

    is_in_out = False
    row_weights = 1

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """Two for each byte, if scales and zeros are of as many groups. Raises CorruptPacking."""
        if len(main.shape) != 2 or main.dtype != "U8":
            raise CorruptPacking(f"is {main.dtype} {list(main.shape)}, no bytes of two inputs")
        num_out, num_in = main.shape[0], 2 * main.shape[1]
        groups = (num_out, num_groups(num_in))
        check_sides(sides, int4_scale=groups, int4_zero=groups)
        return num_out, num_in

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """Any numbers will do."""

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Outputs `first`.. of all inputs."""
        return dequantise_int4(self.int4(first, rows, sides))

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """They are int4."""
        del sides
        return False

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4:
        """The same as they are."""
        outputs = slice(first, first + len(rows))
        scales, zeros = sides["int4_scale"][outputs], sides["int4_zero"][outputs]
        return Int4(unpack_nibbles(rows), scales, zeros)


def find_own(names: Collection[str]) -> Iterator[PackedWeight]:
    """The weights among these tensors that are such."""
    main, *sides = OWN_PARTS
    yield from find_by_parts(names, main, sides, (), OwnInt4())
