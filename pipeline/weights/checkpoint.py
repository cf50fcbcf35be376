"""Weight files read once, front to back: hashed, checked and copied in the same pass.

The host owns the disk and may swap or rewrite a file between two reads. So each file is opened
once, each byte is read once, and what was hashed is exactly what was copied. Of packed weights the
scales are read before, and have to be the same then.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.dtypes import HostArray, to_floats
from pipeline.errors import ModelError
from pipeline.files import is_file
from pipeline.gguf.model_files import is_gguf
from pipeline.progress import Meter, Progress
from pipeline.weights.checkpoint_header import (
    RAW_DTYPES,
    StoredTensor,
    as_rows,
    fill,
    open_file,
    read_into,
)
from pipeline.weights.checkpoint_index import INDEX_FILE, SINGLE_FILE, read_index
from pipeline.weights.headers import read_any_header
from pipeline.weights.packings.base import PackedWeight
from pipeline.weights.packings.choice import Finder, find_packed
from pipeline.weights.quantization import SCALE_SUFFIX
from pipeline.weights.read_ahead import PLACES, run_ahead
from pipeline.weights.tensor_sinks import ROWS_TOGETHER, Sink
from pipeline.weights.unpacking import unpacking, weight_shape

PACKED = "packed"  # the dtype of what is no single tensor of a dtype
BLOCK_BYTES = 1 << 20  # read at a time: large enough for the disk, small enough for the caches


def weight_files(model_dir: Path) -> list[Path]:
    """The weight files of `model_dir`, sorted by name; raises ModelError when there are none."""
    return sorted(set(_index(model_dir).values()) or {_single(model_dir)})


def _single(model: Path) -> Path:
    """The file of a model that has one."""
    return model if is_gguf(model) else model / SINGLE_FILE


def _index(model: Path) -> dict[str, Path]:
    """Tensor name -> file; empty for a model of one. Raises ModelError.

    `model` may be a file: all of it, or what then comes before what its directory holds.
    """
    if is_gguf(model):
        return {}
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
    with open_file(path) as file:
        return [tensor.name for tensor in read_any_header(file, path).tensors]


def hash_files(paths: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """SHA-256 of each file in hex, as sha256sum prints it. Raises ModelError."""
    meter = _meter(paths, progress)
    block = memoryview(bytearray(BLOCK_BYTES))
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with open_file(path) as file:
            while count := read_into(file, path, block):
                digest.update(block[:count])
                meter.add(count)
        digests.append(digest.hexdigest())
    return digests


def has_weights(model_dir: Path) -> bool:
    """Whether there are weights beside a model's configuration."""
    return any(map(is_file, (model_dir, model_dir / SINGLE_FILE, model_dir / INDEX_FILE)))


def stored_names(model_dir: Path, packing: Finder | None = None) -> Collection[str]:
    """The name of every tensor of the model's, packed ones by what they are. Raises ModelError."""
    files = _names_in_files(model_dir)
    packed = find_packed(files, packing)
    return files - _parts(packed) | packed.keys()


def stored_tensors(model_dir: Path, packing: Finder | None = None) -> Mapping[str, StoredTensor]:
    """Every tensor of the model by name, read from the headers alone. Raises ModelError.

    A packed one is `PACKED`, has the shape of what it means, and spans as many bytes as its parts.
    """
    raw = tensors_in_files(model_dir)
    packed = find_packed(raw, packing)
    parts = _parts(packed)
    found = {name: stored for name, stored in raw.items() if name not in parts}
    for name, weight in packed.items():
        num_bytes = sum(raw[part].end - raw[part].start for part in weight.parts)
        shape = weight_shape(model_dir, weight, raw)
        found[name] = StoredTensor(name, PACKED, shape, 0, num_bytes)
    return found


def tensors_in_files(model_dir: Path) -> Mapping[str, StoredTensor]:
    """Every tensor by its name in the files, the parts of packed ones too. Raises ModelError."""
    found = {}
    files = _index(model_dir) if is_file(model_dir) else {}
    for path in weight_files(model_dir):
        with open_file(path) as file:
            tensors = read_any_header(file, path).tensors
        found.update({each.name: each for each in tensors if files.get(each.name, path) == path})
    return found


def packed_weights(model_dir: Path, packing: Finder | None = None) -> Mapping[str, PackedWeight]:
    """The model's packed weights by name. Raises ModelError."""
    return find_packed(_names_in_files(model_dir), packing)


