"""Models as commands are told of them: by path, or by the name of a pulled model."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pipeline.gguf.model_files import find_gguf, is_gguf


def model_directory(given: Path) -> Path:
    """Where a model is; the path itself where that is no pulled model's name.

    A tensorizer's file becomes the directory that it is converted to. Raises InputError for a
    model that has not been fetched whole, and ModelError for such a file that cannot be read.
    """
    if _exists(given):
        if given.suffix == ".tensors":
            return _converted(given)
        return find_gguf(given)  # whether it holds a model, whoever reads it will say
    try:
        # Not by a statement: an image carries what a stage's statements import, and needs no hub.
        pulled = import_module("pipeline.planning.pulled_models")
    except ModuleNotFoundError:  # in an image
        return given
    name = pulled.parse_name(str(given))
    return (name and pulled.find_model(name)) or given


def _converted(given: Path) -> Path:
    try:
        tensorized = import_module("pipeline.planning.tensorized")
    except ModuleNotFoundError:  # in an image
        return given
    found: Path = tensorized.converted(given)
    return found


def tokenizer_file(given: Path) -> Path:
    """The tokenizer's file: itself, or that of a model. Raises InputError as there."""
    if given.suffix == ".json":
        return given
    model = model_directory(given)
    try:
        return model / "tokenizer.json" if is_gguf(model) or model.is_dir() else given
    except OSError:  # no name for a file: whoever opens it will say
        return given


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a directory that is not ours to look into
        return True


def model_option(given: Path | None) -> Path | None:
    """Where a model is, if one is given; also as a typer callback."""
    return None if given is None else model_directory(given)


ModelDir = Annotated[Path, AfterValidator(model_directory)]
OptionalModelDir = Annotated[Path | None, AfterValidator(model_option)]
TokenizerFile = Annotated[Path, AfterValidator(tokenizer_file)]
