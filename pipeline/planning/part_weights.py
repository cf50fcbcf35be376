"""The tensors of a part of a model as its file holds them: in a precision, plain or rotated."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    STORED_DTYPES,
    UINT8,
    ArrayDType,
    HostArray,
    Precision,
)
from pipeline.errors import ModelError
from pipeline.kernels.conversion import choose_conversion
from pipeline.kernels.huge_pages import Arena, reserve
from pipeline.models.config import (
    CONFIG_FILE,
    as_rotated,
    read_config,
    rotated_json,
    unpacked_json,
)
from pipeline.models.ends import Ends
from pipeline.models.model_config import ModelConfig
from pipeline.models.registry import (
    plan_tensors,
    required_tensors,
    stored_as,
)
from pipeline.models.stored_model import family_of
from pipeline.planning.rotated_weights import RotatedWeights
from pipeline.progress import Progress
from pipeline.weights.checkpoint import (
    NO_PIECES,
    PACKED,
    load_tensors,
    packed_weights,
    stored_tensors,
    tensors_in_files,
)
from pipeline.weights.checkpoint_header import RAW_DTYPES, StoredTensor
from pipeline.weights.file_pieces import Pieces
from pipeline.weights.int4 import Int4, pack_nibbles
from pipeline.weights.packings.base import PackedWeight
from pipeline.weights.packings.choice import stays_packed
from pipeline.weights.packings.own import OWN_PARTS
from pipeline.weights.quantization import GROUP, SCALE_SUFFIX, num_groups
from pipeline.weights.read_ahead import run_ahead
from pipeline.weights.tensor_sinks import FLOATS, CopySink, Sink, WeightSink
from pipeline.weights.tensor_stacks import StackSink
from pipeline.weights.verified_file import MAX_LANES

HEADER_ALIGNMENT = 8  # of a safetensors file, so that its tensors are aligned
BLOCK_BYTES = 2 << 20  # hashed at a time, while those before are written


class Part(NamedTuple):
    """What a directory holds of the model, and what the manifest says of the source's weights."""

    layers: range
    ends: Ends | None
    precision: Precision | None
    weight_hashes: tuple[str, ...] = ()
    pieces: Mapping[str, Pieces] = NO_PIECES


@dataclass(frozen=True, slots=True)
class Source:
    """The model that is cut, and the rotation that its parts get, if any.

    `is_unpacked`: none of them keeps packed weights as they are.
    """

    model_dir: Path
    rotation: SecretRotation | None = None
    is_unpacked: bool = False

    def config_json(self) -> bytes:
        """The config.json of its parts. Raises ModelError."""
        raw = read_config(self.model_dir)
        if self.is_unpacked:
            raw = unpacked_json(raw, self.model_dir / CONFIG_FILE)
        return raw if self.rotation is None else rotated_json(raw, self.rotation.fingerprint)


def part_tensors(
    source: Source, config: ModelConfig, part: Part, progress: Progress | None
) -> dict[str, HostArray]:
    """All tensors of a part, by name, in its precision or as they are stored; rotated ones in F32.

    `config` is the source's. Every byte is held against the part's hashes, if there are any.
    Raises ModelError.
    """
    make = _as_stored if source.rotation is None else _rotated
    kept = make(source, config, part, progress)
    return {name: tensor for each in kept for name, tensor in each.tensors().items()}


def _arena() -> Arena:
    """What is written once is in pages of the usual size: room for huge ones can take seconds."""
    return Arena(lambda size: reserve((size,), UINT8))


def _as_stored(
    source: Source, config: ModelConfig, part: Part, progress: Progress | None
) -> "list[_AnyKept]":
    model_dir, arena = source.model_dir, _arena()
    precision = part.precision or "float32"
    planned = required_tensors(model_dir, config, part.layers, part.ends, precision)
    known = packed_weights(model_dir, config.packing)
    packed = {name: known[name] for name in planned if name in known}
    if packed and (part.precision in {None, "float32"} or stays_packed(config.packing)):
        return _as_packed(source, planned, packed, part, progress)
    stored = stored_tensors(model_dir, config.packing)
    kept = {
        name: _keep(stored[name], sink, model_dir, arena)
        for name, sink in planned.items()
        if name in stored  # load_tensors names what is missing
    }
    sinks = {**planned, **{name: each.sink for name, each in kept.items()}}
    load_tensors(
        model_dir,
        sinks,
        expected_hashes=part.weight_hashes or None,
        pieces=part.pieces,
        num_threads=MAX_LANES,
        progress=progress,
        packing=config.packing,
    )
    return list(kept.values())