def names_beyond_int4(model_dir: Path, packing: Finder | None = None) -> Collection[str]:
    """The weights that a model in int4 holds in int8: they come in more bits. Raises ModelError."""
    stored = tensors_in_files(model_dir)
    in_int8 = {
        name
        for name, each in stored.items()
        if each.dtype == "I8" and name + SCALE_SUFFIX in stored
    }
    packed = find_packed(stored, packing).items()
    return in_int8 | {name for name, weight in packed if weight.exceeds_int4}


def _names_in_files(model_dir: Path) -> set[str]:
    return set(_index(model_dir) or tensors_in_files(model_dir))


def _parts(packed: Mapping[str, PackedWeight]) -> set[str]:
    return {part for weight in packed.values() for part in weight.parts}


def tensor_sizes(model_dir: Path, packing: Finder | None = None) -> Mapping[str, int]:
    """Bytes per tensor name. Raises ModelError."""
    stored = stored_tensors(model_dir, packing)
    return {name: each.end - each.start for name, each in stored.items()}


def stage_files(
    model_dir: Path, names: Collection[str], packing: Finder | None = None
) -> list[Path]:
    """The files that hold `names`, sorted by name: what a stage reads and a manifest hashes.

    Raises ModelError where an index does not list one of them.
    """
    files = _index(model_dir)
    if not files:
        return [_single(model_dir)]
    packed = find_packed(files, packing)
    listing = model_dir if is_file(model_dir) else model_dir / INDEX_FILE
    parts = {part for name in names for part in (packed[name].parts if name in packed else (name,))}
    for name in parts:
        if name not in files:
            raise ModelError(f"{listing} lists no tensor {name}: fetch it again")
    return sorted({files[name] for name in parts})


def load_tensors(
    model_dir: Path,
    destinations: Mapping[str, Sink],
    *,
    expected_hashes: Sequence[str] | None,
    progress: Progress | None = None,
    packing: Finder | None = None,
    is_as_packed: bool = False,
) -> None:
    """Fill `destinations` (name -> where it goes); packed weights come as the numbers they mean.

    `packing` is the configuration's, here as everywhere in this module.

    With `expected_hashes`, one per file of `stage_files`, every byte of those files is hashed on
    the way; nothing may use the destinations before this returns. `is_as_packed`: names are those
    in the files, and nothing is unpacked. Raises ModelError.
    """
    required = {name for name, sink in destinations.items() if not sink.is_optional}
    paths = stage_files(model_dir, required, packing)
    if expected_hashes is not None and len(expected_hashes) != len(paths):
        names = ", ".join(path.name for path in paths)
        raise ModelError(
            f"{len(expected_hashes)} weight hashes are given, but the stage reads {len(paths)} "
            f"files ({names}) of {model_dir}: write the manifest again for this model"
        )
    if not is_as_packed:
        destinations = _unpacked(packed_weights(model_dir, packing), destinations, paths)
    _load_files(model_dir, paths, destinations, expected_hashes, _meter(paths, progress))
    for name, sink in destinations.items():
        if problem := sink.problem():
            raise ModelError(f"{model_dir}: tensor {name} {problem}")


def _unpacked(
    known: Mapping[str, PackedWeight], destinations: Mapping[str, Sink], paths: Sequence[Path]
) -> Mapping[str, Sink]:
    """By the names in the files."""
    packed = {name: known[name] for name in destinations if name in known}
    if not packed:
        return destinations
    # int8 of our own has scales of another shape.
    gone = packed.keys() | {name + SCALE_SUFFIX for name in packed}
    own = {name: sink for name, sink in destinations.items() if name not in gone}
    return own | unpacking(packed, destinations, paths)


def _load_files(
    model_dir: Path,
    paths: Sequence[Path],
    destinations: Mapping[str, Sink],
    expected_hashes: Sequence[str] | None,
    meter: Meter,
) -> None:
    files = _index(model_dir) if is_file(model_dir) else {}
    missing = {name for name, sink in destinations.items() if not sink.is_optional}
    for index, path in enumerate(paths):
        expected = None if expected_hashes is None else expected_hashes[index]
        here = {name: to for name, to in destinations.items() if files.get(name, path) == path}
        missing -= _load_file(path, here, expected, meter)
    if missing:
        raise ModelError(
            f"{model_dir}: tensor {min(missing)} is missing ({len(missing)} in all): "
            "the model is incomplete or of another architecture"
        )


class _Block(NamedTuple):
    """Whole rows of a tensor that is wanted, from row `first`; overwritten soon after.

    Or of no tensor: bytes that are only hashed.
    """

    stored: StoredTensor | None
    first: int
    data: memoryview


