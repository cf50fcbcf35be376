"""What a family of models is to everybody else."""

from collections.abc import Callable
from typing import Any

from pipeline.models.ends import Names
from pipeline.models.model_config import Fields, ModelConfig
from pipeline.models.residual import ResidualStream
from pipeline.models.shard_model import Shard, ShardSpec
from transport.frozen import frozen


@frozen
class Family:
    """How its config.json is read, how its shards are made, and what others may do with these."""

    # Of config.json's fields and generation_config.json's. Raises ModelError, and pydantic's
    # ValidationError.
    read: Callable[[Fields, Fields], ModelConfig]
    # Of the configuration that `read` gives. Allocates the shard's memory.
    build: Callable[[Any, ShardSpec], Shard]
    # Where its checkpoints keep what every decoder has.
    names: Names
    # What touches its residual stream; None where that cannot be rotated in the weights.
    stream: ResidualStream | None = None
    # What some of its checkpoints have in front of all names but the head's.
    prefix: str = ""
    # Whether its layers take the token ids once more: then whoever computes them is told these.
    layers_take_ids: bool = False
    # Whether which weights a row meets depends on that row.
    is_routed: bool = False
