"""The straight way through a stage does what the ordinary way does, or leaves it to that."""

import time

import pytest
import trio

from pipeline.codecs.registry import make_codec
from pipeline.errors import MessageError
from pipeline.kernels.base import FramePlace
from pipeline.models import rope
from pipeline.protocol.batch import Segment
from pipeline.protocol.last_stage_inputs import Asked, asked_to_wire
from pipeline.protocol.links import receive_step, send_step
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import (
    StepHeader,
    StepKind,
    decode_step,
    encode_step,
)
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.sampling.draw import Draw
from pipeline.sampling.params import SamplingParams
from pipeline.stage.data_channels import LinkBroken
from pipeline.stage.step_executor import StageCore
from tests.pipeline.stage.lane_rig import (
    LIMITS,
    POSITIONS,
    SLOTS,
    WIDTH,
    Stage,
    header,
    prefill,
    rows,
    run_both,
    run_one,
)
from transport.errors import FrameError
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import Frame, FrameKind, encode_frame


@pytest.fixture(params=range(3), ids=["first", "middle", "last"])
async def stages(request, shards):
    idx = request.param
    made = [Stage(shards[idx], idx, has_lane=has_lane) for has_lane in (True, False)]
    yield made
    for stage in made:
        await stage.aclose()


async def test_steps_of_one_token_go_straight_and_come_out_the_same(stages):
    await prefill(stages)
    batches = [[0], [0], [2], [0, 1], [1, 0], [0], [2, 0, 1], [1], [0, 1, 2], [1, 2]]
    held = {0: 3, 1: 5, 2: 1}
    for number, slots in enumerate(batches, 1):
        await run_both(stages, number, *((slot, held[slot], 1) for slot in slots))
        for slot in slots:
            held[slot] += 1
    straight, ordinary = stages
    assert ordinary.num_ordinary == 1 + len(batches)
    # the prompts, the first of each size, and those that come with a new key
    assert straight.num_ordinary == 1 + 3 + 2


async def test_what_is_no_such_step_takes_the_ordinary_way(stages):
    straight, _ = stages
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1))
    await run_both(stages, 2, (0, 4, 1), wants=Want.LOGITS)
    await run_both(stages, 3, (0, 5, 1), wants=Want.NOTHING)
    await run_both(stages, 3, (1, 5, 1), wants=Want.HIDDEN)
    await run_both(stages, 4, (0, 6, 2))
    await run_both(stages, 5, (0, 8, 1))  # with a new key
    taken = straight.num_ordinary
    await run_both(stages, 6, (0, 9, 1))
    assert straight.num_ordinary == taken


async def test_a_step_at_a_position_whose_angles_are_not_known_takes_the_ordinary_way(
    stages, monkeypatch
):
    monkeypatch.setattr(rope, "TABLE_STEP", 4)
    shard = stages[0].core.shard
    monkeypatch.setattr(shard._angles, "_tables", {})
    await prefill(stages)
    reached, ordinary = [], []
    for position in range(3, 14):
        before = stages[0].num_ordinary
        await run_both(stages, position, (0, position, 1))
        ordinary.append(stages[0].num_ordinary > before)
        reached.append(stages[0].core.cache.ledger.reach[0])
    assert reached == [8] * 5 + [12] * 4 + [16] * 2
    assert ordinary[5]
    assert ordinary[9]
    assert not all(ordinary)


async def test_a_session_may_begin_with_a_text_of_one_token_whose_row_is_wanted(stages):
    straight, _ = stages
    await run_both(stages, 0, (0, 0, 1), wants=Want.HIDDEN)
    await run_both(stages, 1, (1, 0, 1))
    await run_both(stages, 2, (1, 1, 1))
    taken = straight.num_ordinary
    await run_both(stages, 3, (1, 2, 1))
    assert straight.num_ordinary == taken


@pytest.mark.parametrize(
    ("want", "asked"),
    [
        (Want.DRAWN, Asked(draws=(Draw(SamplingParams(temperature=1.0), (0.75,)),))),
        (Want(Result.DRAWN, 1, 3, 1), Asked(draws=(Draw(SamplingParams(), (0.5,)),))),
        (Want(Result.LOGPROBS, 1, 2, 3), Asked((7, 8, 9))),
    ],
    ids=str,
)
async def test_what_is_asked_of_the_last_stage_comes_through_between_plain_steps(
    stages, want, asked
):
    await prefill(stages)
    for number, position in enumerate(range(3, 9), 1):
        is_plain = number % 2
        inputs = rows(stages[0].core.shard, 1, number)
        tensors = inputs if is_plain else (*inputs, *asked_to_wire(asked))
        fields = {} if is_plain else {"wants": want}
        _, outputs = await run_both(stages, number, (0, position, 1), tensors=tensors, **fields)
        if not (is_plain or stages[0].core.shard.is_last):
            behind = [(tensor.spec, bytes(tensor.data)) for tensor in tensors[1:]]
            assert outputs[1:] == behind  # as it came
    straight, ordinary = stages
    assert straight.num_ordinary < ordinary.num_ordinary


@pytest.mark.parametrize(
    ("segments", "fields"),
    [
        ([(0, 3, 1)], {}),  # a step again
        ([(0, 5, 1)], {}),
        ([(3, 31, 1)], {}),
        ([(1 << 15, 0, 1)], {}),
    ],
)
async def test_a_step_that_does_not_fit_is_refused_in_the_ordinary_words(stages, segments, fields):
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1))
    said = []
    for stage in stages:
        await send_step(
            stage.source, header(stage, 2, *segments, **fields), rows(stage.core.shard, 1, 2)
        )
        with pytest.raises((MessageError, FrameError)) as refusal:
            await stage.serve()
        said.append((type(refusal.value), str(refusal.value)))
    assert said[0] == said[1]
    assert stages[0].core.cache.lengths == stages[1].core.cache.lengths


