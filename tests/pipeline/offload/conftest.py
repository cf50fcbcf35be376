"""A tiny model's linears in Z_2^64, masks for them, and an assistant in this process."""

import pytest

from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.offload.mask_file import write_masks
from pipeline.offload.ring_linear import HeldParts

NUM_MASKS = 24


@pytest.fixture(scope="session")
def held(tiny_model):
    """The linears of all layers of the tiny model."""
    parts = HeldParts()
    config = load_config(tiny_model)
    load_shard(tiny_model, config, 0, config.num_layers, parts=parts, expected_hashes=None)
    return parts.linears


@pytest.fixture(scope="session")
def multiply(held):
    """What an honest assistant does."""
    return lambda index, rows, num_out: held[index].product(rows)


@pytest.fixture
def mask_file(held, tmp_path):
    path = tmp_path / "masks"
    write_masks(path, held, ["ab" * 32], NUM_MASKS)
    return path
