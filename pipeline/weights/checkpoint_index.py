"""Which file of a model holds which tensor, by the index of a model in several files."""

import json
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.files import is_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000


def read_index(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> file; empty for a single-file model. Raises ModelError."""
    if is_file(model_dir / SINGLE_FILE):
        return {}
    path = model_dir / INDEX_FILE
    if not is_file(path):
        raise ModelError(
            f"no {SINGLE_FILE} or {INDEX_FILE} in {model_dir}: "
            "fetch a model with scripts/download_model.sh"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_INDEX_BYTES)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    try:
        weight_map = json.loads(raw)["weight_map"]
        names = [(name, file) for name, file in weight_map.items() if isinstance(file, str)]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has no usable weight_map: fetch it again") from error
    if not names or len(names) != len(weight_map):
        raise ModelError(f"{path} has no usable weight_map: fetch it again")
    for file_name in {file for _, file in names}:
        _check_below(path, file_name)
    return {name: model_dir / file_name for name, file_name in names}


def _check_below(path: Path, file_name: str) -> None:
    parts = Path(file_name).parts  # a dot alone is no part
    if not parts or "\0" in file_name:
        raise ModelError(f"{path} names {file_name!r}, which is no file: fetch it again")
    if ".." in parts or Path(file_name).is_absolute():
        # An index must not have us read, and hash to whoever asks, what is not the model's.
        raise ModelError(f"{path} names the file {file_name!r} outside its directory")
