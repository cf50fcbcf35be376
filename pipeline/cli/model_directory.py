"""Model directories as commands are told of them: by path, or by the name of a pulled model."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pipeline.errors import InputError


def model_directory(given: Path) -> Path:
    """Where a model is. Raises InputError for what is neither a path that exists nor a model."""
    if _exists(given):
        return given  # whether it holds a model, whoever reads it will say
    from pipeline.planning.pulled_models import find_model, parse_name

    name = parse_name(str(given))
    if name is None:
        return given
    found = find_model(name)
    if found is None:
        raise InputError(
            f"--model-dir {given}: no such directory here, and no model of that name has been "
            f"fetched; pipeline-orch pull {given}"
        )
    return found


def tokenizer_file(given: Path) -> Path:
    """The tokenizer's file: itself, or that of a model. Raises InputError as for one."""
    if given.suffix == ".json":
        return given
    directory = model_directory(given)
    return directory / "tokenizer.json" if directory.is_dir() else given


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a directory that is not ours to look into
        return True


ModelDir = Annotated[Path, AfterValidator(model_directory)]
TokenizerFile = Annotated[Path, AfterValidator(tokenizer_file)]


def model_option(given: Path | None) -> Path | None:
    """Callback of a `--model-dir` of commands that are not told by settings."""
    return None if given is None else model_directory(given)