def _load_file(
    path: Path, destinations: Mapping[str, Sink], expected_hash: str | None, meter: Meter
) -> set[str]:
    """Copy what `destinations` wants from `path` and return the names found."""
    digest = None if expected_hash is None else hashlib.sha256()
    with open_file(path) as file:
        header = read_any_header(file, path)
        meter.add(len(header.raw))
        if digest is not None:
            digest.update(header.raw)
        found = {stored.name: stored for stored in header.tensors if stored.name in destinations}
        for name, tensor in found.items():
            _check_fits(path, tensor, destinations[name])
        blocks = _read_blocks(
            file, path, header.tensors, found.keys(), meter, is_whole=digest is not None
        )
        with ExitStack() as stack:
            ahead = stack.enter_context(closing(run_ahead(blocks)))
            if digest is not None:  # by a thread that does nothing else: it takes the longest
                ahead = stack.enter_context(closing(run_ahead(_hashed(ahead, digest))))
            for stored, first, data in ahead:
                if stored is not None:
                    destinations[stored.name].write(first, _rows(stored, data))
    if digest is not None and expected_hash is not None:
        _compare_hash(path, digest.hexdigest(), expected_hash)
    return set(found)


def _hashed(blocks: Iterator[_Block], digest: "hashlib._Hash") -> Iterator[_Block]:
    for block in blocks:
        digest.update(block.data)
        yield block


def _read_blocks(
    file: FileIO,
    path: Path,
    tensors: Iterable[StoredTensor],
    wanted: Collection[str],
    meter: Meter,
    *,
    is_whole: bool,
) -> Iterator[_Block]:
    """What is wanted, block by block; with `is_whole` all other bytes too, each in its turn.

    A block's memory is used again for that twice `PLACES` later: it is hashed, and then packed.
    """
    buffers = deque(bytearray(BLOCK_BYTES) for _ in range(2 * PLACES))

    def read(stored: StoredTensor | None, first: int, size: int) -> _Block:
        if size > len(buffers[0]):
            buffers[0] = bytearray(size)
        data = memoryview(buffers[0])[:size]
        fill(file, path, data)
        meter.add(size)
        buffers.rotate(-1)
        return _Block(stored, first, data)

    def pass_over(num_bytes: int) -> Iterator[_Block]:
        if not is_whole:
            file.seek(num_bytes, os.SEEK_CUR)
            meter.add(num_bytes)
            return
        for start in range(0, num_bytes, BLOCK_BYTES):
            yield read(None, 0, min(BLOCK_BYTES, num_bytes - start))

    position = 0
    for stored in tensors:
        yield from pass_over(stored.start - position)
        position, num_bytes = stored.end, stored.end - stored.start
        # What is only hashed is not read by its own rows, which may be as large as the disk.
        if stored.name not in wanted:
            yield from pass_over(num_bytes)
            continue
        for first, size in _spans(stored, num_bytes):
            yield read(stored, first, size)
    if is_whole:  # a file may be padded
        yield from pass_over(os.fstat(file.fileno()).st_size - file.tell())


def _spans(stored: StoredTensor, num_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, bytes) of blocks of whole rows, many at a time: kernels pack these together.

    Of a stack, those of one matrix at a time.
    """
    num_rows = as_rows(stored.shape)[0] if stored.shape else 1
    row_bytes = max(1, num_bytes // max(1, num_rows))
    of_matrix = num_bytes // max(1, stored.shape[0]) if len(stored.shape) > 2 else num_bytes
    together = math.lcm(ROWS_TOGETHER, max(1, stored.pair_rows))
    most = max(1, BLOCK_BYTES // row_bytes // together) * together * row_bytes
    for matrix in range(0, num_bytes, max(1, of_matrix)):
        for start in range(matrix, matrix + of_matrix, most):
            yield start // row_bytes, min(most, matrix + of_matrix - start)


def _rows(stored: StoredTensor, block: memoryview) -> HostArray:
    rows = np.frombuffer(block, RAW_DTYPES[stored.dtype]).reshape(-1, *as_rows(stored.shape)[1:])
    if stored.pair_rows:
        pairs = rows.reshape(-1, stored.pair_rows // 2, 2, *stored.shape[1:])
        rows = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
    return to_floats(rows) - np.float32(stored.added) if stored.added else rows


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


def _meter(paths: Sequence[Path], progress: Progress | None) -> Meter:
    num_bytes = 0
    if progress is not None:
        with suppress(OSError):  # whoever reads the file says what is wrong with it
            num_bytes = sum(path.stat().st_size for path in paths)
    return Meter(num_bytes, progress)
