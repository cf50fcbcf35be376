"""Safetensors files read once, front to back: hashed, checked and copied in the same pass.

The host owns the disk and may swap or rewrite a file between two reads. So each file is opened
once, each byte is read once, and what was hashed is exactly what was copied. The format's source:
https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.dtypes import STORED_DTYPES, HostArray
from pipeline.errors import ModelError
from pipeline.files import is_file
from pipeline.progress import Meter, Progress
from pipeline.weights.checkpoint_index import INDEX_FILE, SINGLE_FILE, read_index
from pipeline.weights.read_ahead import PLACES, run_ahead
from pipeline.weights.tensor_sinks import Sink

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BLOCK_BYTES = 2 << 20  # read at a time: large enough for the disk, small beside any shard
ROWS_TOGETHER = 16  # blocks hold such a number of rows or a multiple, where so many fit
MAX_RANK = 8

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# Sizes and offsets beyond any file; without a bound their product could take for ever.
MAX_SIZE = 1 << 63


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a file's header; `start` and `end` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors in the order of their bytes; `raw` is the length field and the JSON."""

    raw: bytes
    tensors: tuple[StoredTensor, ...]


def weight_files(model_dir: Path) -> list[Path]:
    """The weight files of `model_dir`, sorted by name; raises ModelError when there are none."""
    return sorted(set(_index(model_dir).values()) or {model_dir / SINGLE_FILE})


def _index(model: Path) -> dict[str, Path]:
    """Tensor name -> file; empty for a directory of one. Raises ModelError.

    `model` may be a file, which then comes before what its directory holds.
    """
    if not is_file(model):
        return read_index(model)
    beside = model.parent
    found = dict.fromkeys(_names_of(beside / SINGLE_FILE), beside / SINGLE_FILE)
    if not found and is_file(beside / INDEX_FILE):
        found = read_index(beside)
    return found | dict.fromkeys(_names_of(model), model)


def _names_of(path: Path) -> list[str]:
    if not is_file(path):
        return []
    with _open(path) as file:
        return [tensor.name for tensor in read_header(file, path).tensors]


