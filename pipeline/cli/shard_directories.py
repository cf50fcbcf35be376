"""Where a part of a model is: one directory may hold all of it, or a directory of each part."""

from pathlib import Path

from pipeline.errors import InputError
from pipeline.files import is_file
from pipeline.gguf.model_files import CONFIG_FILE


def stage_dir(model_dir: Path, stage_idx: int) -> Path:
    """A stage's model in what `pipeline-orch shard` writes; else the model is whole."""
    return _part(model_dir, f"stage{stage_idx}")


def client_dir(model_dir: Path) -> Path:
    """The user's part there: tokenizer, template, embedding and head."""
    return _part(model_dir, "client")


def has_parts(model_dir: Path) -> bool:
    """Whether a directory is what `pipeline-orch shard` writes. Raises InputError."""
    return stage_dir(model_dir, 0) != model_dir


def parts_dir(manifest: Path) -> Path:
    """Where `pipeline-orch join` keeps what it has cut for the manifest at that path."""
    return manifest.with_suffix(".parts")


def model_or_parts(given: Path | None, manifest: Path, flag: str) -> Path:
    """The model directory that is given, or what `join` keeps of one. Raises InputError."""
    if given is not None:
        return given
    if not _is_model(parts_dir(manifest)):
        raise InputError(f"missing {flag}; see --help")
    return parts_dir(manifest)


def _part(model_dir: Path, name: str) -> Path:
    return model_dir / name if _is_model(model_dir / name) else model_dir


def _is_model(directory: Path) -> bool:
    return is_file(directory / CONFIG_FILE)
