"""What a stage's layers ask of another worker, where its manifest says so."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.errors import InputError
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.remote_parts.parts import PartAccess, RemoteParts
from pipeline.stage.model_config import agreed_config
from pipeline.stage.worker_setup import PartsSession

if TYPE_CHECKING:
    from pipeline.scx.attention_parts import Encoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageParts:
    """What does the work of a stage's layers, and what that needs in a session."""

    parts: LayerParts = OWN
    session: PartsSession | None = None


def stage_parts(
    manifest: Manifest,
    stage_idx: int,
    model_dir: Path,
    trust: Trust,
    *,
    has_store: bool,
    masks: Path | None = None,
) -> StageParts:
    """Of a manifest's stage; `masks` is their file. Raises InputError."""
    kind = None if manifest.part is None else manifest.part.kind
    if masks is not None and kind != "linear":
        raise InputError(
            "--masks: the manifest's linears are not computed under masks; plan it with --linear"
        )
    is_encoded = stage_idx in manifest.encoded_stages
    if has_store and (is_encoded or kind == "attention"):
        raise InputError(
            "--kv-store: keys and values that are encoded for one session are not kept"
        )
    if is_encoded:
        return _encoding_parts(manifest, stage_idx, model_dir)
    if kind is None:
        return StageParts()
    parts = _remote_parts(manifest, kind, model_dir, masks)
    return StageParts(parts, PartAccess(manifest, trust, parts).session)


def _encoding_parts(manifest: Manifest, stage_idx: int, model_dir: Path) -> StageParts:
    from pipeline.scx.encoded_memory import EncodedMemory, EncodedRowByRow

    config = agreed_config(manifest, model_dir)
    if manifest.encoding is None:
        memory = EncodedMemory(config)
        return StageParts(memory, memory.session)
    stage = manifest.stage(stage_idx)
    layers = range(stage.layer_start, stage.layer_end)
    rows = EncodedRowByRow(config, _encoding(manifest), layers)
    return StageParts(rows, rows.with_seed)


def _encoding(manifest: Manifest) -> "Encoding":
    from pipeline.scx.attention_parts import Encoding

    return Encoding(**({} if manifest.encoding is None else manifest.encoding.model_dump()))


def _remote_parts(
    manifest: Manifest, kind: str, model_dir: Path, masks: Path | None
) -> RemoteParts:
    if kind == "linear":
        return _masked_parts(manifest, masks)
    if kind == "mixed-linear":
        from pipeline.offload.linear_parts import MixedParts

        return MixedParts()
    from pipeline.scx.attention_parts import AttentionParts

    return AttentionParts(agreed_config(manifest, model_dir), _encoding(manifest))


def _masked_parts(manifest: Manifest, path: Path | None) -> RemoteParts:
    from pipeline.offload.linear_parts import MaskedParts
    from pipeline.offload.masks import open_masks

    if path is None:
        raise InputError(
            "rows leave under masks here: make some with `pipeline-orch masks make`, and give "
            "--masks FILE"
        )
    masks = open_masks(path)  # for as long as this process serves
    if masks.header.weight_hashes != manifest.stage(0).weight_hashes:
        raise InputError(f"{path} has masks for other weights than this manifest's; make anew")
    logger.info("event=masks left=%d of=%d", masks.num_left, masks.header.num_masks)
    return MaskedParts(masks)