def hash_files(paths: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """SHA-256 of each file in hex, as sha256sum prints it. Raises ModelError."""
    meter = _meter(paths, progress)
    block = memoryview(bytearray(BLOCK_BYTES))
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with _open(path) as file:
            while count := _read_into(file, path, block):
                digest.update(block[:count])
                meter.add(count)
        digests.append(digest.hexdigest())
    return digests


def stored_names(model_dir: Path) -> Collection[str]:
    """Every tensor name in the model's files. Raises ModelError."""
    return _index(model_dir).keys() or tensor_sizes(model_dir).keys()


def stored_tensors(model_dir: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the model by name, read from the headers alone. Raises ModelError."""
    found = {}
    files = _index(model_dir) if is_file(model_dir) else {}
    for path in weight_files(model_dir):
        with _open(path) as file:
            tensors = read_header(file, path).tensors
        found.update({each.name: each for each in tensors if files.get(each.name, path) == path})
    return found


def tensor_sizes(model_dir: Path) -> Mapping[str, int]:
    """Bytes per tensor name. Raises ModelError."""
    return {name: each.end - each.start for name, each in stored_tensors(model_dir).items()}


def stage_files(model_dir: Path, names: Collection[str]) -> list[Path]:
    """The files that hold `names`, sorted by name: what a stage reads and a manifest hashes.

    Raises ModelError where an index does not list one of them.
    """
    files = _index(model_dir)
    if not files:
        return [model_dir / SINGLE_FILE]
    listing = model_dir if is_file(model_dir) else model_dir / INDEX_FILE
    for name in names:
        if name not in files:
            raise ModelError(f"{listing} lists no tensor {name}: fetch it again")
    return sorted({files[name] for name in names})


def load_tensors(
    model_dir: Path,
    destinations: Mapping[str, Sink],
    *,
    expected_hashes: Sequence[str] | None,
    progress: Progress | None = None,
) -> None:
    """Fill `destinations` (name in the files -> where it goes).

    With `expected_hashes`, one per file of `stage_files`, every byte of those files is hashed on
    the way; nothing may use the destinations before this returns. Raises ModelError.
    """
    required = {name for name, sink in destinations.items() if not sink.is_optional}
    paths = stage_files(model_dir, required)
    if expected_hashes is not None and len(expected_hashes) != len(paths):
        names = ", ".join(path.name for path in paths)
        raise ModelError(
            f"{len(expected_hashes)} weight hashes are given, but the stage reads {len(paths)} "
            f"files ({names}) of {model_dir}: write the manifest again for this model"
        )
    files = _index(model_dir) if is_file(model_dir) else {}
    missing = required
    meter = _meter(paths, progress)
    for index, path in enumerate(paths):
        expected = None if expected_hashes is None else expected_hashes[index]
        here = {name: to for name, to in destinations.items() if files.get(name, path) == path}
        missing -= _load_file(path, here, expected, meter)
    if missing:
        raise ModelError(
            f"{model_dir}: tensor {min(missing)} is missing ({len(missing)} in all): "
            "the model is incomplete or of another architecture"
        )
    for name, sink in destinations.items():
        if problem := sink.problem():
            raise ModelError(f"{model_dir}: tensor {name} {problem}")


def read_header(file: FileIO, path: Path) -> Header:
    """Parse and check the header of the safetensors `file`, which stands at its start.

    Raises ModelError unless the tensors fill the file exactly, without gap or overlap.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = _read_exactly(file, min(8, file_bytes))
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        raise ModelError(f"{path} is truncated: {file_bytes} bytes: fetch it again")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path} is corrupt: a header of {length} bytes: fetch it again")
    if length > file_bytes - 8:
        raise ModelError(
            f"{path} is truncated or corrupt: a header of {length} bytes in a file of "
            f"{file_bytes}: fetch it again"
        )
    raw = _read_exactly(file, length)
    try:
        tensors = parse_header_untrusted(raw)
    except CorruptHeader as error:
        raise ModelError(f"{path} is corrupt: {error}: fetch it again") from error
    promised = 8 + length + (tensors[-1].end if tensors else 0)
    if file_bytes != promised:
        what = "truncated" if file_bytes < promised else "too long"
        raise ModelError(
            f"{path} is {what}: {file_bytes} bytes, its header promises {promised}: fetch it again"
        )
    return Header(prefix + raw, tensors)


class CorruptHeader(Exception):
    """Why a header cannot be trusted; always translated to ModelError with the file's name."""


def parse_header_untrusted(raw: bytes) -> tuple[StoredTensor, ...]:
    """The tensors a header's JSON describes, in the order of their bytes. Raises CorruptHeader."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptHeader(f"its header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CorruptHeader("its header is not an object")
    entries.pop("__metadata__", None)
    tensors = sorted(
        (_stored_tensor(name, entry) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            raise CorruptHeader(
                f"tensor {tensor.name} starts at {tensor.start}, the one before ends at {position}"
            )
        position = tensor.end
    return tuple(tensors)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _stored_tensor(name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptHeader(f"tensor {name} is described by {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptHeader(f"tensor {name} has the unknown dtype {str(dtype)[:20]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise CorruptHeader(f"tensor {name} has the shape {str(shape)[:80]}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CorruptHeader(f"tensor {name} has the offsets {str(offsets)[:80]}")
    start, end = offsets
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != num_bytes:
        raise CorruptHeader(
            f"tensor {name} is {dtype} {shape}, {num_bytes} bytes, but spans {end - start}"
        )
    return StoredTensor(name, dtype, tuple(shape), start, end)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < MAX_SIZE for each in value
    )


class _Block(NamedTuple):
    """Whole rows of a tensor that is wanted, from row `first`; overwritten soon after."""

    stored: StoredTensor
    first: int
    data: memoryview


def _load_file(
    path: Path, destinations: Mapping[str, Sink], expected_hash: str | None, meter: Meter
) -> set[str]:
    """Copy what `destinations` wants from `path` and return the names found."""
    digest = None if expected_hash is None else hashlib.sha256()
    with _open(path) as file:
        header = read_header(file, path)
        meter.add(len(header.raw))
        if digest is not None:
            digest.update(header.raw)
        found = {stored.name: stored for stored in header.tensors if stored.name in destinations}
        for name, stored in found.items():
            _check_fits(path, stored, destinations[name])
        blocks = _read_blocks(file, path, header.tensors, found.keys(), digest, meter)
        with closing(run_ahead(blocks)) as ahead:
            for stored, first, data in ahead:
                destinations[stored.name].write(first, _rows(stored, data))
    if digest is not None and expected_hash is not None:
        _compare_hash(path, digest.hexdigest(), expected_hash)
    return set(found)


def _read_blocks(
    file: FileIO,
    path: Path,
    tensors: Iterable[StoredTensor],
    wanted: Collection[str],
    digest: "hashlib._Hash | None",
    meter: Meter,
) -> Iterator[_Block]:
    """All bytes in turn, hashed if there is a digest; those that are wanted as they come.

    A block's memory is used again for that `PLACES` later.
    """
    buffers = deque(bytearray(BLOCK_BYTES) for _ in range(PLACES))
    for stored in tensors:
        num_bytes = stored.end - stored.start
        is_wanted = stored.name in wanted
        if not is_wanted and digest is None:
            file.seek(num_bytes, os.SEEK_CUR)
            meter.add(num_bytes)
            continue
        # What is only hashed is not read by its own rows, which may be as large as the disk.
        row_bytes = num_bytes // max(1, stored.shape[0]) if is_wanted and stored.shape else 1
        for first, size in _spans(num_bytes, max(1, row_bytes)):
            if size > len(buffers[0]):
                buffers[0] = bytearray(size)
            data = memoryview(buffers[0])[:size]
            _fill(file, path, data)
            if digest is not None:
                digest.update(data)
            meter.add(size)
            if is_wanted:
                buffers.rotate(-1)
                yield _Block(stored, first, data)


def _spans(num_bytes: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, bytes) of blocks of whole rows, many at a time: kernels pack these together."""
    rows = max(1, BLOCK_BYTES // row_bytes)
    rows = rows // ROWS_TOGETHER * ROWS_TOGETHER or rows
    for start in range(0, num_bytes, rows * row_bytes):
        yield start // row_bytes, min(rows * row_bytes, num_bytes - start)


def _rows(stored: StoredTensor, block: memoryview) -> HostArray:
    return np.frombuffer(block, STORED_DTYPES[stored.dtype]).reshape(-1, *stored.shape[1:])


def _check_fits(path: Path, stored: StoredTensor, destination: Sink) -> None:
    if stored.shape != destination.shape:
        raise ModelError(
            f"{path}: tensor {stored.name} has shape {list(stored.shape)}, config.json means "
            f"{list(destination.shape)}: config and weights do not belong together"
        )
    if stored.dtype not in destination.dtypes:
        raise ModelError(
            f"{path}: tensor {stored.name} is stored as {stored.dtype}: "
            f"use weights in one of {', '.join(destination.dtypes)}"
        )


def _compare_hash(path: Path, actual: str, expected: str) -> None:
    if actual != expected.lower():
        raise ModelError(
            f"{path} has SHA-256 {actual}, expected {expected}: these are not the weights the "
            "manifest was written for: fetch them again, or write the manifest for this model"
        )


def _open(path: Path) -> FileIO:
    try:
        return FileIO(path, "r")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _read_exactly(file: FileIO, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    _fill(file, Path(str(file.name)), memoryview(buffer))
    return bytes(buffer)


def _fill(file: FileIO, path: Path, block: memoryview) -> None:
    position = 0
    while position < len(block):
        count = _read_into(file, path, block[position:])
        if not count:
            raise ModelError(f"{path} was truncated while it was read: fetch it again")
        position += count


def _read_into(file: FileIO, path: Path, block: memoryview) -> int:
    try:
        return file.readinto(block)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _meter(paths: Sequence[Path], progress: Progress | None) -> Meter:
    num_bytes = 0
    if progress is not None:
        with suppress(OSError):  # whoever reads the file says what is wrong with it
            num_bytes = sum(path.stat().st_size for path in paths)
    return Meter(num_bytes, progress)
