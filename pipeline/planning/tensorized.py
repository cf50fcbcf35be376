"""Weights in tensorizer's files (`.tensors`), converted by its own library.

Such a file has no configuration: config.json, tokenizer and template lie beside it. What a stage
reads is the converted directory, whose files a manifest pins as any other's: the same file gives
the same bytes wherever it is converted. The library (`pip install veilpipe[tensors]`) is imported
where it is needed.
"""

import shutil
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np

from pipeline.dtypes import BFLOAT16, HostArray
from pipeline.errors import InputError, ModelError
from pipeline.files import check_writable, is_file, new_directory
from pipeline.models.config import CONFIG_FILE
from pipeline.planning.part_weights import save_tensors
from pipeline.planning.pulled_models import copies_directory
from pipeline.planning.shard import TEXT_FILES
from pipeline.weights.checkpoint import hash_files, weight_files
from pipeline.weights.checkpoint_header import RAW_DTYPES, fill, open_file, read_header
from pipeline.weights.checkpoint_index import SINGLE_FILE

SUFFIX = ".tensors"


def is_tensorized(path: Path) -> bool:
    """Whether that is the name of such a file."""
    return path.suffix == SUFFIX


def converted(path: Path) -> Path:
    """The directory that such a file has been converted to, now or before.

    Raises ModelError, and InputError where it cannot be written.
    """
    (digest,) = hash_files([path])
    target = copies_directory().parent / "tensors" / digest
    if not is_file(target / CONFIG_FILE):
        from_tensors(path, target)
    return target


def from_tensors(path: Path, output: Path) -> None:
    """Write `output`, a model's directory, from such a file and what lies beside it.

    Raises ModelError, and InputError for an `output` that is there or cannot be written.
    """
    beside = [path.parent / name for name in (CONFIG_FILE, *TEXT_FILES)]
    if not is_file(beside[0]):
        raise ModelError(f"{path} says nothing of its model: lay its {CONFIG_FILE} beside it")
    with new_directory(output) as directory:
        save_tensors(_read(path), directory / SINGLE_FILE)
        for each in filter(is_file, beside):
            shutil.copyfile(each, directory / each.name)


def to_tensors(model_dir: Path, path: Path) -> None:
    """Write the weights of a model's directory as such a file.

    Raises ModelError, and InputError where it cannot be written.
    """
    serialization, torch = _library(path), _torch(path)
    tensors = {}
    for each in weight_files(model_dir):
        for name, array in _stored(each).items():
            bits = torch.from_numpy(array.view(np.int16) if array.dtype == BFLOAT16 else array)
            tensors[name] = bits.view(torch.bfloat16) if array.dtype == BFLOAT16 else bits
    check_writable(path)
    with closing(serialization.TensorSerializer(str(path))) as serializer:
        serializer.write_state_dict(tensors)


def _stored(path: Path) -> dict[str, HostArray]:
    found = {}
    with open_file(path) as file:
        for stored in read_header(file, path).tensors:
            if stored.dtype not in RAW_DTYPES:
                raise ModelError(f"{path}: tensor {stored.name} is stored as {stored.dtype}")
            array = np.empty(stored.shape, RAW_DTYPES[stored.dtype])
            fill(file, path, array.reshape(-1).view(np.uint8).data)
            found[stored.name] = array
    return found


def _read(path: Path) -> dict[str, HostArray]:
    serialization, torch = _library(path), _torch(path)
    found: dict[str, HostArray] = {}
    try:
        with closing(
            serialization.TensorDeserializer(
                str(path), device="cpu", lazy_load=True, verify_hash=True
            )
        ) as tensors:
            for name in tensors:
                tensor = tensors[name].detach().contiguous()
                if tensor.dtype == torch.bfloat16:
                    array: HostArray = tensor.view(torch.int16).numpy().view(BFLOAT16)
                else:
                    array = tensor.numpy()
                found[name] = array
    except Exception as error:  # whatever its parser meets: it has no error of its own
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ModelError(f"{path} cannot be read as tensorizer's: {reason}") from error
    for name, array in found.items():
        if array.dtype not in RAW_DTYPES.values():
            raise ModelError(f"{path}: tensor {name} is stored as {array.dtype}")
    return found


def _library(path: Path) -> ModuleType:
    try:
        from tensorizer import serialization  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"{path} is tensorizer's: pip install veilpipe[tensors]") from error
    found: ModuleType = serialization
    return found


def _torch(path: Path) -> ModuleType:
    try:
        import torch  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"{path} is tensorizer's, whose library needs torch") from error
    return torch
