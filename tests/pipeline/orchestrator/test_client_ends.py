"""With the ends of a model at home a text is the same, bit for bit, and answers are checked."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.limits import Limits
from pipeline.engine.step import Step
from pipeline.errors import InputError, MessageError, RequestFailed
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import NO_TOKEN, Result, Want
from pipeline.protocol.step_header import StageTiming, StepHeader, StepKind
from pipeline.protocol.step_results import result_to_wire
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore

LIMITS = Limits(num_slots=3, max_seq_len=96, chunk_tokens=8, num_stages=2)
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3, logprobs=2),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=4),
    SamplingParams(logit_bias={7: 5.0}, frequency_penalty=0.5),
    SamplingParams(temperature=1.2, min_tokens=3, seed=5),
]
FAMILIES = ["gpt2", "llama-untied-gqa", "llama-tied-llama3-rope"]


def load(oracle, start, end, ends=None, dtype="float32"):
    return load_shard(
        oracle.directory, oracle.config, start, end, dtype=dtype, kernels=oracle.kernels,
        ends=ends, expected_hashes=None,
    )  # fmt: skip


def new_pipeline(oracle, bounds, *, is_client, wire="F32", dtype="float32"):
    codec = make_codec(wire, oracle.config.hidden_dim)
    limits = LIMITS.for_session(codec, has_client_ends=is_client)
    held = NO_ENDS if is_client else None
    edges = [0, *bounds, oracle.config.num_layers]
    shards = [load(oracle, *edge, held, dtype) for edge in itertools.pairwise(edges)]
    cores = [StageCore(shard, limits) for shard in shards]
    if not is_client:
        return LocalPipeline(cores)
    return LocalPipeline(cores, ClientEnds(load(oracle, 0, 0, BOTH_ENDS, dtype), codec))


async def texts(pipeline, sampling=SAMPLING, num_tokens=14):
    engine, heard = PipelineEngine(LIMITS), [[] for _ in sampling]
    for index, each in enumerate(sampling):
        prompt_ids = tuple(range(3 + index, 24 + 2 * index))
        request = Generation(prompt_ids, num_tokens, frozenset(), each)
        engine.submit(request, heard[index].append)
    await engine.drain(pipeline)
    return [[(each.token_id, each.logprob, each.top) for each in outputs] for outputs in heard]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bounds", [(), (2,), (1, 3)], ids=["1 stage", "2 stages", "3 stages"])
async def test_a_batch_says_what_it_says_where_stages_hold_the_ends(
    make_oracle, kernels, family, bounds
):
    oracle = make_oracle(family).computing_with(kernels)
    expected = await texts(new_pipeline(oracle, bounds, is_client=False))
    assert await texts(new_pipeline(oracle, bounds, is_client=True)) == expected
    assert len({token for token, _, _ in itertools.chain(*expected)}) > 10


@pytest.mark.parametrize("is_client", [True, False])
@pytest.mark.parametrize(
    ("wire", "dtype"), [("F32", "float32"), ("I8", "bfloat16"), ("BF16", "int8")], ids=str
)
async def test_texts_go_on_from_each_other_and_are_those_of_cold_stages(
    make_oracle, native, wire, dtype, is_client
):
    """In turn in their slots, side by side from copies; on every wire, wherever ends are held."""
    oracle = make_oracle("llama-untied-gqa").computing_with(native)
    text = tuple(range(3, 43))
    prompts = [text, (*text, 5, 6), (*text[:30], 9), (*text[:33], 9, 9)]

    async def ask(engine, pipeline, salt):
        heard = []
        for prompt_ids in prompts:
            heard.append([])
            request = Generation(prompt_ids, 9, frozenset(), SAMPLING[1], salt=salt)
            engine.submit(request, heard[-1].append)
        await engine.drain(pipeline)
        return [[(each.token_id, each.logprob, each.top) for each in one] for one in heard]

    pipeline = new_pipeline(oracle, (2,), is_client=is_client, wire=wire, dtype=dtype)
    expected = await ask(PipelineEngine(LIMITS), pipeline, None)
    engine = PipelineEngine(LIMITS, None, PrefixOptions(1.0))
    engine.allow_reuse(is_row_exact=True)
    for num_hits in (3, 7):
        assert await ask(engine, pipeline, b"mine") == expected
        assert engine.stats.num_prefix_hits == num_hits


@pytest.mark.parametrize(
    ("wire", "dtype"), [("BF16", "float32"), ("I8", "float32"), ("F32", "int8")], ids=str
)
async def test_smaller_wires_and_weights_go_with_it(make_oracle, native, wire, dtype):
    oracle = make_oracle("llama-untied-gqa").computing_with(native)
    pipeline = new_pipeline(oracle, (2,), is_client=True, wire=wire, dtype=dtype)
    found = await texts(pipeline)
    assert all(len(text) == 14 for text in found)
    if wire == "F32":
        assert found == await texts(new_pipeline(oracle, (2,), is_client=False, dtype=dtype))


@pytest.fixture(scope="module")
def ends(make_oracle, native):
    oracle = make_oracle("gpt2").computing_with(native)
    return ClientEnds(load(oracle, 0, 0, BOTH_ENDS), make_codec("F32", oracle.config.hidden_dim))


WANTS = (Want.TOKEN, Want.NOTHING, Want.LOGITS)
SEGMENTS = (Segment(0, 4, 2), Segment(1, 0, 3), Segment(2, 7, 1))
STEP = Step(StepHeader(StepKind.STEP, 9, SEGMENTS, WANTS), (5, 6, 7, 8, 9, 10), (1, 2))
TIMINGS = (StageTiming(1, 2, 3),)


def answer(hidden):
    nothing = np.empty(0, np.float32)
    tensors = result_to_wire(
        [], logits=[], hidden=hidden, logprobs=nothing, top_ids=nothing.astype(np.uint32)
    )
    wants = (Want.HIDDEN, Want.NOTHING, Want.HIDDEN)
    return STEP.header._replace(wants=wants, timings=TIMINGS), tensors


def test_a_step_leaves_with_rows_and_wants_rows(ends):
    header, (rows,) = ends.begin(STEP)
    assert header.segments == SEGMENTS
    assert header.wants == (Want.HIDDEN, Want.NOTHING, Want.HIDDEN)
    assert (rows.spec,) == make_codec("F32", 64).specs(6)


def test_what_comes_back_is_what_the_step_wanted(ends):
    hidden = np.random.default_rng(1).standard_normal((2, 64), np.float32)
    result = ends.end(STEP, *answer(hidden))
    assert result.header == STEP.header._replace(timings=TIMINGS)
    token, logits = result.segments()
    assert len(token.token_ids) == 1
    assert logits.logits.shape == (1, 101)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 8},
        {"wants": (Want.TOKEN, Want.NOTHING, Want.HIDDEN)},
        {"wants": (Want.HIDDEN, Want.NOTHING, Want(Result.HIDDEN, 2))},
        {"segments": (Segment(0, 3, 2), *SEGMENTS[1:])},
        {"kind": StepKind.REPLAY},
    ],
    ids=str,
)
def test_an_answer_to_something_else_is_refused(ends, change):
    """A row of before, sent again under the header it had, most of all."""
    header, tensors = answer(np.ones((2, 64), np.float32))
    with pytest.raises(MessageError, match="something else than step 9"):
        ends.end(STEP, header._replace(**change), tensors)


def test_ids_the_model_has_no_row_for_never_reach_the_table(ends):
    with pytest.raises(InputError, match="outside the vocabulary of 101"):
        ends.begin(replace(STEP, token_ids=(101, 6, 7, 8, 9, 10)))


class Lying:
    """A pipeline whose last stage answers one step with other rows."""

    def __init__(self, pipeline, change):
        self._pipeline, self._change = pipeline, change
        core = pipeline._stages[-1]
        self._step, core.step = core.step, self._lie
        self.num_steps = 0

    def _lie(self, header, tensors):
        outputs = self._step(header, tensors)
        self.num_steps += header.kind is StepKind.STEP
        if self.num_steps != 12 or len(outputs) < 2:
            return outputs
        hidden = np.frombuffer(outputs[1].data, "<f4").reshape(outputs[1].spec.shape)
        return answer(self._change(hidden))[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
async def test_rows_that_are_no_numbers_end_their_own_request_alone(make_oracle, native, value):
    oracle = make_oracle("llama-untied-gqa").computing_with(native)
    honest = await texts(new_pipeline(oracle, (2,), is_client=True))
    pipeline = new_pipeline(oracle, (2,), is_client=True)

    def spoil(hidden):
        hidden = hidden.copy()
        hidden[0, 3] = value
        return hidden

    lying = Lying(pipeline, spoil)
    engine, heard = PipelineEngine(LIMITS), [[] for _ in SAMPLING]
    for index, each in enumerate(SAMPLING):
        request = Generation(tuple(range(3 + index, 24 + 2 * index)), 14, frozenset(), each)
        engine.submit(request, heard[index].append)
    await engine.drain(pipeline)
    assert lying.num_steps > 12
    failed = [index for index, outputs in enumerate(heard) if len(outputs) < 14]
    (index,) = failed
    assert isinstance(heard[index][-1], RequestFailed)
    assert "no numbers" in str(heard[index][-1])
    for other in set(range(len(SAMPLING))) - set(failed):
        assert [each.token_id for each in heard[other]] == [token for token, _, _ in honest[other]]


def test_no_token_of_a_row_that_is_no_number(ends):
    hidden = np.full((2, 64), np.nan, np.float32)
    token, _ = ends.end(STEP, *answer(hidden)).segments()
    assert token.token_ids == [NO_TOKEN]
