"""A GGUF file's head as that of any checkpoint: its tensors by the names that families know."""

from io import FileIO
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.gguf.architectures import ROPE_FACTORS, Meaning, meanings
from pipeline.gguf.block_types import BLOCK_TYPES
from pipeline.gguf.header import CorruptGguf, GgufTensor
from pipeline.gguf.model_files import read_head
from pipeline.weights.checkpoint_header import Header, StoredTensor
from pipeline.weights.packings.blocks import packed_name


def read_gguf_header(file: FileIO, path: Path) -> Header:
    """The head of `file`, which is left at its first tensor. Raises ModelError."""
    raw, head = read_head(file, path)
    try:
        known = {ROPE_FACTORS: Meaning(ROPE_FACTORS), **meanings(head)}
        tensors = tuple(
            _stored(tensor, known[tensor.name], head.num_bytes) for tensor in head.tensors
        )
    except CorruptGguf as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    return Header(raw, tensors)


def _stored(tensor: GgufTensor, meaning: Meaning, begin: int) -> StoredTensor:
    name, dtype, shape = meaning.name, tensor.dtype, tensor.shape
    if dtype in BLOCK_TYPES:
        if len(shape) != 2 or meaning.added:
            raise CorruptGguf(f"tensor {tensor.name} is {dtype}, which only matrices are")
        name, shape = packed_name(name, dtype), (shape[0], BLOCK_TYPES[dtype].row_bytes(shape[1]))
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
