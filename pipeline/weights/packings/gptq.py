"""GPTQ: a few bits in words of several inputs, with zeros and scales for groups of inputs.

`qweight` int32 [in / n, out], `qzeros` int32 [groups, out / n], `scales` [groups, out], and `g_idx`
[in], the group of each input, which is not its place over the group's size where inputs were
quantised in another order than they lie in (act-order).

The first version of the format stores a zero less one. Some symmetric checkpoints say that they are
of the first, and store zeros as they are. Theirs are all in the middle: that tells.

Source: GPTQModel, `gptqmodel/nn_modules/qlinear/torch.py` and `gptqmodel/utils/model.py`.
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from pipeline.dtypes import FLOAT16, Floats, HostArray, to_floats
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import BITS, Int4
from pipeline.weights.packings.base import (
    CorruptPacking,
    PackedWeight,
    Sides,
    check_sides,
    find_by_parts,
    fits_int4,
)
from pipeline.weights.packings.words import (
    WORD_BITS,
    scaled,
    unpack_columns,
    unpack_rows_of_words,
)
from pipeline.weights.quantization import GROUP
from transport.frozen import frozen


@frozen
class Gptq:
    """All weights of a model; a `group_size` of None puts all inputs together."""

    bits: int
    group_size: int | None
    is_symmetric: bool
    is_second_version: bool
    is_act_order: bool = False
    is_in_out = True

    @property
    def row_weights(self) -> int:
        """Inputs in a word."""
        return WORD_BITS // self.bits

    def find(self, names: Collection[str]) -> Iterator[PackedWeight]:
        """The weights among these tensors that are packed so."""
        yield from find_by_parts(names, "qweight", ("qzeros", "scales"), ("g_idx",), self)

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """By the words, if zeros, scales and groups are as many. Raises CorruptPacking."""
        if len(main.shape) != 2 or main.dtype != "I32":
            raise CorruptPacking(f"is {main.dtype} {list(main.shape)}, no words of inputs")
        num_in, num_out = main.shape[0] * self.row_weights, main.shape[1]
        groups = -(-num_in // (self.group_size or max(1, num_in)))
        words = -(-num_out // self.row_weights)
        expected = {"qzeros": (groups, words), "scales": (groups, num_out)}
        check_sides(sides, **expected | ({"g_idx": (num_in,)} if "g_idx" in sides else {}))
        return num_out, num_in

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """Each input is of a group that there is. Raises CorruptPacking."""
        del shape
        groups = sides.get("g_idx")
        if groups is not None and len(groups):
            lowest, highest = int(groups.min()), int(groups.max())
            if lowest < 0 or highest >= len(sides["scales"]):
                raise CorruptPacking(
                    f"has inputs of group {lowest if lowest < 0 else highest}, and there are "
                    f"{len(sides['scales'])}"
                )

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Inputs of words `first`.. of all outputs."""
        start, count = first * self.row_weights, len(rows) * self.row_weights
        if "g_idx" in sides:
            of_each = sides["g_idx"][start : start + count]
        else:
            of_each = np.arange(start, start + count) // (self.group_size or start + count)
        zeros, scales = self._of_groups(of_each, rows.shape[1], sides)
        return scaled(unpack_rows_of_words(rows, self.bits), zeros, scales)

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """Eight bits do, and groups that lie across those of int4; two are fewer anyway."""
        del sides
        is_apart = not fits_int4(self.group_size) or (self.is_act_order and self.group_size)
        return self.bits > BITS or (self.bits == BITS and bool(is_apart))

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4 | None:
        """Inputs of words `first`.. of all outputs, if they were quantised in their order."""
        start, count = first * self.row_weights, len(rows) * self.row_weights
        in_order = np.arange(start, start + count) // (self.group_size or start + count)
        of_each = sides["g_idx"][start : start + count] if "g_idx" in sides else in_order
        if self.bits != BITS or not fits_int4(self.group_size) or (of_each != in_order).any():
            return None
        zeros, scales = self._of_groups(in_order[::GROUP], rows.shape[1], sides)
        levels = unpack_rows_of_words(rows, self.bits)
        return Int4(levels, scales.astype(FLOAT16), zeros.astype(FLOAT16))

    def _of_groups(
        self, of_each: HostArray, num_out: int, sides: Sides
    ) -> tuple[HostArray, Floats]:
        """Zeros and scales, a row for each of these groups."""
        near, groups = np.unique(of_each, return_inverse=True)
        zeros = self._zeros(sides["qzeros"][near], num_out)[groups]
        return zeros, to_floats(sides["scales"][near])[groups]

    def _zeros(self, words: HostArray, num_out: int) -> HostArray:
        stored = unpack_columns(words, self.bits)[:, :num_out]
        middle = 1 << (self.bits - 1)
        if self.is_second_version or (self.is_symmetric and bool((stored == middle).all())):
            return stored
        return (stored + 1) & ((1 << self.bits) - 1)  # a zero of 0 was stored as the last number
