"""What a packing has to say of itself."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from pipeline.dtypes import Floats, HostArray
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import Int4
from pipeline.weights.quantization import GROUP
from transport.frozen import frozen

# Names of a weight's tensors below its own, such as `scales` -> what that holds.
Sides = Mapping[str, HostArray]


class CorruptPacking(Exception):
    """Why tensors make no weight; always translated to ModelError with the file's name."""


class Packing(Protocol):
    """How a weight [out, in] lies in a tensor, with others beside it that say what it means.

    Or a stack of them, [n, out, in]: its tensor's rows are those of all of them.
    """

    @property
    def is_in_out(self) -> bool:
        """Whether the tensor's rows are inputs, and not outputs."""

    @property
    def row_weights(self) -> int:
        """How many rows of weights a row of the tensor has."""

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """(out, in) of the weight. Raises CorruptPacking for tensors that do not fit each other."""

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """Raises CorruptPacking for sides by which a weight of that shape cannot be unpacked."""

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """The weights of rows of the tensor, from `first` on: [n * row_weights, ...]."""

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """Whether int4 would lose what eight bits keep, by the sides there are."""

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4 | None:
        """The same weights in four bits, if they are such in groups that fit; else None.

        Where the tensor's rows are inputs, so are those of all three.
        """


_FLOATS, _WORDS, _INDICES = ("F32", "F16", "BF16"), ("I32",), ("I32", "I64")
# What each side may be stored as.
_DTYPES = {
    "scales": _FLOATS,
    "weight_scale": _FLOATS,
    "qzeros": _WORDS,
    "weight_zero_point": _WORDS,
    "g_idx": _INDICES,
    "weight_g_idx": _INDICES,
    "weight_shape": _INDICES,
    "int4_scale": ("F16",),
    "int4_zero": ("F16",),
}


def check_sides(sides: Mapping[str, StoredTensor], **shapes: tuple[int, ...]) -> None:
    """Raises CorruptPacking for a side of another type than it may have, or of another shape."""
    for name, side in sides.items():
        if side.dtype not in _DTYPES[name]:
            raise CorruptPacking(
                f"has {name} of {side.dtype}, and it may be {' or '.join(_DTYPES[name])}"
            )
    for name, shape in shapes.items():
        if sides[name].shape != shape:
            raise CorruptPacking(
                f"has {name} of shape {list(sides[name].shape)}, and its own means {list(shape)}"
            )


@frozen
class PackedWeight:
    """A weight by the names of its tensors: rows of `main` are its own, `sides` are read first."""

    name: str
    main: str
    sides: Mapping[str, str]
    packing: Packing

    @property
    def exceeds_int4(self) -> bool:
        """Whether a model in int4 holds it in int8."""
        return self.packing.exceeds_int4(self.sides)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all of its tensors."""
        return (self.main, *self.sides.values())


def fits_int4(group_size: int | None) -> bool:
    """Whether groups of so many inputs are such as int4 has, or several of these."""
    return group_size is None or group_size % GROUP == 0


def find_by_parts(
    names: Collection[str],
    main: str,
    needed: Sequence[str],
    optional: Sequence[str],
    packing: Packing,
) -> Iterator[PackedWeight]:
    """Weights STEM.weight of tensors STEM.main, STEM.SIDE and so on."""
    for name in names:
        stem = name.removesuffix(f".{main}")
        if stem == name or not all(f"{stem}.{side}" in names for side in needed):
            continue
        sides = [*needed, *(side for side in optional if f"{stem}.{side}" in names)]
        found = {side: f"{stem}.{side}" for side in sides}
        yield PackedWeight(f"{stem}.weight", name, found, packing)
