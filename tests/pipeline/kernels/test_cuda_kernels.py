"""The GPU's kernels against torch's: with the CPU in the GPU's place, and where there is one there.

In its place decode steps run eagerly, or are recorded and replayed operation by operation, on the
same memory, as a CUDA graph is: whatever a step took from the host would be stale in the replay.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.codecs.registry import make_codec
from pipeline.errors import InputError, MessageError
from pipeline.kernels import cuda_kernels
from pipeline.kernels.base import HeadShape
from pipeline.kernels.cuda_graphs import DecodeAttention, Recorder
from pipeline.kernels.cuda_kernels import CudaKernels, find_gpu
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.models import registry
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.stage.step_executor import StageCore

TOLERANCE = 1e-4
FAMILIES = [
    "gpt2",
    "llama-untied-gqa",
    "llama-tied-llama3-rope",
    "llama-biases-linear-rope-wide-heads",
    "mistral-sliding-window",
    "qwen2-qkv-bias",
]
GPU = pytest.param(
    "graphs", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
)


class Tape(TorchDispatchMode):
    """Every operation of a step with its operands, to be done again on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def tensors(result):
    found = result if isinstance(result, tuple | list) else (result,)
    return [each for each in found if isinstance(each, torch.Tensor)]


class TapeRecorder(Recorder):
    def record(self, step):
        tape = Tape()
        with tape:
            result = step()
        for func, *_ in tape.operations:
            assert "_local_scalar_dense" not in str(func), "a GPU would wait for the host"
            assert "nonzero" not in str(func), "a GPU would wait for the host"
            assert "lift_fresh" not in str(func), "the host's numbers would be recorded"

        def replay():
            tape.replay()
            return result

        return replay


@pytest.fixture(params=["eager", "taped", GPU])
def device(request, monkeypatch):
    """Shards are loaded for it: name of a device that stands for a GPU, or is one."""
    if request.param == "taped":
        monkeypatch.setattr(cuda_kernels, "Recorder", TapeRecorder)
    monkeypatch.setattr(cuda_kernels, "MIN_CONTEXT", 8)
    device = torch.device("cuda" if request.param == "graphs" else "cpu")
    choose = registry.choose_kernels
    monkeypatch.setattr(
        registry,
        "choose_kernels",
        lambda choice, *rest: CudaKernels(device) if choice == "gpu" else choose(choice, *rest),
    )
    return device


@pytest.fixture
def gpu_pipeline(device, make_pipeline):
    """Oracle, split -> shards on the device, run one after another through the host."""

    def make(oracle, *bounds, dtype="float32", **options):
        shards = oracle.computing_with("gpu").split(*bounds, dtype=dtype)
        return make_pipeline(shards, **options)

    return make


@pytest.fixture
def reference(make_pipeline):
    def make(oracle, *bounds, dtype="float32", **options):
        return make_pipeline(oracle.computing_with("torch").split(*bounds, dtype=dtype), **options)

    return make


def floats(tensor):
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.float32)


@pytest.fixture
def gqa(make_oracle):
    return make_oracle("llama-untied-gqa")


