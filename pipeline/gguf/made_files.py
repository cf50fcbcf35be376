"""What a directory's files would say, made of a GGUF file's metadata."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np

from pipeline.dtypes import FLOAT32
from pipeline.errors import ModelError
from pipeline.gguf.architectures import config_fields
from pipeline.gguf.configurations import ROPE_FACTORS, Factors
from pipeline.gguf.header import (
    MAX_HEAD_BYTES,
    CorruptGguf,
    GgufHead,
    MoreNeeded,
    parse_head_untrusted,
)
from pipeline.gguf.vocabulary import TOKENS, tokenizer_config_fields, tokenizer_fields

FIRST_READ = 8 << 20  # holds most heads; longer ones are read again, four times as much
MAX_ROPE_FACTORS = 1 << 14


def read_head(file: FileIO, path: Path) -> tuple[bytes, GgufHead]:
    """The head of `file`, and its bytes up to the first tensor, where the file then stands.

    Raises ModelError.
    """
    try:
        file_bytes, size = file.seek(0, 2), FIRST_READ
        while True:
            file.seek(0)
            data = _read(file, min(size, file_bytes, MAX_HEAD_BYTES))
            try:
                head = parse_head_untrusted(data, file_bytes)
                break
            except MoreNeeded:
                size *= 4
        file.seek(head.num_bytes)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except CorruptGguf as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return data[: head.num_bytes], head


def _read(file: FileIO, size: int) -> bytes:
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def made_file(model: Path, name: str) -> bytes | None:
    """That file; None where the metadata has nothing for it. Raises ModelError."""
    try:
        state = model.stat()
    except OSError as error:
        raise ModelError(f"cannot read {model}: {error.strerror}") from error
    # The same file as before has not to be read again for each of these.
    now = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return _made_of(model, name, now) if name in _MADE else None


@lru_cache(maxsize=8)
def _made_of(model: Path, name: str, state: tuple[int, ...]) -> bytes | None:
    del state
    try:
        with FileIO(model, "r") as file:
            _, head = read_head(file, model)
            fields = _MADE[name](head, file)
    except OSError as error:
        raise ModelError(f"cannot read {model}: {error.strerror}") from error
    except CorruptGguf as error:
        raise ModelError(f"{model} cannot be used: {error}") from error
    if fields is None:
        return None
    return json.dumps(fields, ensure_ascii=False).encode()


def _config(head: GgufHead, file: FileIO) -> Mapping[str, object]:
    return config_fields(head, _rope_factors(head, file))


def _rope_factors(head: GgufHead, file: FileIO) -> Factors:
    found = {}
    for tensor in head.tensors:
        if tensor.name in ROPE_FACTORS:
            if tensor.dtype != "F32" or tensor.end - tensor.start > 4 * MAX_ROPE_FACTORS:
                raise CorruptGguf(f"its {tensor.name} is {tensor.dtype} {list(tensor.shape)}")
            file.seek(tensor.start)
            raw = _read(file, tensor.end - tensor.start)
            if len(raw) < tensor.end - tensor.start:
                raise CorruptGguf("it is truncated")
            found[tensor.name] = np.frombuffer(raw, FLOAT32)
    return found


def _tokenizer(head: GgufHead, file: FileIO) -> Mapping[str, object] | None:
    del file
    return tokenizer_fields(head.metadata) if TOKENS in head.metadata else None


def _tokenizer_config(head: GgufHead, file: FileIO) -> Mapping[str, object] | None:
    del file
    return tokenizer_config_fields(head.metadata) if TOKENS in head.metadata else None


_MADE: Mapping[str, Callable[[GgufHead, FileIO], Mapping[str, object] | None]] = {
    "config.json": _config,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
}
