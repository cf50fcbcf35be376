"""Single linears and what attends in a layer can be replaced, and the model does not notice."""

import math

import numpy as np
import pytest
import torch

from pipeline.codecs.registry import make_codec
from pipeline.kernels.cuda_kernels import CudaKernels
from pipeline.models.gpt2 import GPT2Shard
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.models.registry import load_shard
from pipeline.models.shard_model import ShardSpec
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.stage.step_executor import StageCore

FAMILIES = {
    "gpt2": ("h.2.attn.c_proj", "h.1.attn.c_attn"),
    "llama-untied-gqa": ("model.layers.2.self_attn.o_proj", "model.layers.1.mlp.gate_up_proj"),
    "llama-tied-llama3-rope": ("model.layers.0.mlp.down_proj", "lm_head"),
}
LAYER = 1


class ReferenceLinear:
    """The product of another's weights in float64; it keeps what it was asked."""

    def __init__(self, own, kernels):
        self._own, self._kernels = own, kernels
        self.seen = []

    def _weights(self):
        ids = self._kernels.to_device(np.arange(self._own.num_out))
        rows = self._kernels.empty(self._own.num_out, self._own.num_in)
        self._own.gather(ids, rows)
        nothing = self._kernels.to_device(np.zeros((1, self._own.num_in), np.float32))
        bias = self._own(nothing, self._kernels.empty(1, self._own.num_out))
        return (each.astype(np.float64) for each in self._kernels.to_host(rows, bias))

    def __call__(self, x, out, residual=None):
        weights, bias = self._weights()
        self.seen.append(self._kernels.to_host(x)[0].copy())
        product = self.seen[-1].astype(np.float64) @ weights.T + bias
        if residual is not None:
            product += self._kernels.to_host(residual)[0]
        self._kernels.fill(out, product.astype(np.float32))
        return out

    def gather(self, ids, out):
        self._own.gather(ids, out)

    def sinks(self, *args, **options):
        return self._own.sinks(*args, **options)

    @property
    def num_bytes(self):
        return self._own.num_bytes


class ReferenceAttention:
    """Attention in float64 over rows that it keeps itself: the cache stays empty."""

    def __init__(self, heads, seen):
        self._heads, self._seen = heads, seen
        self.batches = []

    def over(self, batch, kernels):
        self.batches.append(batch)

        def attend(qkv, keys, values, out, sinks=None):
            assert sinks is None
            heads = self._heads
            rows = kernels.to_host(qkv)[0].astype(np.float64)
            rows = rows.reshape(len(rows), -1, heads.head_dim)
            found, first = [], 0
            for segment in batch:
                own = self._seen.setdefault(segment.slot, [])
                for row in rows[first : first + segment.num_tokens]:
                    own.append(row[heads.num_heads :])
                    found.append(self._attended(row[: heads.num_heads], np.stack(own)))
                first += segment.num_tokens
            kernels.fill(out, np.stack(found).astype(np.float32))
            return out

        return attend

    def _attended(self, queries, seen):
        heads = self._heads
        group = heads.num_heads // heads.num_kv_heads
        keys, values = np.split(seen.repeat(group, axis=1), 2, axis=1)
        matches = np.einsum("hd,phd->hp", queries, keys) / math.sqrt(heads.head_dim)
        weights = np.exp(matches - matches.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("hp,phd->hd", weights, values).reshape(-1)


class Replaced(LayerParts):
    """Some linears by name, and what attends in one layer."""

    are_recordable = False
    are_row_exact = False

    def __init__(self, names):
        self.names, self.linears, self.asked, self.attending = names, {}, [], None
        self.kernels, self.heads = None, None

    def linear(self, name, spec, kernels):
        self.asked.append(name)
        self.kernels = kernels
        own = super().linear(name, spec, kernels)
        if name not in self.names:
            return own
        return self.linears.setdefault(name, ReferenceLinear(own, kernels))

    def attention(self, layer, batch, own):
        if layer != LAYER:
            return own
        self.attending = self.attending or ReferenceAttention(self.heads, {})
        return self.attending.over(batch, self.kernels)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def replaced(family, make_oracle, kernels, make_pipeline):
    """Two stages with replaced parts, and those."""
    oracle = make_oracle(family)
    stages, parts = [], []
    for start, end in ((0, 2), (2, 4)):
        parts.append(Replaced(FAMILIES[family]))
        stages.append(
            load_shard(
                oracle.directory, oracle.config, start, end,
                kernels=kernels, parts=parts[-1], expected_hashes=None,
            )
        )  # fmt: skip
        parts[-1].heads = stages[-1].config.shape(0).heads
    return make_pipeline(stages), parts


def test_a_model_with_replaced_parts_says_the_same(
    replaced, family, make_oracle, kernels, make_pipeline, token_ids
):
    pipeline, parts = replaced
    plain = make_pipeline(make_oracle(family).computing_with(kernels).split(2))
    expected, expected_logits = plain.greedy(token_ids, 8)
    tokens, logits = pipeline.greedy(token_ids, 8)
    assert tokens == expected
    assert (logits - expected_logits).abs().max() <= 1e-3
    linears = {name: each for part in parts for name, each in part.linears.items()}
    assert linears.keys() == set(FAMILIES[family])
    for name, linear in linears.items():
        rows = [len(x) for x in linear.seen]
        assert rows == ([1] * 8 if name == "lm_head" else [len(token_ids)] + [1] * 7)
    attending = parts[0].attending
    assert [batch[0].num_tokens for batch in attending.batches] == [len(token_ids)] + [1] * 7
    assert parts[1].attending is None
    cache = pipeline.caches[0]
    assert not np.asarray(cache.keys[LAYER]).any()
    assert np.asarray(cache.keys[0]).any()


def test_every_linear_of_a_layer_is_asked_for_by_a_name_of_its_own(replaced, family):
    _, parts = replaced
    asked = [name for part in parts for name in part.asked]
    assert len(asked) == len(set(asked)) == 4 * 4 + 1
    assert "lm_head" in asked
    assert set(FAMILIES[family]) <= set(asked)


def test_what_is_not_the_kernels_own_is_not_recorded(replaced, token_ids):
    """Steps of one token are computed anew each time, also by a stage."""
    pipeline, _ = replaced
    shard = pipeline.shards[0]
    assert not shard.has_decode_steps
    assert not shard.is_row_exact
    core = StageCore(shard, SessionLimits(2, 64, 32, make_codec("F32", 64)))
    assert not core.decodes_in_place
    for step, position in enumerate((0, 1)):
        header = StepHeader(StepKind.STEP, step, (Segment(0, position, 1),), (Want.TOKEN,), ())
        core.step(header, (token_ids_to_wire(token_ids[:1].numpy()),))
    assert not core.cache.recordings.keys()
    assert core.cache.lengths == (2, 0)


class NotRecordable(LayerParts):
    are_recordable = False


@pytest.mark.parametrize(("parts", "are_recorded"), [(OWN, True), (NotRecordable(), False)])
def test_on_a_gpu_only_its_own_is_recorded(
    make_oracle, make_pipeline, token_ids, parts, are_recorded
):
    config = make_oracle("gpt2").config
    kernels = CudaKernels(torch.device("cpu"))
    shard = GPT2Shard(config, ShardSpec(range(2), kernels, "float32", parts))
    pipeline = make_pipeline([shard])
    pipeline.hidden(token_ids[:1], [Segment(0, 0, 1)])
    assert bool(pipeline.caches[0].recordings.keys()) == are_recorded
