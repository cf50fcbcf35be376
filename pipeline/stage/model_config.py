"""The model that a manifest is for, as the directory has it that a program was given."""

import logging
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

from pipeline.agreement.manifest import Manifest
from pipeline.dtypes import Precision
from pipeline.errors import InputError
from pipeline.kernels.sealed_memory import SealedMemory
from pipeline.models.config import load_config
from pipeline.models.ends import NO_ENDS
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.models.model_config import ModelConfig
from pipeline.models.registry import Beside, ModelShard, load_shard
from pipeline.progress import Progress

logger = logging.getLogger(__name__)


def agreed_config(manifest: Manifest, model_dir: Path) -> ModelConfig:
    """A model directory's configuration. Raises ModelError, InputError unless it is the manifest's.

    For those manifests too that pin no hash of it.
    """
    _check_rotation(manifest, model_dir)
    config = load_config(model_dir, manifest.config_hash)
    spec = manifest.activation_spec
    if spec.max_seq_len > config.max_positions:
        raise InputError(
            f"the manifest allows {spec.max_seq_len} positions, the model of {model_dir} was made "
            f"for {config.max_positions}"
        )
    expected = (manifest.total_layers, spec.hidden_dim)
    if (config.num_layers, config.hidden_dim) != expected:
        raise InputError(
            f"{model_dir} has {config.num_layers} layers of width {config.hidden_dim}, "
            f"the manifest says {expected[0]} of width {expected[1]}"
        )
    return config


def load_stage(
    manifest: Manifest,
    stage_idx: int,
    model_dir: Path,
    precision: Precision,
    kernels: str,
    device: str,
    progress: Progress | None,
    memory: SealedMemory | None = None,
    parts: LayerParts = OWN,
    beside: Mapping[int, SealedMemory] = MappingProxyType({}),
) -> ModelShard:
    """A stage's layers, by the manifest. Raises ModelError, InputError.

    `memory`: where weights outlive this process, for another of the same stage. `parts`: what does
    the work of its layers. `beside`: memory of other stages, in the same precision and of the same
    files, which are loaded together with it.
    """
    stage = manifest.stage(stage_idx)
    started = perf_counter()
    shard = load_shard(
        model_dir,
        agreed_config(manifest, model_dir),
        stage.layer_start,
        stage.layer_end,
        dtype=precision,
        kernels=kernels,
        device=device,
        ends=NO_ENDS if manifest.has_client_ends else None,
        expected_hashes=stage.weight_hashes or None,
        pieces=manifest.weight_pieces,
        parts=parts,
        progress=progress,
        memory=memory,
        beside=[Beside(_layers(manifest, each), own) for each, own in beside.items()],
    )
    for own in beside.values():
        own.let_go()
    if stage.kernels not in {None, shard.kernels.name}:
        raise InputError(
            f"stage {stage_idx} computes with {shard.kernels.name} kernels here, the manifest says "
            f"{stage.kernels}, which round differently; plan anew, or see `--kernels`"
        )
    logger.info(
        "event=weights_loaded stage=%d bytes=%d seconds=%.2f%s",
        stage_idx,
        shard.num_weight_bytes,
        perf_counter() - started,
        f" beside={','.join(map(str, beside))}" if beside else "",
    )
    return shard


def _layers(manifest: Manifest, stage_idx: int) -> range:
    stage = manifest.stage(stage_idx)
    return range(stage.layer_start, stage.layer_end)


def _check_rotation(manifest: Manifest, model_dir: Path) -> None:
    """Hold the rotation in the weights against the manifest's. Raises ModelError, InputError.

    Before the hashes, which would only say that these are other weights.
    """
    found = load_config(model_dir).rotation
    if found == manifest.rotation:
        return
    if found is None:
        problem = "holds plain weights, the manifest is of weights rotated by a secret"
    elif manifest.rotation is None:
        problem = "holds weights rotated by a secret, the manifest is of plain ones"
    else:
        problem = "holds weights rotated by another secret than the manifest's"
    raise InputError(f"{model_dir} {problem}; use what `pipeline-orch shard` wrote beside it")
