"""A model's weight files: what they hold, their hashes, and loading what a stage wants of them."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from pipeline.errors import ModelError
from pipeline.files import is_file
from pipeline.gguf.model_files import is_gguf
from pipeline.progress import Meter, Progress
from pipeline.weights.checkpoint_header import StoredTensor, open_file
from pipeline.weights.checkpoint_index import INDEX_FILE, SINGLE_FILE, read_index
from pipeline.weights.file_hashes import hash_file, pin_file
from pipeline.weights.file_pieces import FilePin, Pieces, pins_of
from pipeline.weights.headers import read_any_header
from pipeline.weights.packings.base import PackedWeight
from pipeline.weights.packings.choice import Finder, find_packed
from pipeline.weights.quantization import SCALE_SUFFIX
from pipeline.weights.tensor_sinks import Sink
from pipeline.weights.unpacking import unpacking, weight_shape
from pipeline.weights.verified_file import load_file

PACKED = "packed"  # the dtype of what is no single tensor of a dtype
NO_PIECES: Mapping[str, Pieces] = MappingProxyType({})


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
    return [hash_file(path, meter) for path in paths]


def pin_files(paths: Sequence[Path], progress: Progress | None = None) -> list[FilePin]:
    """The same, and of each piece of those that have several, in one pass. Raises ModelError."""
    meter = _meter(paths, progress)
    return [pin_file(path, len(paths), meter) for path in paths]


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
    pieces: Mapping[str, Pieces] = NO_PIECES,
    progress: Progress | None = None,
    packing: Finder | None = None,
    is_as_packed: bool = False,
    num_threads: int = 1,
) -> None:
    """Fill `destinations` (name -> where it goes); packed weights come as the numbers they mean.

    `packing` is the configuration's, here as everywhere in this module.

    With `expected_hashes`, one per file of `stage_files`, every byte of those files is hashed on
    the way, by up to `num_threads`; of a file whose hash has `pieces`, those alone that hold its
    header or something wanted, and nothing else is read. Nothing may use the destinations before
    this returns. `is_as_packed`: names are those in the files, and nothing is unpacked. Raises
    ModelError.
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
    pins: list[FilePin | None] = [None] * len(paths)
    if expected_hashes is not None:
        pins = [*pins_of(expected_hashes, pieces)]
    _load_files(model_dir, dict(zip(paths, pins, strict=True)), destinations, num_threads, progress)
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
    pins: Mapping[Path, FilePin | None],
    destinations: Mapping[str, Sink],
    num_threads: int,
    progress: Progress | None,
) -> None:
    meter = _meter(list(pins), progress)
    files = _index(model_dir) if is_file(model_dir) else {}
    missing = {name for name, sink in destinations.items() if not sink.is_optional}
    for path, pin in pins.items():
        here = {name: to for name, to in destinations.items() if files.get(name, path) == path}
        missing -= load_file(path, here, pin, meter, num_threads)
    if missing:
        raise ModelError(
            f"{model_dir}: tensor {min(missing)} is missing ({len(missing)} in all): "
            "the model is incomplete or of another architecture"
        )


def _meter(paths: Sequence[Path], progress: Progress | None) -> Meter:
    num_bytes = 0
    if progress is not None:
        with suppress(OSError):  # whoever reads the file says what is wrong with it
            num_bytes = sum(path.stat().st_size for path in paths)
    return Meter(num_bytes, progress)
