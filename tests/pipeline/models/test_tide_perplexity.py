"""A real text four windows long is as likely under a window as to a model that sees all of it."""

from pathlib import Path

import numpy as np
import pytest

import pipeline.leakage.texts as texts
from pipeline.engine.tokenizer import Tokenizer
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.tide_window import TideWindow

MODEL = Path(__file__).resolve().parents[3] / "models" / "smollm2"
TEXT = Path(texts.__file__).parent / "english.txt"
CHUNK = 128


def perplexity(shard, ids, window):
    cache, losses = shard.new_cache(1, len(ids), window), []
    for start in range(0, len(ids) - 1, CHUNK):
        rows, targets = ids[start : start + CHUNK][: len(ids) - 1 - start], ids[start + 1 :]
        hidden = shard.forward(rows, [Segment(0, start, len(rows))], cache)
        (logits,) = shard.kernels.to_host(shard.logits(hidden))
        logits = logits - logits.max(axis=1, keepdims=True)
        picked = logits[np.arange(len(rows)), targets[: len(rows)]]
        losses.append(np.log(np.exp(logits).sum(axis=1)) - picked)
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="models/smollm2 is missing")
@pytest.mark.parametrize("size", [64, 256])
def test_perplexity_over_four_windows_is_within_two_percent_and_sinks_are_why(size):
    config = load_config(MODEL)
    shard = load_shard(MODEL, config, 0, config.num_layers, expected_hashes=None)
    ids = np.array(Tokenizer(MODEL / "tokenizer.json").encode(TEXT.read_text())[: 4 * size])
    assert len(ids) == 4 * size
    whole = perplexity(shard, ids, None)
    assert perplexity(shard, ids, TideWindow(size, 4)) < 1.02 * whole
    assert perplexity(shard, ids, TideWindow(size, 0)) > 1.2 * whole
