"""Linears in the ring as models have them: of every family, with biases and activations."""

import numpy as np
import pytest

from pipeline.models.config import load_config
from pipeline.models.layer_parts import OWN
from pipeline.models.registry import load_shard
from pipeline.offload.ring_linear import HeldParts
from pipeline.protocol.batch import Segment
from tests.pipeline.oracles import make_oracle

__all__ = ["make_oracle"]


def logits(model_dir, parts, kernels):
    config = load_config(model_dir)
    shard = load_shard(
        model_dir, config, 0, config.num_layers, parts=parts, kernels=kernels, expected_hashes=None
    )
    rows = shard.forward(np.arange(3, 15), (Segment(0, 0, 12),), shard.new_cache(1, 16))
    return np.asarray(shard.logits(rows))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", ["gpt2", "llama-untied-gqa"])
def test_a_model_in_the_ring_predicts_what_it_does_in_floats(make_oracle, name, kernels):
    model_dir = make_oracle(name).directory
    parts = HeldParts()
    found = logits(model_dir, parts, kernels)
    assert np.abs(found - logits(model_dir, OWN, kernels)).max() < 1e-4
    assert len(parts.linears) == 4 * load_config(model_dir).num_layers
