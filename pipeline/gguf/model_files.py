"""The files of a model beside its weights: of a directory, or made of a GGUF file's metadata.

A GGUF file stands for the directory it would be: whoever asks for MODEL.gguf/config.json gets what
that file's metadata means. So a model is a path everywhere, whatever it is.
"""

from pathlib import Path

from pipeline.errors import InputError, ModelError
from pipeline.files import is_file

SUFFIX = ".gguf"
CONFIG_FILE = "config.json"


def is_gguf(model: Path) -> bool:
    """Whether a model is such a file. Raises InputError where that cannot even be asked."""
    return model.suffix == SUFFIX and is_file(model)


def find_gguf(model: Path) -> Path:
    """The GGUF file that a directory has for a model, or the path itself. Raises InputError."""
    if is_file(model / CONFIG_FILE):
        return model
    try:
        found = sorted(path for path in model.glob("*" + SUFFIX) if is_file(path))
    except OSError:  # whoever reads it will say
        return model
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise InputError(f"{model} holds {len(found)} GGUF files ({names}): name one of them")
    return found[0] if found else model


def has_model_file(path: Path) -> bool:
    """Whether a model has that file. Raises InputError, ModelError for a GGUF file that is none."""
    return _made(path) is not None if is_gguf(path.parent) else is_file(path)


def read_model_file(path: Path, max_bytes: int) -> bytes:
    """A file of a model, whole, or more than `max_bytes` of it.

    Raises OSError for one in a directory, ModelError for what a GGUF file does not tell.
    """
    if not is_gguf(path.parent):
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    made = _made(path)
    if made is None:
        what = "tokenizer" if path.name.startswith("tokenizer") else path.name
        raise ModelError(f"{path.parent} has no {what} in it: give another file's, or another file")
    return made


def _made(path: Path) -> bytes | None:
    # Most models are directories.
    from pipeline.gguf.made_files import made_file  # noqa: PLC0415

    return made_file(path.parent, path.name)
