"""GGUF's blocks: rows of outputs, each a whole number of blocks with their scales inside.

The packed rows of weight NAME are a tensor of bytes called NAME.TYPE, such as
`model.layers.0.mlp.up_proj.weight.Q4_K`: in a shard's safetensors, and here of a GGUF file.
"""

from collections.abc import Collection, Iterator, Mapping

from pipeline.dtypes import Floats, HostArray
from pipeline.gguf.block_types import BLOCK_TYPES, ROW_TYPES, int4_of_rows, unpack_rows
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import Int4
from pipeline.weights.packings.base import CorruptPacking, PackedWeight, Sides
from transport.frozen import frozen

# Of a weight, with its share of its group's scale and zero.
INT4_BITS = 5


@frozen
class Blocks:
    """Rows of blocks of one type."""

    type_name: str
    is_in_out = False
    row_weights = 1

    def shape(self, main: StoredTensor, sides: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """As many blocks as fill a row. Raises CorruptPacking."""
        del sides
        kind = ROW_TYPES[self.type_name]
        if main.dtype != "U8" or len(main.shape) != 2 or main.shape[1] % kind.num_bytes:
            raise CorruptPacking(
                f"is {main.dtype} {list(main.shape)}, no rows of {self.type_name} blocks"
            )
        return main.shape[0], main.shape[1] // kind.num_bytes * kind.size

    def check(self, shape: tuple[int, ...], sides: Sides) -> None:
        """There are none."""

    def unpack(self, first: int, rows: HostArray, sides: Sides) -> Floats:
        """Each block by itself."""
        del first, sides
        return unpack_rows(ROW_TYPES[self.type_name], rows)

    def exceeds_int4(self, sides: Collection[str]) -> bool:
        """Blocks of more bits do; floats are rounded as any are, and so are MXFP4's."""
        del sides
        kind = BLOCK_TYPES.get(self.type_name)
        return kind is not None and kind.num_bytes * 8 > INT4_BITS * kind.size

    def int4(self, first: int, rows: HostArray, sides: Sides) -> Int4 | None:
        """The types of four bits."""
        del first, sides
        found = int4_of_rows(ROW_TYPES[self.type_name], rows)
        return None if found is None else Int4(*found)


def packed_name(name: str, type_name: str) -> str:
    """What the rows of weight `name` are called that are blocks of a type."""
    return f"{name}.{type_name}"


def find_blocks(names: Collection[str]) -> Iterator[PackedWeight]:
    """The weights among these tensors that are blocks."""
    for name in names:
        weight, _, type_name = name.rpartition(".")
        if weight and type_name in ROW_TYPES:
            yield PackedWeight(weight, name, {}, Blocks(type_name))
