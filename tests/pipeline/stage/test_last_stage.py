"""Whatever the last stage returns is what logits at home would have given."""

import random
from functools import partial

import numpy as np
import pytest

import pipeline.stage.last_stage
from pipeline.codecs.registry import make_codec
from pipeline.errors import MessageError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.last_stage_inputs import Asked
from pipeline.protocol.result_kinds import NO_TOKEN, Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, expected_inputs, step_tensors
from pipeline.protocol.step_results import expected_results, step_result
from pipeline.sampling.draw import Draw, draw
from pipeline.sampling.filters import log_softmax, most_likely
from pipeline.sampling.params import SamplingParams
from pipeline.stage.last_stage import Scored, results_of
from pipeline.stage.step_executor import StageCore
from transport.tensor_frames import Tensor

SLOTS, WIDTH = 8, 64
LIMITS = SessionLimits(SLOTS, 64, 64, make_codec("F32", WIDTH))


@pytest.fixture(scope="module", params=["native", "torch"])
def shards(request, tiny_model):
    config = load_config(tiny_model)
    try:
        return [
            load_shard(tiny_model, config, *layers, kernels=request.param, expected_hashes=None)
            for layers in ((0, 1), (1, 3), (3, 4))
        ]
    except Exception as error:  # a machine without them
        pytest.skip(str(error))


def run(cores, header, token_ids, asked):
    """A step through all stages, every tensor held against what each of them expects."""
    tensors = step_tensors(header, token_ids, asked)
    for core in cores:
        specs = tuple(tensor.spec for tensor in tensors)
        is_first = core.shard.is_first
        assert specs == expected_inputs(header, LIMITS, is_first=is_first, declared=specs)
        tensors = core.step(header, tensors)
    specs = tuple(tensor.spec for tensor in tensors)
    vocab_size = cores[-1].shard.config.vocab_size
    assert specs == expected_results(header, vocab_size, WIDTH)
    return step_result(header, tensors)