def _as_packed(
    source: Source,
    planned: Mapping[str, Sink],
    packed: Mapping[str, PackedWeight],
    part: Part,
    progress: Progress | None,
) -> "list[_AnyKept]":
    """Packed weights by the tensors they are made of, and the others in the part's precision."""
    model_dir, arena = source.model_dir, _arena()
    stored = tensors_in_files(model_dir)
    parts = {part for weight in packed.values() for part in weight.parts}
    kept: dict[str, _AnyKept] = {}
    needed = {name for name, sink in planned.items() if not sink.is_optional}
    for name in parts | (needed - packed.keys()):
        if name not in stored:
            raise ModelError(f"{model_dir}: tensor {name} is missing: fetch the model again")
        if name in parts:
            kept[name] = _Kept(stored[name], RAW_DTYPES[stored[name].dtype], arena)
        else:
            kept[name] = _keep(stored[name], planned[name], model_dir, arena)
    load_tensors(
        model_dir,
        {name: each.sink for name, each in kept.items()},
        expected_hashes=part.weight_hashes or None,
        pieces=part.pieces,
        num_threads=MAX_LANES,
        progress=progress,
        is_as_packed=True,
    )
    return list(kept.values())


def _rotated(
    source: Source, config: ModelConfig, part: Part, progress: Progress | None
) -> "list[_AnyKept]":
    assert source.rotation is not None
    rotated, precision = (
        as_rotated(config, source.rotation.fingerprint),
        part.precision or "float32",
    )
    planned = plan_tensors(rotated, part.layers, part.ends, precision)
    kept, arena = [], _arena()
    for name, tensor in _rotate(source, source.rotation, config, part, progress):
        stored = StoredTensor(name, "F32", tensor.shape, 0, tensor.nbytes)
        kept.append(_keep(stored, planned[name], source.model_dir, arena))
        kept[-1].sink.write(0, tensor)
    return kept


def _rotate(
    source: Source,
    rotation: SecretRotation,
    config: ModelConfig,
    part: Part,
    progress: Progress | None,
) -> Iterator[tuple[str, HostArray]]:
    names, stream = family_of(config).names, family_of(config).stream
    if stream is None:
        raise ModelError(
            f"the weights of {config.architecture} models cannot be rotated: what lies between "
            "rows of the stream and linears, norms behind a branch or a router, is no rotation's"
        )
    if packed_weights(source.model_dir, config.packing):
        raise ModelError(
            f"the weights of {source.model_dir} are packed in a few bits, which a rotation would "
            "undo: rotate the model that they were made of"
        )
    files = stored_as(source.model_dir, config, part.layers, part.ends)
    planned = required_tensors(source.model_dir, config, part.layers, part.ends)
    read = {own: np.empty(planned[name].shape, FLOAT32) for own, name in files.items()}
    load_tensors(
        source.model_dir,
        {files[own]: CopySink(tensor) for own, tensor in read.items()},
        expected_hashes=part.weight_hashes or None,
        pieces=part.pieces,
        num_threads=MAX_LANES,
        progress=progress,
    )
    weights = RotatedWeights(names, stream, rotation)
    for index in part.layers:
        yield from weights.layer(read, index).items()
    if part.ends is not None and any(part.ends):
        yield from weights.ends(read)


