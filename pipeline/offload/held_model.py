"""A model's linears with their weights, by a manifest: a worker's, and a mask maker's."""

from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.models.ends import NO_ENDS
from pipeline.models.model_config import ModelConfig
from pipeline.models.registry import load_shard, required_files
from pipeline.offload.ring_linear import HeldLinear, HeldParts
from pipeline.progress import Progress


def load_linears(
    manifest: Manifest, config: ModelConfig, model_dir: Path, progress: Progress | None
) -> list[HeldLinear]:
    """Load them, held against the hashes of the manifest's one stage.

    Raises ModelError, InputError.
    """
    stage = manifest.stage(0)
    layers = range(stage.layer_start, stage.layer_end)
    files = required_files(model_dir, config, layers)
    expected = None
    if stage.weight_hashes:
        hashes = dict(zip(files, stage.weight_hashes, strict=True))
        expected = [hashes[path] for path in required_files(model_dir, config, layers, NO_ENDS)]
    parts = HeldParts()
    load_shard(
        model_dir,
        config,
        layers.start,
        layers.stop,
        parts=parts,
        ends=NO_ENDS,
        expected_hashes=expected,
        pieces=manifest.weight_pieces,
        progress=progress,
    )
    return parts.linears
