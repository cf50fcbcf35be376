"""A GGUF file's head as that of any checkpoint: its tensors by the names that families know."""

from io import FileIO
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.gguf.architectures import Meaning, meanings
from pipeline.gguf.block_types import BLOCK_TYPES, ROW_TYPES
from pipeline.gguf.header import CorruptGguf, shown
from pipeline.gguf.made_files import read_head
from pipeline.weights.checkpoint_header import Header, StoredTensor
from pipeline.weights.packings.blocks import packed_name


def read_gguf_header(file: FileIO, path: Path) -> Header:
    """The head of `file`, which is left at its first tensor. Raises ModelError."""
    raw, head = read_head(file, path)
    try:
        tensors = tuple(_stored(meaning, head.num_bytes) for meaning in meanings(head))
    except CorruptGguf as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    return Header(raw, tensors)


def _stored(meaning: Meaning, begin: int) -> StoredTensor:
    tensor = meaning.tensor
    name, dtype, shape = meaning.name, tensor.dtype, tensor.shape
    # What lies the other way round than in checkpoints is turned where packed rows are.
    if dtype in BLOCK_TYPES or meaning.is_turned:
        if len(shape) != 2 or meaning.added:
            raise CorruptGguf(f"tensor {shown(tensor.name)} is {dtype}, which only matrices are")
        name, shape = packed_name(name, dtype), (shape[0], ROW_TYPES[dtype].row_bytes(shape[1]))
        dtype = "U8"
    return StoredTensor(
        name,
        dtype,
        shape,
        tensor.start - begin,
        tensor.end - begin,
        pair_rows=meaning.pair_rows,
        added=meaning.added,
    )
