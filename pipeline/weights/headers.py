"""The header of a weight file, whatever its format."""

from io import FileIO
from pathlib import Path

from pipeline.gguf.model_files import SUFFIX
from pipeline.weights.checkpoint_header import Header, read_header


def read_any_header(file: FileIO, path: Path) -> Header:
    """The header of `file`, which is left at its first tensor. Raises ModelError."""
    if path.suffix != SUFFIX:
        return read_header(file, path)
    from pipeline.weights.gguf_header import read_gguf_header  # noqa: PLC0415 (most are not)

    return read_gguf_header(file, path)
