"""What a stage's layers ask of another worker, where its manifest says so."""

from pipeline.agreement.manifest import Manifest
from pipeline.remote_parts.parts import RemoteParts


def home_parts(manifest: Manifest) -> RemoteParts | None:
    """The parts of the one stage's layers. Raises InputError."""
    if manifest.part is None:
        return None
    from pipeline.scx.attention_parts import AttentionParts

    return AttentionParts()