def random_draw(rng, num_rows, vocab_size):
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias={} if rng.random() < 0.5 else {rng.randrange(vocab_size): 3.0},
    )
    text = np.array(rng.choices(range(vocab_size), k=7), np.uint32)
    allowed = b""
    if rng.random() < 0.5:
        allowed = rng.randbytes(num_rows * -(-vocab_size // 8))
    uniforms = tuple(rng.random() for _ in range(num_rows))
    drafted = tuple(rng.randrange(vocab_size) for _ in range(num_rows - 1))
    return Draw(params, uniforms, text, rng.randrange(8), drafted, allowed)


def random_want(rng, num_tokens):
    rows = rng.randint(1, num_tokens)
    return rng.choice(
        [
            Want.NOTHING,
            Want(Result.TOKEN, rows),
            Want(Result.LOGITS, rows),
            Want(Result.HIDDEN, rows),
            Want(Result.LOGPROBS, rows, rng.randrange(4), rng.randint(1, 3)),
            Want(Result.DRAWN, rows),
            Want(Result.DRAWN, rows, rng.randrange(4), 1),
        ]
    )


def sameness(shards):
    """Bit for bit where steps of other rows change none, else but for rounding."""
    if shards[0].kernels.is_row_exact:
        return np.testing.assert_array_equal
    return partial(np.testing.assert_allclose, atol=1e-5)


def check(want, part, rows, draws, given, head, same):
    """A segment's part, held against the logits of its rows."""
    assert len(rows) == want.rows
    if want.result is Result.HIDDEN:
        same(head(part.hidden), rows)
    if want.result is Result.LOGITS:
        same(part.logits, rows)
    ids = [[] for _ in rows]
    if want.result is Result.TOKEN:
        assert part.token_ids == [int(row.argmax()) for row in rows]
    if want.result is Result.DRAWN:
        how = next(draws)
        assert part.token_ids == [draw(row, how, index) for index, row in enumerate(rows)]
        ids = [[token_id] * want.num_ids for token_id in part.token_ids]
    if want.result is Result.LOGPROBS:
        ids = [[next(given) for _ in range(want.num_ids)] for _ in rows]
    for index, row in enumerate(rows):
        if want.num_logprobs:
            top = most_likely(row, want.top).tolist()
            expected = log_softmax(row)[[*ids[index], *top]].astype(np.float32)
            assert part.top_ids[index].tolist() == top
            same(part.logprobs[index], expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block_rows", [2, 256])
def test_every_want_is_what_the_logits_would_have_given(shards, seed, block_rows, monkeypatch):
    monkeypatch.setattr(pipeline.stage.last_stage, "BLOCK_ROWS", block_rows)
    rng = random.Random(seed)
    cores, others = ([StageCore(shard, LIMITS) for shard in shards] for _ in range(2))
    vocab_size = shards[-1].config.vocab_size
    kernels = shards[-1].kernels

    def head(hidden):
        return kernels.to_host(shards[-1].logits(kernels.to_device(hidden.copy())))[0]

    lengths = [0] * SLOTS
    for number in range(6):
        most = 1 if number % 2 else 6  # decode steps, and others
        slots = rng.sample(range(SLOTS), rng.randint(1, 4))
        segments = tuple(Segment(slot, lengths[slot], rng.randint(1, most)) for slot in slots)
        wants = tuple(random_want(rng, segment.num_tokens) for segment in segments)
        token_ids = [rng.randrange(vocab_size) for each in segments for _ in range(each.num_tokens)]
        draws = tuple(
            random_draw(rng, want.rows, vocab_size) for want in wants if want.result is Result.DRAWN
        )
        num_given = sum(want.num_given for want in wants)
        asked = Asked(tuple(rng.randrange(vocab_size) for _ in range(num_given)), draws)
        result = run(cores, StepHeader(StepKind.STEP, number, segments, wants), token_ids, asked)
        every = tuple(Want(Result.LOGITS, want.rows) if want else Want.NOTHING for want in wants)
        header = StepHeader(StepKind.STEP, number, segments, every)
        reference = run(others, header, token_ids, Asked())
        parts = zip(result.segments(), reference.segments(), strict=True)
        each_draw, each_given = iter(draws), iter(asked.token_ids)
        for want in filter(None, wants):
            part, logits = next(parts)
            check(want, part, logits.logits, each_draw, each_given, head, sameness(shards))
        for segment in segments:
            lengths[segment.slot] += segment.num_tokens


def test_more_ids_than_there_are_tokens_come_as_none():
    header = StepHeader(StepKind.STEP, 0, (Segment(0, 0, 1),), (Want(Result.LOGPROBS, 1, 5),))
    scored = [Scored(0, np.array([0.5, 0.25, 1.0], np.float32))]
    tensors = results_of(header, Asked(), scored, 3, np.empty((0, WIDTH), np.float32))
    (part,) = step_result(header, tensors).segments()
    assert part.top_ids.tolist() == [[2, 0, 1, NO_TOKEN, NO_TOKEN]]
    assert part.logprobs[0, 3:].tolist() == [-np.inf, -np.inf]


WANTS = [
    Want.TOKEN,
    Want.DRAWN,
    Want(Result.DRAWN, 1, 2, 1),
    Want(Result.LOGPROBS, 1, 2, 1),
]


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("want", WANTS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers_give_no_token_and_harm_no_other(shards, want, bad, num_tokens):
    core = StageCore(shards[-1], LIMITS)
    hidden = np.random.default_rng(0).standard_normal((2 * num_tokens, WIDTH), np.float32)
    header = StepHeader(
        StepKind.STEP, 0, (Segment(0, 0, num_tokens), Segment(1, 0, num_tokens)), (want, Want.TOKEN)
    )
    draws = (Draw(SamplingParams(temperature=1.0), (0.5,)),) * (want.result is Result.DRAWN)
    asked = Asked((1,) * want.num_given, draws)
    behind = step_tensors(header, [0], asked)[1:]
    found = []
    for value in (0.5, bad):
        hidden[num_tokens - 1, 3] = value
        (spec,) = LIMITS.codec.specs(2 * num_tokens)
        rows = Tensor(spec, memoryview(hidden.copy()).cast("B"))
        tensors = StageCore(shards[-1], LIMITS).step(header, (rows, *behind))
        found.append(list(step_result(header, tensors).segments()))
    (good, mate), (none, other) = found
    assert mate.token_ids == other.token_ids
    assert NO_TOKEN not in [*good.token_ids, *mate.token_ids]
    assert none.token_ids == [NO_TOKEN] * want.num_tokens
    assert np.isfinite(good.logprobs).all()
    assert np.isnan(none.logprobs).all()
    assert set(none.top_ids.ravel().tolist()) <= {NO_TOKEN}
    assert core.cache.lengths == (0,) * SLOTS


def test_a_mask_that_leaves_nothing_ends_no_other(shards):
    cores = [StageCore(shard, LIMITS) for shard in shards]
    vocab_size = shards[-1].config.vocab_size
    header = StepHeader(
        StepKind.STEP, 0, (Segment(0, 0, 1), Segment(1, 0, 1)), (Want.DRAWN, Want.DRAWN)
    )
    params = SamplingParams(temperature=1.0)
    masked = Draw(params, (0.5,), allowed=bytes(-(-vocab_size // 8)))
    result = run(cores, header, [1, 1], Asked(draws=(masked, Draw(params, (0.5,)))))
    assert result.token_ids[0] == NO_TOKEN
    assert result.token_ids[1] < vocab_size


def test_what_is_asked_in_vain_leaves_the_kv_state_alone(shards):
    vocab_size = shards[-1].config.vocab_size
    header = StepHeader(StepKind.STEP, 0, (Segment(0, 0, 1),), (Want(Result.LOGPROBS, 1, 0, 1),))
    core = StageCore(shards[-1], LIMITS)
    (spec,) = LIMITS.codec.specs(1)
    behind = step_tensors(header, [0], Asked((vocab_size,)))[1:]
    with pytest.raises(MessageError, match="outside the vocabulary"):
        core.step(header, (Tensor(spec, memoryview(bytes(spec.nbytes))), *behind))
    assert core.cache.lengths == (0,) * SLOTS


def test_a_step_may_be_taken_back_in_part(shards):
    """What follows is computed as if what was taken back had never come."""
    taken, never = ([StageCore(shard, LIMITS) for shard in shards] for _ in range(2))
    prompt = [5, 6, 7, 8, 9]

    def step(number, position, count, kind=StepKind.STEP):
        want = Want(Result.LOGITS, count) if count else Want.NOTHING
        return StepHeader(kind, number, (Segment(2, position, count),), (want,))

    for cores in (taken, never):
        run(cores, step(0, 0, 5), prompt, Asked())
    run(taken, step(1, 5, 4), [1, 2, 3, 4], Asked())
    run(taken, step(2, 6, 0, StepKind.TRUNCATE), [], Asked())
    run(never, step(1, 5, 1), [1], Asked())
    logits = [run(cores, step(3, 6, 2), [30, 31], Asked()).logits for cores in (taken, never)]
    sameness(shards)(*logits)
    with pytest.raises(MessageError, match="cannot keep 9"):
        run(taken, step(4, 9, 0, StepKind.TRUNCATE), [], Asked())
    run(taken, step(4, 0, 0, StepKind.TRUNCATE), [], Asked())
    assert all(core.cache.lengths == (0,) * SLOTS for core in taken)
