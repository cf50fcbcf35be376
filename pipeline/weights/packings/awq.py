"""AWQ (gemm): four bits in words of eight outputs, with zeros and scales for groups of inputs.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. Source:
AutoAWQ, `awq/utils/packing_utils.py`.
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from pipeline.dtypes import FLOAT16, Floats, HostArray, to_floats
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import Int4
from pipeline.weights.packings.base import (
    CorruptPacking,
    PackedWeight,
    Sides,
    check_sides,
    find_by_parts,
    fits_int4,
)
from pipeline.weights.packings.words import scaled, unpack_columns
from pipeline.weights.quantization import GROUP
from transport.frozen import frozen

BITS, PER_WORD = 4, 8
# Nibble i of a word holds the output [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@frozen
class Awq:
    """All weights of a model; a `group_size` of None puts all inputs together."""

    group_size: int | None
    is_in_out = True
    row_weights = 1

    def find(self, names: Collection[str]) -> Iterator[PackedWeight]:
        """The weights among these tensors that are packed so."""
        yield from find_by_parts(names, "qweight", ("qzeros", "scales"), (), self)

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """By the words, if zeros and scales are of as many. Raises CorruptPacking."""
        if len(main.shape) != 2 or main.dtype != "I32":
            raise CorruptPacking(f"is {main.dtype} {list(main.shape)}, no words of eight outputs")
        num_in, num_words = main.shape
        groups = -(-num_in // (self.group_size or max(1, num_in)))
        check_sides(sides, qzeros=(groups, num_words), scales=(groups, PER_WORD * num_words))
        return PER_WORD * num_words, num_in

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """Any numbers will do."""

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Inputs `first`.. of all outputs."""
        size = self.group_size or len(rows) + first
        zeros, scales = self._of_groups(np.arange(first, first + len(rows)) // size, sides)
        return scaled(unpack_columns(rows, BITS, _PLACES), zeros, scales)

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """Groups may lie across those of int4."""
        del sides
        return not fits_int4(self.group_size)

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4 | None:
        """Inputs `first`.. of all outputs."""
        if not fits_int4(self.group_size):
            return None
        size = self.group_size or len(rows) + first
        zeros, scales = self._of_groups(np.arange(first, first + len(rows), GROUP) // size, sides)
        levels = unpack_columns(rows, BITS, _PLACES)
        return Int4(levels, scales.astype(FLOAT16), zeros.astype(FLOAT16))

    def _of_groups(self, groups: HostArray, sides: Sides) -> tuple[HostArray, Floats]:
        """Zeros and scales, a row for each of these."""
        near = slice(groups[0], groups[-1] + 1)
        zeros = unpack_columns(sides["qzeros"][near], BITS, _PLACES)[groups - groups[0]]
        return zeros, to_floats(sides["scales"][near])[groups - groups[0]]
