"""What a stage's layers ask of another worker, where its manifest says so."""

from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.remote_parts.parts import RemoteParts
from pipeline.stage.model_config import agreed_config


def home_parts(manifest: Manifest, model_dir: Path) -> RemoteParts | None:
    """The parts of the one stage's layers. Raises InputError."""
    if manifest.part is None:
        return None
    from pipeline.scx.attention_parts import AttentionParts

    return AttentionParts(agreed_config(manifest, model_dir))