def save_tensors(tensors: Mapping[str, HostArray], path: Path) -> str:
    """Write a safetensors file, as the library of that name does: wide formats first, by name.

    Returns its SHA-256 in hex: of what was meant to be written, so a disk that errs is found out.
    """
    names = {dtype: name for name, dtype in RAW_DTYPES.items()}
    order = [RAW_DTYPES[name] for name in ("I64", "F32", "I32", "BF16", "F16", "I8", "U8")]
    sorted_tensors = sorted(tensors.items(), key=lambda each: (order.index(each[1].dtype), each[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted_tensors:
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % HEADER_ALIGNMENT)
    begin = np.frombuffer(len(raw).to_bytes(8, "little") + raw, np.uint8)
    contents = (begin, *(tensor.reshape(-1).view(np.uint8) for _, tensor in sorted_tensors))
    digest = hashlib.sha256()

    def hashed() -> Iterator[memoryview]:
        for each in contents:
            for first in range(0, len(each), BLOCK_BYTES):
                block = each[first : first + BLOCK_BYTES].data
                digest.update(block)
                yield block

    with path.open("wb") as file, closing(run_ahead(hashed())) as blocks:
        file.writelines(blocks)
    return digest.hexdigest()


class _Kept:
    """A tensor on its way into a shard: as stored, or rounded to another float."""

    def __init__(
        self, stored: StoredTensor, dtype: ArrayDType, arena: Arena, *, is_in_out: bool = False
    ) -> None:
        self._name = stored.name
        target = arena.array(stored.shape, dtype)
        fill, dtypes = choose_conversion().fill, (stored.dtype, *FLOATS)
        self.sink: Sink = CopySink(target, dtypes, fill=fill, is_in_out=is_in_out)

    def tensors(self) -> Mapping[str, HostArray]:
        """What the shard stores, by name."""
        assert isinstance(self.sink, CopySink)
        return {self._name: self.sink.target}


class _KeptInt8:
    """A matrix on its way into a shard as int8, in the layout it came in."""

    precision: Precision = "int8"

    def __init__(self, stored: StoredTensor, arena: Arena, *, is_in_out: bool) -> None:
        rows, columns = stored.shape
        num_out, num_in = (columns, rows) if is_in_out else (rows, columns)
        self._name = stored.name
        self._values = arena.array((num_out, num_in), INT8)
        self._scales = arena.array((num_out, num_groups(num_in)), BFLOAT16)
        self._is_in_out = is_in_out
        self._quantise = choose_conversion().quantise
        self.sink: Sink = WeightSink(self, 0, num_out, num_in, is_in_out=is_in_out)

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Keep outputs first.., of inputs first_in.., in int8."""
        rows, last_in = slice(first, first + len(outputs)), first_in + outputs.shape[1]
        own = self._values[rows, first_in:last_in]
        own_scales = self._scales[rows, first_in // GROUP : num_groups(last_in)]
        if scales is None:
            self._quantise(outputs, own, own_scales)
        else:
            own[...], own_scales[...] = outputs, scales

    def tensors(self) -> Mapping[str, HostArray]:
        """What the shard stores, by name."""
        values = np.ascontiguousarray(self._values.T) if self._is_in_out else self._values
        return {self._name: values, self._name + SCALE_SUFFIX: self._scales}


class _KeptInt4:
    """A matrix on its way into a shard as int4: outputs of inputs, whatever it came as."""

    precision: Precision = "int4"

    def __init__(self, stored: StoredTensor, arena: Arena, *, is_in_out: bool) -> None:
        rows, columns = stored.shape
        num_out, num_in = (columns, rows) if is_in_out else (rows, columns)
        groups = num_groups(num_in)
        self._name = stored.name
        self._packed = arena.array((num_out, num_in // 2), UINT8)
        self._sides = [arena.array((num_out, groups), FLOAT16) for _ in range(2)]
        self._quantise = choose_conversion().quantise_int4
        self.sink: Sink = WeightSink(self, 0, num_out, num_in, is_in_out=is_in_out)

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Keep outputs first.., of inputs first_in.., in int4."""
        assert scales is None, "int8 is no source of int4"
        self.put_int4(first, self._quantise(outputs), first_in=first_in)

    def put_int4(self, first: int, weights: Int4, *, first_in: int = 0) -> None:
        """The same, of four bits."""
        rows, last_in = slice(first, first + len(weights.levels)), first_in + weights.num_in
        self._packed[rows, first_in // 2 : last_in // 2] = pack_nibbles(weights.levels)
        for kept, own in zip(self._sides, (weights.scales, weights.zeros), strict=True):
            kept[rows, first_in // GROUP : num_groups(last_in)] = own

    def tensors(self) -> Mapping[str, HostArray]:
        """What the shard stores, by name."""
        stem = self._name.removesuffix(".weight")
        return {
            f"{stem}.{part}": tensor
            for part, tensor in zip(OWN_PARTS, (self._packed, *self._sides), strict=True)
        }


_AnyKept = _Kept | _KeptInt8 | _KeptInt4


def _keep(stored: StoredTensor, planned: Sink, model_dir: Path, arena: Arena) -> _AnyKept:
    """Where a tensor of the source goes; float32 is kept as stored, being no less exact so."""
    if stored.dtype not in {*FLOATS, PACKED}:
        raise ModelError(
            f"{model_dir}: tensor {stored.name} is stored as {stored.dtype}: "
            f"use weights in one of {', '.join(FLOATS)}"
        )
    dtype = STORED_DTYPES.get(stored.dtype, FLOAT32)
    is_in_out = isinstance(planned, WeightSink) and planned.is_in_out
    if stored.dtype == PACKED and is_in_out:  # of such the shape is that of outputs of inputs
        stored = replace(stored, shape=stored.shape[::-1])
    try:
        if isinstance(planned, WeightSink) and len(stored.shape) == 2:
            if planned.precision == "int8":
                return _KeptInt8(stored, arena, is_in_out=planned.is_in_out)
            if planned.precision == "int4" and planned.num_in % 2 == 0:
                return _KeptInt4(stored, arena, is_in_out=planned.is_in_out)
            if planned.precision == "bfloat16":
                dtype = BFLOAT16
        elif isinstance(planned, StackSink) and planned.precision == "bfloat16":
            dtype = BFLOAT16
        return _Kept(stored, dtype, arena, is_in_out=is_in_out)
    except (ValueError, MemoryError) as error:
        raise ModelError(
            f"{model_dir}: tensor {stored.name} needs {stored.end - stored.start} bytes of memory, "
            "more than this machine gives"
        ) from error