async def test_a_token_outside_the_vocabulary_is_refused_in_the_ordinary_words(stages):
    if not stages[0].core.shard.is_first:
        return
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1))
    for stage in stages:
        await send_step(stage.source, header(stage, 2, (0, 4, 1)), (token_ids_to_wire([1 << 20]),))
        with pytest.raises(MessageError, match="outside the vocabulary"):
            await stage.serve()


async def test_steps_sent_at_once_are_all_served_in_order(stages):
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1))
    received = []
    for stage in stages:
        headers = [header(stage, number, (0, number + 2, 1)) for number in range(2, 9)]
        for each in headers:
            await send_step(stage.source, each, rows(stage.core.shard, 1, each.step))
        await stage.serve()
        seen = []
        for each in headers:
            result, outputs = await receive_step(stage.sink, stage.result_gate)
            assert result.step == each.step
            seen.append([bytes(tensor.data) for tensor in outputs])
        received.append(seen)
    assert received[0] == received[1]


async def test_the_side_that_breaks_is_named(stages):
    straight, _ = stages
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1))
    await straight.sink.aclose()
    await send_step(
        straight.source, header(straight, 2, (0, 4, 1)), rows(straight.core.shard, 1, 2)
    )
    with pytest.raises(LinkBroken, match="downstream"):
        await straight.lane.serve()
    straight.source._wire.close()
    with pytest.raises(LinkBroken, match="upstream"):
        await straight.lane.serve()


async def test_other_wires_and_kernels_have_no_lane(shards):
    plain = StageCore(shards[1], LIMITS)
    assert plain.decodes_in_place
    limits = SessionLimits(SLOTS, POSITIONS, 32, make_codec("BF16", WIDTH))
    assert not StageCore(shards[1], limits).decodes_in_place
    replay = StepHeader(StepKind.REPLAY, 0, (Segment(0, 0, 1),), (Want.NOTHING,), until=1)
    plain.take(replay, rows(shards[1], 1, 0))
    assert not plain.decodes_in_place  # what is put off comes first


async def test_whatever_byte_of_a_frame_is_changed_it_is_served_only_as_what_it_is(stages):
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1), (1, 5, 1))
    core = stages[0].core
    (forms,) = stages[0].lane._forms.values()
    each = header(stages[0], 2, (0, 4, 1), (1, 6, 1))
    frame = Frame(FrameKind.DATA, encode_step(each), rows(core.shard, 2, 2))
    good = encode_frame(frame)[0]
    allowed = {Want.TOKEN}
    if not core.shard.is_last:  # what comes without a tensor of its own
        allowed |= {Want.NOTHING, Want.LOGITS, Want.HIDDEN}
    served = 0
    start, end = forms.inputs.header_start, forms.inputs.header_stop
    first_row = forms.inputs.places[0][0]
    for at in range(first_row):
        for mask in (1, 2, 4, 0x80):
            changed = bytearray(good)
            changed[at] ^= mask
            view = memoryview(changed)
            try:
                step = decode_step(
                    bytes(view[forms.inputs.header_start : forms.inputs.header_stop])
                )
            except MessageError:
                step = header(stages[0], 0)
            is_next = (
                step.kind is StepKind.STEP
                and allowed.issuperset(step.wants)
                and sorted(step.segments) == [Segment(0, 4, 1), Segment(1, 6, 1)]
            )
            is_framed = changed[:start] == good[:start] and not any(changed[end:first_row])
            expected = is_framed and is_next
            compute_ns = forms.serve(view, 1, 2)
            assert (compute_ns >= 0) is expected, (at, mask)
            served += expected
    assert served > 8 * 4  # any step number, any timing
    assert forms.serve(memoryview(good)[:-1], 1, 2) == -1
    places = [
        FramePlace(form.plain, form.header_start, form.places[0][0])
        for form in (forms.outputs, forms.inputs)
    ]
    with pytest.raises(ValueError, match="forms"):
        core.server(2, *places)(memoryview(good), 1, 2)


async def test_a_burst_of_steps_leaves_others_their_turns(shards, monkeypatch):
    stage = Stage(shards[0], 0, has_lane=True, policy=RekeyPolicy())
    await run_one(stage, 0, (0, 0, 1))
    (forms,) = stage.lane._forms.values()
    compute = forms.serve

    def slowly(*args):
        time.sleep(0.01)
        return compute(*args)

    monkeypatch.setattr(forms, "serve", slowly)
    count = 30  # of which a busy machine may sleep through several at once
    for number in range(1, count):
        each = header(stage, number, (0, number, 1))
        await send_step(stage.source, each, rows(stage.core.shard, 1, number))
    seen = set()

    async def watch():
        while True:
            seen.add(stage.core.cache.lengths[0])
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await stage.serve()
        nursery.cancel_scope.cancel()
    assert stage.num_ordinary == 1
    assert stage.core.cache.lengths[0] == count
    assert len(seen) >= 4
    await stage.aclose()


async def test_a_wiped_lane_holds_nothing_of_its_steps(stages):
    await prefill(stages)
    await run_both(stages, 1, (0, 3, 1))
    await run_both(stages, 2, (0, 4, 1))
    lane = stages[0].lane
    (forms,) = lane._forms.values()
    assert any(forms.rows)
    lane.wipe()
    assert not any(forms.rows)
