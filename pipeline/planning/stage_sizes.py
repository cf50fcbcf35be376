"""How much memory each stage of a plan takes, by its configuration: no weights are read."""

from pathlib import Path
from typing import NamedTuple

from pipeline.agreement.manifest import Manifest
from pipeline.models.config import load_config
from pipeline.models.ends import NO_ENDS
from pipeline.models.registry import outline
from pipeline.models.stored_model import as_stored

# A stage takes steps of so many tokens at most.
MAX_STEP_TOKENS = 4096


class StageSizes(NamedTuple):
    """Bytes of one stage."""

    weights: int
    widest_weights: int  # where kernels compute in float32, whatever the precision
    session: int  # keys and values, and what it has sent on, of so many texts of such a length
    steps: int  # what computing takes beside them


def stage_sizes(
    manifest: Manifest, stage_idx: int, model_dir: Path, num_slots: int, max_seq_len: int
) -> StageSizes:
    """Sizes by the config.json of the model, or of the stage's own part of it.

    And by how weights are stored, where they are there.

    Raises ModelError where that is another model than the manifest's.
    """
    stage = manifest.stage(stage_idx)
    precision = stage.precision or "float32"
    config = as_stored(model_dir, load_config(model_dir, manifest.config_hash), precision)
    ends = NO_ENDS if manifest.has_client_ends else None
    layers = range(stage.layer_start, stage.layer_end)
    shard = outline(config, layers, precision, ends)
    widest = outline(config, layers, "float32", ends)
    is_last = stage_idx == len(manifest.stages) - 1
    sent_on = 0 if is_last else num_slots * max_seq_len * config.hidden_dim * 4  # float32
    return StageSizes(
        shard.num_weight_bytes,
        widest.num_weight_bytes,
        shard.kv_bytes(num_slots, max_seq_len) + sent_on,
        shard.step_bytes(MAX_STEP_TOKENS),
    )