def recorded(cache):
    return set(cache.recordings[cuda_kernels.GRAPHS].steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_decoding_equal_torch_across_contexts(
    make_oracle, gpu_pipeline, reference, token_ids, family
):
    oracle = make_oracle(family)
    expected = reference(oracle).greedy(token_ids, 60)
    pipeline = gpu_pipeline(oracle, 2)
    tokens, logits = pipeline.greedy(token_ids, 60)
    assert tokens == expected[0]
    assert (logits - expected[1]).abs().max() <= TOLERANCE
    for cache in pipeline.caches:
        assert recorded(cache) == {(1, 32), (1, 64), (1, 128)}


@pytest.mark.parametrize("family", ["gpt2", "llama-untied-gqa", "mistral-sliding-window"])
def test_requests_that_join_and_leave_equal_torch(
    make_oracle, gpu_pipeline, reference, token_ids, family
):
    """Prompts of several lengths, alone or beside decoding ones, slots used again."""
    oracle = make_oracle(family)
    found, expected = (make(oracle, 2, num_slots=6) for make in (gpu_pipeline, reference))
    joins = {0: [(4, 9)], 1: [(0, 1), (5, 17)], 5: [(2, 3), (1, 12)], 14: [(4, 5)]}
    leaves = {9: [4, 0], 12: [5], 17: [4, 1]}
    held, nexts = {}, {}
    for step in range(20):
        for slot in leaves.get(step, ()):
            del held[slot]
            for cache in (*found.caches, *expected.caches):
                cache.clear([slot])
        rows = {slot: nexts[slot] for slot in held}
        rows |= {slot: token_ids[:length] for slot, length in joins.get(step, ())}
        batch = [Segment(slot, held.get(slot, 0), len(ids)) for slot, ids in rows.items()]
        ids = torch.cat(list(rows.values()))
        logits, wanted = found.logits(ids, batch), expected.logits(ids, batch)
        assert (logits - wanted).abs().max() <= TOLERANCE
        ends = torch.tensor([len(each) for each in rows.values()]).cumsum(0) - 1
        chosen = wanted[ends].argmax(-1)
        nexts = dict(zip(rows, chosen.unsqueeze(1), strict=True))
        held = {slot: held.get(slot, 0) + len(ids) for slot, ids in rows.items()}
    assert {rows for rows, _ in recorded(found.caches[0])} == {1, 2, 4, 8}


def prefill(pipeline, token_ids, lengths):
    batch = [Segment(slot, 0, length) for slot, length in lengths.items()]
    ids = torch.cat([token_ids[:length] for length in lengths.values()])
    return pipeline.logits(ids, batch)


def contents(cache):
    return [each.clone() for each in (*cache.keys, *cache.values)]


def test_padding_changes_nobodys_cache(gqa, gpu_pipeline, token_ids):
    pipeline = gpu_pipeline(gqa, num_slots=4)
    lengths = {0: 5, 1: 11, 2: 3, 3: 7}
    prefill(pipeline, token_ids, lengths)
    cache = pipeline.caches[0]
    before = contents(cache)
    pipeline.logits(token_ids[:3], [Segment(slot, lengths[slot], 1) for slot in (3, 0, 1)])
    for old, new in zip(before, contents(cache), strict=True):
        changed = (old != new).flatten(3).any(-1).any(1).nonzero().tolist()
        own = [[slot, lengths[slot]] for slot in (0, 1, 3)]
        assert [place for place in changed if place[0] != cache.num_slots] == own
        assert {tuple(place) for place in changed if place[0] == cache.num_slots} <= {(4, 0)}


@pytest.mark.parametrize("stage", [0, 1])
def test_padding_holds_nothing_of_requests_that_left(gqa, gpu_pipeline, token_ids, stage):
    pipeline = gpu_pipeline(gqa, 2, num_slots=4)
    prefill(pipeline, token_ids, dict.fromkeys(range(4), 3))
    pipeline.logits(token_ids[:4], [Segment(slot, 3, 1) for slot in range(4)])
    cache = pipeline.caches[stage]
    (step,) = cache.recordings[cuda_kernels.GRAPHS].steps.values()
    assert step._inputs[3].any()
    padding = []
    for position in (4, 5):
        ids = token_ids[position : position + 3]
        pipeline.logits(ids, [Segment(slot, position, 1) for slot in range(3)])
        assert not step._inputs[3].any()
        padding.append([each[cache.num_slots].clone() for each in (*cache.keys, *cache.values)])
    assert all(torch.equal(*both) for both in zip(*padding, strict=True))


def test_a_step_never_leaves_its_memory(gqa, gpu_pipeline, token_ids):
    pipeline = gpu_pipeline(gqa)
    prefill(pipeline, token_ids, {0: 9})
    places = []
    for position in range(9, 14):
        pipeline.logits(token_ids[:1], [Segment(0, position, 1)])
        (step,) = pipeline.caches[0].recordings[cuda_kernels.GRAPHS].steps.values()
        places.append((step._inputs.data_ptr(), step._places.data_ptr()))
    assert len(set(places)) == 1


def test_results_outlive_the_next_step(gqa, gpu_pipeline, token_ids):
    pipeline = gpu_pipeline(gqa)
    prefill(pipeline, token_ids, {0: 9})
    (shard,), (cache,), ids = pipeline.shards, pipeline.caches, token_ids.numpy()
    first = shard.forward(ids[:1], [Segment(0, 9, 1)], cache)
    copy = first.clone()
    shard.forward(ids[1:2], [Segment(0, 10, 1)], cache)
    assert torch.equal(first, copy)


@pytest.mark.parametrize("family", ["gpt2", "llama-untied-gqa"])
def test_generation_goes_on_after_a_truncation(
    make_oracle, gpu_pipeline, reference, token_ids, family
):
    found, expected = (make(make_oracle(family), 2) for make in (gpu_pipeline, reference))
    tokens, logits = expected.greedy(token_ids, 12)
    found.greedy(token_ids, 12)
    for cache in found.caches:
        cache.truncate(0, len(token_ids) + 2)
        assert not any(each[0, :, len(token_ids) + 2 :].any() for each in contents(cache))
    again = torch.cat(
        [
            found.logits(torch.tensor([token]), [Segment(0, len(token_ids) + 2 + at, 1)])
            for at, token in enumerate(tokens[2:11])
        ]
    )
    assert (again - logits[3:]).abs().max() <= TOLERANCE


def test_clearing_and_releasing_leave_nothing_behind(gqa, gpu_pipeline, token_ids):
    pipeline = gpu_pipeline(gqa, num_slots=2)
    prefill(pipeline, token_ids, {0: 5, 1: 6})
    pipeline.logits(token_ids[:2], [Segment(0, 5, 1), Segment(1, 6, 1)])
    cache, memory = pipeline.caches[0], [*pipeline.caches[0].keys, *pipeline.caches[0].values]
    cache.clear([1])
    assert not any(each[1].any() for each in memory)
    assert all(each[0].any() for each in memory)
    cache.release()
    assert not any(each[:2].any() for each in memory)
    assert not cache.recordings.keys()


def test_a_second_session_starts_afresh(gqa, gpu_pipeline, reference, token_ids):
    pipeline, expected = gpu_pipeline(gqa), reference(gqa).greedy(token_ids, 5)[1]
    for max_seq in (48, 128):
        pipeline.caches = [shard.new_cache(1, max_seq) for shard in pipeline.shards]
        assert (pipeline.greedy(token_ids, 5)[1] - expected).abs().max() <= TOLERANCE
        pipeline.caches[0].release()


def test_no_request_can_name_the_padding(gqa, gpu_pipeline, token_ids):
    pipeline = gpu_pipeline(gqa, num_slots=2)
    with pytest.raises(MessageError, match="slot 2 does not exist: there are 2"):
        pipeline.logits(token_ids[:1], [Segment(2, 0, 1)])
    shard, cache = pipeline.shards[0], pipeline.caches[0]
    assert cache.num_bytes == shard.kv_bytes(2, 128)
    assert cache.keys[0].shape[0] == 3


@pytest.mark.parametrize("family", ["gpt2", "qwen2-qkv-bias"])
def test_bfloat16_weights_lose_only_rounding(
    make_oracle, gpu_pipeline, reference, token_ids, family
):
    oracle = make_oracle(family)
    pipeline = gpu_pipeline(oracle, 2, dtype="bfloat16")
    expected = reference(oracle, 2, dtype="bfloat16")
    whole = [Segment(0, 0, len(token_ids))]
    wanted = expected.logits(token_ids, whole)
    found = pipeline.logits(token_ids, whole)
    assert (found - wanted).square().mean().sqrt() <= 0.02 * wanted.std()
    sizes = [gpu_pipeline(oracle, 2, dtype=each).shards[0] for each in ("bfloat16", "float32")]
    assert sizes[0].num_weight_bytes <= 0.6 * sizes[1].num_weight_bytes


def test_what_halves_cannot_hold_is_attended_to_as_their_greatest():
    values = torch.linspace(-1e6, 1e6, 16)
    values[0], values[15] = -torch.inf, torch.inf
    keys, cached = (torch.zeros(2, 1, 8, 16, dtype=torch.float16) for _ in range(2))
    attention = DecodeAttention(torch.tensor([1]), torch.tensor([0]), 8, HeadShape(1, 1, 16, 0))
    qkv = torch.cat((torch.zeros(16), values, values)).unsqueeze(0)
    out = attention(qkv, keys, cached, torch.empty(1, 16))
    expected = values.clamp(-65504, 65504)
    assert out[0].equal(expected.half().float())
    assert keys[1, 0, 0].equal(expected.half())


def test_int8_is_refused(gqa, gpu_pipeline):
    with pytest.raises(InputError, match="int8 weights have no kernel on a GPU: use bfloat16"):
        gpu_pipeline(gqa, dtype="int8")


def test_a_stage_answers_as_on_the_cpu(gqa, device, token_ids):
    """Wishes for a token, for logits and for nothing, in a prompt's step and in decoding ones."""
    limits = SessionLimits(3, 64, 64, make_codec("F32", gqa.config.hidden_dim))
    first, last = (
        [StageCore(shard, limits) for shard in gqa.computing_with(name).split(2)]
        for name in ("gpu", "torch")
    )
    steps = [
        ([Segment(0, 0, 7), Segment(1, 0, 3), Segment(2, 0, 2)], ["TOKEN", "NOTHING", "LOGITS"]),
        ([Segment(1, 3, 1), Segment(2, 2, 1), Segment(0, 7, 1)], ["LOGITS", "TOKEN", "TOKEN"]),
        ([Segment(2, 3, 1), Segment(1, 4, 1)], ["NOTHING", "NOTHING"]),
        ([Segment(0, 8, 1)], ["TOKEN"]),
    ]
    for number, (batch, wants) in enumerate(steps):
        header = StepHeader(
            StepKind.STEP, number, tuple(batch), tuple(getattr(Want, each) for each in wants)
        )
        rows = token_ids[: sum(each.num_tokens for each in batch)]
        found, expected = (
            stages[1].step(header, stages[0].step(header, [token_ids_to_wire(rows.numpy())]))
            for stages in (first, last)
        )
        assert found[0].data == expected[0].data
        assert [each.spec for each in found] == [each.spec for each in expected]
        for one, other in zip(found[1:], expected[1:], strict=True):
            error = floats(one) - floats(other)
            assert error.abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["abacus", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda0", ""])
def test_other_devices_are_refused(name):
    with pytest.raises(InputError, match=f"--device {name}: use cpu, cuda or cuda:N"):
        find_gpu(name)


def test_a_missing_gpu_is_told_apart_from_a_missing_build(monkeypatch, gqa):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="--device cuda: this torch was built without CUDA"):
        choose_kernels("auto", gqa.config.head_dim, "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda:1: torch finds no GPU"):
        choose_kernels("auto", gqa.config.head_dim, "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--device cuda:1: there are 1 GPUs"):
        choose_kernels("auto", gqa.config.head_dim, "cuda:1")


def test_a_gpu_proves_itself_before_it_is_used(monkeypatch, gqa):
    monkeypatch.setattr(cuda_kernels, "find_gpu", lambda name: torch.device("cpu"))
    assert choose_kernels("auto", gqa.config.head_dim, "cuda").name == "cuda"

    def wrong(self, x, out, residual=None):
        return torch.mm(x, self._weight, out=out)

    monkeypatch.setattr(cuda_kernels.CudaLinear, "__call__", wrong)
    with pytest.raises(InputError, match="--device cuda: their float32 products are wrong"):
        choose_kernels("auto", gqa.config.head_dim, "cuda")


def test_kernels_of_the_cpu_are_refused_on_a_gpu(monkeypatch, gqa):
    monkeypatch.setattr(cuda_kernels, "find_gpu", torch.device)
    with pytest.raises(InputError, match="--kernels torch: for cpu only, leave it out on cuda:0"):
        choose_kernels("torch", gqa.config.head_dim, "cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_float32_is_never_shortened_on_a_gpu():
    CudaKernels(torch.device("cuda"))
    a, b = torch.randn(256, 512), torch.randn(512, 256)
    error = (a.cuda() @ b.cuda()).cpu() - a.double() @ b.double()
    assert error.abs().max() <= 1e-4  # TF32: 3e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_copies_to_a_gpu_and_back_do_not_race_with_what_is_computed():
    kernels = CudaKernels(torch.device("cuda"))
    for value in range(50):
        product = torch.full((2048, 2048), 1.0, device="cuda")
        for _ in range(5):
            product = product @ product / 2048
        moved = kernels.to_device(np.full((512, 576), value, np.float32))
        (found,) = kernels.to_host(moved + product[0, 0])
        assert (found == value + 1).all()
