"""What a worker gives to sessions by itself."""

import pytest

from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.stage.session_admission import MAX_STEP_TOKENS, free_kv_bytes


@pytest.mark.parametrize("free", [1 << 34, 1 << 20])
def test_a_session_gets_what_weights_and_steps_leave(tiny_model, monkeypatch, free):
    config = load_config(tiny_model)
    shard = load_shard(tiny_model, config, 2, 4, expected_hashes=None)
    monkeypatch.setattr(type(shard.kernels), "free_bytes", lambda self: free)
    given = free_kv_bytes(shard)
    rows = MAX_STEP_TOKENS * config.hidden_dim * 4
    assert given == max(0, free - shard.step_bytes(MAX_STEP_TOKENS))
    assert shard.step_bytes(MAX_STEP_TOKENS) > 4 * rows
