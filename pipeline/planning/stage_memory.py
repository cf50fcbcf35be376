"""Whether a plan's stages fit their machines: weights first, keys and values in what is left."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.agreement.manifest import Manifest, StageSpec
from pipeline.dtypes import Precision
from pipeline.models.config import load_config
from pipeline.models.ends import NO_ENDS
from pipeline.models.registry import outline
from pipeline.models.stored_model import as_stored

# As stages do, which leave the rest to the system.
USABLE_SHARE = 0.9


class StageMemory(NamedTuple):
    """What a stage takes of its machine, in bytes; tokens are those of all requests together."""

    stage_idx: int
    weight_bytes: int
    token_bytes: int
    # Left for keys and values, or set aside for them: None where nobody knows the machine.
    kv_bytes: int | None
    # What all stages that share its machine are short of; 0 where they fit.
    missing_bytes: int

    @property
    def num_tokens(self) -> int | None:
        """Tokens that all requests may have together, where that is known and there is a limit."""
        if self.kv_bytes is None or not self.token_bytes:
            return None
        return self.kv_bytes // self.token_bytes

    def told(self, context: int) -> str:
        """What a user reads of it; `context` is what the model can have."""
        weights = f"stage {self.stage_idx}: {_gb(self.weight_bytes)} of weights"
        if self.missing_bytes:
            return (
                f"{weights}; its machine is {_gb(self.missing_bytes)} too small for what the plan "
                "puts there: plan more machines, a smaller --dtype or less --kv-memory"
            )
        if self.num_tokens is None or self.kv_bytes is None:
            return weights
        room = f"{weights}, {_gb(self.kv_bytes)} for keys and values: {self.num_tokens:,} tokens"
        if self.num_tokens < context:
            return f"{room}, fewer than the {context:,} that one request may have by its model"
        return room


def stage_memory(
    manifest: Manifest, model_dir: Path, precision: Precision, machines: Mapping[int, int]
) -> list[StageMemory]:
    """What every stage needs and finds.

    `machines`: bytes of the machine of each stage that is known; stages of one host share it.
    `precision` is that of stages whose manifest leaves it open. Raises ModelError.
    """
    config = load_config(model_dir)
    ends = NO_ENDS if manifest.has_client_ends else None
    is_kept_elsewhere = manifest.part is not None and manifest.part.kind == "attention"
    precisions = [each.precision or precision for each in manifest.stages]
    stored = {each: as_stored(model_dir, config, each) for each in set(precisions)}
    shards = [
        outline(stored[held], range(each.layer_start, each.layer_end), held, ends)
        for each, held in zip(manifest.stages, precisions, strict=True)
    ]
    weights = [shard.num_weight_bytes for shard in shards]
    hosts = [_host(stage) for stage in manifest.stages]
    asked = [stage.kv_bytes or 0 for stage in manifest.stages]
    found = []
    for index, shard in enumerate(shards):
        here = [each for each, host in enumerate(hosts) if host == hosts[index]]
        kv_bytes, missing = manifest.stages[index].kv_bytes, 0
        if index in machines:
            usable = math.floor(machines[index] * USABLE_SHARE)
            left = usable - sum(weights[each] + asked[each] for each in here)
            missing = max(0, -left)
            kv_bytes = kv_bytes or max(0, left) // sum(not asked[each] for each in here)
        token_bytes = 0 if is_kept_elsewhere else shard.kv_bytes(1, 1)
        found.append(StageMemory(index, weights[index], token_bytes, kv_bytes, missing))
    return found


def _host(stage: StageSpec) -> object:
    """What stages of one machine have in common."""
    if stage.machine_keys:
        return stage.machine_keys
    if stage.endpoint is None:
        return None
    return getattr(stage.endpoint.control.to_endpoint(), "host", stage.stage_idx)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2g} MB"
