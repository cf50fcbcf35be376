"""Where a part of a model is: one directory may hold all of it, or a directory of each part."""

from pathlib import Path

from pipeline.files import is_file
from pipeline.models.config import CONFIG_FILE


def stage_dir(model_dir: Path, stage_idx: int) -> Path:
    """A stage's model in what `pipeline-orch shard` writes; else the model is whole."""
    return _part(model_dir, f"stage{stage_idx}")


def client_dir(model_dir: Path) -> Path:
    """The user's part there: tokenizer, template, embedding and head."""
    return _part(model_dir, "client")


def _part(model_dir: Path, name: str) -> Path:
    return model_dir / name if is_file(model_dir / name / CONFIG_FILE) else model_dir
