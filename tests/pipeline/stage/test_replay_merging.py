"""Replays put together: fewer steps, and not a bit of difference."""

import random

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.errors import MessageError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.runtime import all_cpus
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.replay_merging import CatchUp
from pipeline.stage.step_executor import StageCore

LIMITS = SessionLimits(3, 128, 35, make_codec("F32", 64))


@pytest.fixture(params=["native", "torch"])
def shards(request, tiny_model):
    if request.param == "native" and (why := why_not_native()):
        pytest.skip(f"no native kernels: {why}")
    config = load_config(tiny_model)
    return [
        load_shard(tiny_model, config, *layers, kernels=request.param, expected_hashes=None)
        for layers in ((0, 1), (1, 3), (3, 4))
    ]


def new_core(shard, **while_replaying):
    log = ActivationLog(LIMITS.num_slots, LIMITS.max_seq_len, 64)
    return StageCore(shard, LIMITS, None if shard.is_last else log, **while_replaying)


def random_steps(rng, num_steps):
    """Steps of several slots, chunks and single tokens mixed, with their token ids."""
    lengths = [0] * LIMITS.num_slots
    for step in range(num_steps):
        segments = []
        for slot in rng.sample(range(LIMITS.num_slots), rng.randint(1, LIMITS.num_slots)):
            count = min(rng.choice([1, 1, 1, 2, 7]), LIMITS.max_seq_len - lengths[slot])
            segments.append(Segment(slot, lengths[slot], count))
            lengths[slot] += count
        header = StepHeader(StepKind.STEP, step, tuple(segments), (Want.LOGITS,) * len(segments))
        ids = [rng.randrange(255) for _ in range(header.num_tokens)]
        yield header, (token_ids_to_wire(ids),)


def through(cores, header, tensors):
    for core in cores:
        tensors = core.step(header, tensors)
    return bytes(tensors[-1].data)


@pytest.mark.parametrize("seed", range(3))
def test_two_stages_that_catch_up_hold_what_the_lost_ones_held(shards, seed):
    """The first of three stages replays through a new second one to a new third."""
    steps = list(random_steps(random.Random(seed), 20))
    first, *lost = cores = [new_core(shard) for shard in shards]
    for step in steps[:-1]:
        through(cores, *step)
    second, third = (new_core(shard, while_replaying=all_cpus) for shard in shards[1:])
    num_forwards = []
    forward = second.shard.forward
    second.shard.forward = lambda *args: (num_forwards.append(1), forward(*args))[1]
    for header, tensors in first.replay(2):
        for each, outputs in second.take(header, copied(tensors)):
            assert each.kind is StepKind.REPLAY
            assert all(not out for _, out in third.take(each, copied(outputs)))
    header, tensors = steps[-1]
    sent = first.step(header, tensors)
    expected = lost[1].step(header, copied(lost[0].step(header, copied(sent))))
    for each, outputs in second.take(header, copied(sent)):
        *_, (last, results) = third.take(each, copied(outputs))
    assert last == header
    assert [bytes(t.data) for t in results] == [bytes(t.data) for t in expected]
    assert third.cache.lengths == second.cache.lengths == lost[0].cache.lengths
    assert [h.segments for h, _ in second.log.replay(2, 64)] == [
        h.segments for h, _ in lost[0].log.replay(2, 64)
    ]
    if shards[0].kernels.is_row_exact:
        assert len(num_forwards) < len(steps)


def copied(tensors):
    """As they come off a wire: storage of their own, which the next frame overwrites."""
    return [type(t)(t.spec, memoryview(bytearray(t.data))) for t in tensors]


def test_a_step_left_out_is_noticed_when_it_should_have_come():
    steps = CatchUp(100)
    rows = np.zeros((2, 4), np.float32)
    steps.add(header(Segment(0, 5, 2)), rows, (5, 0))
    with pytest.raises(MessageError, match="holds 7 tokens"):
        steps.add(header(Segment(0, 8, 2)), rows, (5, 0))
    with pytest.raises(MessageError, match="holds 0 tokens"):
        CatchUp(100).add(header(Segment(1, 1, 2)), rows, (5, 0))


def test_merging_groups_rows_by_slot_and_splitting_undoes_it():
    steps = CatchUp(6)
    taken = [header(Segment(0, 0, 2), Segment(2, 4, 1)), header(Segment(2, 5, 1), Segment(0, 2, 1))]
    values = np.arange(5.0).reshape(5, 1)
    steps.add(taken[0], values[:3], (0, 0, 4))
    steps.add(taken[1], values[3:], (0, 0, 4))
    segments, inputs = steps.merged()
    assert segments == (Segment(0, 0, 3), Segment(2, 4, 2))
    assert inputs[:, 0].tolist() == [0, 1, 4, 2, 3]
    split = [(each, rows[:, 0].tolist()) for each, rows in steps.split(inputs * 10)]
    assert split == [(taken[0], [0, 10, 20]), (taken[1], [30, 40])]
    assert not steps.has_room(header(Segment(0, 3, 2)))
    assert steps.has_room(header(Segment(0, 3, 1)))


def header(*segments):
    return StepHeader(StepKind.REPLAY, 0, segments, (Want.NOTHING,) * len(segments), until=2)
