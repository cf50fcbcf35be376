"""compressed-tensors: W4A16 in words, and W8 as it is, both with scales for groups of inputs.

Packed: `weight_packed` int32 [out, in / n], numbers above their least; `weight_scale` [out,
groups]; `weight_shape`, [out, in] as numbers; where zeros are not in the middle
`weight_zero_point`, int32 [out / n, groups]; with act-order `weight_g_idx` [in]. Not packed:
`weight` int8 [out, in] and `weight_scale` [out, groups], [out, 1] or of one number. Activations are
not rounded here, whatever they were meant to be.

Source: compressed-tensors, `compressors/pack_quantized/base.py` and
`quantization/lifecycle/forward.py`.
"""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from pipeline.dtypes import FLOAT16, Floats, HostArray, to_floats
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import BITS, Int4, for_groups
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
from transport.frozen import frozen


@frozen
class PackedWords:
    """Weights in words; a `group_size` of None puts all inputs of an output together."""

    bits: int
    group_size: int | None
    is_in_out = False
    row_weights = 1

    def find(self, names: Collection[str]) -> Iterator[PackedWeight]:
        """The weights among these tensors that are packed so."""
        needed, optional = ("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
        yield from find_by_parts(names, "weight_packed", needed, optional, self)

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """By the words, if zeros and scales are of as many. Raises CorruptPacking."""
        if len(main.shape) != 2 or main.dtype != "I32":
            raise CorruptPacking(f"is {main.dtype} {list(main.shape)}, no words of inputs")
        per_word = WORD_BITS // self.bits
        num_out, num_in = main.shape[0], main.shape[1] * per_word
        groups = -(-num_in // (self.group_size or max(1, num_in)))
        possible = {
            "weight_scale": (num_out, groups),
            "weight_shape": (2,),
            "weight_zero_point": (-(-num_out // per_word), groups),
            "weight_g_idx": (num_in,),
        }
        check_sides(sides, **{name: possible[name] for name in sides})
        return num_out, num_in

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """Shape as told, and each input of a group that there is. Raises CorruptPacking."""
        told = tuple(int(each) for each in sides["weight_shape"])
        if told != shape:
            raise CorruptPacking(f"has the shape {list(shape)}, and says that it is {list(told)}")
        groups, count = sides.get("weight_g_idx"), sides["weight_scale"].shape[1]
        if groups is not None and len(groups) and not 0 <= groups.min() <= groups.max() < count:
            raise CorruptPacking(f"has inputs of groups that are not among its {count}")

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Outputs `first`.. of all inputs."""
        numbers = unpack_columns(rows, self.bits)
        groups = sides.get("weight_g_idx")
        if groups is None:
            groups = np.arange(numbers.shape[1]) // (self.group_size or max(1, numbers.shape[1]))
        zeros, scales = self._of_rows(first, len(rows), sides)
        return scaled(numbers, zeros[:, groups], scales[:, groups])

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """Eight bits do, and groups that lie across those of int4."""
        return self.bits > BITS or not fits_int4(self.group_size) or "weight_g_idx" in sides

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4 | None:
        """Outputs `first`.. of all inputs, if these were quantised in their order."""
        levels, size = unpack_columns(rows, self.bits), self.group_size
        groups, num_in = sides.get("weight_g_idx"), levels.shape[1]
        is_in_order = groups is None or bool(
            (groups == np.arange(num_in) // (size or num_in)).all()
        )
        if self.bits != BITS or not fits_int4(size) or not is_in_order:
            return None
        zeros, scales = (
            for_groups(each, size, num_in) for each in self._of_rows(first, len(rows), sides)
        )
        return Int4(levels, scales.astype(FLOAT16), zeros.astype(FLOAT16))

    def _of_rows(self, first: int, count: int, sides: Sides) -> tuple[HostArray, Floats]:
        """Zeros and scales [count, groups]."""
        scales = to_floats(sides["weight_scale"][first : first + count])
        if "weight_zero_point" not in sides:
            return np.full_like(scales, 1 << (self.bits - 1)), scales
        per_word = WORD_BITS // self.bits
        words = sides["weight_zero_point"][first // per_word : -(-(first + count) // per_word)]
        # Blocks of rows start with a whole word.
        return unpack_rows_of_words(words, self.bits)[:count], scales


@frozen
class WholeBytes:
    """Weights in int8, symmetric."""

    is_in_out = False
    row_weights = 1

    def find(self, names: Collection[str]) -> Iterator[PackedWeight]:
        """The weights among these tensors that have scales."""
        yield from find_by_parts(names, "weight", ("weight_scale",), (), self)

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """The tensor's, if it is int8 with scales for whole groups. Raises CorruptPacking."""
        if len(main.shape) != 2 or main.dtype != "I8":
            raise CorruptPacking(f"is {main.dtype} {list(main.shape)}, no int8 matrix")
        check_sides(sides)
        num_out, num_in = main.shape
        scale = sides["weight_scale"].shape
        is_for_outputs = len(scale) == 2 and scale[0] == num_out and scale[1] > 0
        if scale not in {(), (1,), (1, 1)} and not (is_for_outputs and num_in % scale[1] == 0):
            raise CorruptPacking(f"{[num_out, num_in]} has scales {list(scale)}")
        return num_out, num_in

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """Any numbers will do."""

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Outputs `first`.. of all inputs."""
        scales = to_floats(sides["weight_scale"])
        if scales.size == 1:
            return scaled(rows, 0, scales.reshape(1, 1))
        of_rows = scales[first : first + len(rows)]
        return scaled(rows, 0, np.repeat(of_rows, rows.shape[1] // scales.shape[1], axis=1))

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """They are in eight."""
        del sides
        return True

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4 | None:
        """They are in eight."""
        del first, rows, sides
        return None
