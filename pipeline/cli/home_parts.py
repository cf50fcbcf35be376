"""What a stage's layers ask of another worker, where its manifest says so."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.errors import InputError
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.remote_parts.parts import PartAccess, RemoteParts
from pipeline.stage.model_config import agreed_config
from pipeline.stage.worker_setup import PartsSession


@dataclass(frozen=True, slots=True)
class StageParts:
    """What does the work of a stage's layers, and what that needs in a session."""

    parts: LayerParts = OWN
    session: PartsSession | None = None


def stage_parts(
    manifest: Manifest, stage_idx: int, model_dir: Path, trust: Trust, *, has_store: bool
) -> StageParts:
    """Of a manifest's stage. Raises InputError."""
    is_encoded = stage_idx in manifest.encoded_stages
    if has_store and (is_encoded or manifest.part is not None):
        raise InputError(
            "--kv-store: keys and values that are encoded for one session are not kept"
        )
    if is_encoded:
        from pipeline.scx.encoded_memory import EncodedMemory

        memory = EncodedMemory(agreed_config(manifest, model_dir))
        return StageParts(memory, memory.session)
    if manifest.part is None:
        return StageParts()
    parts = _remote_parts(manifest, model_dir)
    return StageParts(parts, PartAccess(manifest, trust, parts).session)


def _remote_parts(manifest: Manifest, model_dir: Path) -> RemoteParts:
    from pipeline.scx.attention_parts import AttentionParts

    return AttentionParts(agreed_config(manifest, model_dir))
