"""A stage whose orchestrator holds the ends of the model takes rows, returns rows, and no token."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.errors import MessageError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.ends import NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import StepGate
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import SessionLimits, expected_inputs, token_specs
from pipeline.protocol.step_results import expected_results
from pipeline.stage.session_admission import expect_step
from pipeline.stage.worker_setup import new_core
from tests.pipeline.stage import lane_rig
from tests.pipeline.stage.lane_rig import Stage, run_both
from transport.errors import FrameError
from transport.tensor_frames import DType, TensorSpec

WIDTH = 64
LIMITS = SessionLimits(4, 32, 32, make_codec("F32", WIDTH), has_client_ends=True)
ROWS = LIMITS.codec.specs(3)
FORBIDDEN = [
    Want.TOKEN,
    Want.LOGITS,
    Want.DRAWN,
    Want(Result.DRAWN, 1, 2, 1),
    Want(Result.LOGPROBS, 1, 2, 0),
    Want(Result.LOGPROBS, 1, 0, 3),
]


def header(want, kind=StepKind.STEP):
    return StepHeader(kind, 1, (Segment(0, 0, 3),), (want,))


def gate(stage_idx=0):
    def expect(header, specs):
        expect_step(header, specs, limits=LIMITS, stage_idx=stage_idx, num_stages=2)

    return StepGate(LIMITS, expect)


@pytest.mark.parametrize("stage_idx", [0, 1])
@pytest.mark.parametrize("want", FORBIDDEN, ids=str)
def test_what_only_a_head_could_answer_is_refused_by_every_stage(stage_idx, want):
    for kind in (StepKind.STEP, StepKind.REPLAY):
        with pytest.raises(FrameError):
            gate(stage_idx).check(encode_step(header(want, kind)), ROWS)
    with pytest.raises(FrameError, match=rf"wants {want.result.name}: the split is client"):
        gate(stage_idx).check(encode_step(header(want)), ROWS)


@pytest.mark.parametrize("want", [Want.HIDDEN, Want(Result.HIDDEN, 3), Want.NOTHING], ids=str)
def test_rows_are_taken_and_returned(want):
    gate().check(encode_step(header(want)), ROWS)
    sizes = expected_results(header(want), 256, WIDTH)
    assert sizes[1:] == ((TensorSpec(DType.F32, (want.rows, WIDTH)),) if want else ())


@pytest.mark.parametrize("stage_idx", [0, 1])
def test_token_ids_are_refused_wherever_they_are(stage_idx):
    more = (TensorSpec(DType.U32, (3,)), TensorSpec(DType.U8, (200,)), *token_specs(0))
    for specs in (token_specs(3), *((*ROWS, each) for each in more)):
        with pytest.raises(FrameError, match="expected"):
            gate(stage_idx).check(encode_step(header(Want.HIDDEN)), specs)
    assert expected_inputs(header(Want.HIDDEN), LIMITS, is_first=True) == ROWS


def test_there_is_no_room_for_what_is_asked_of_a_last_stage():
    assert LIMITS.max_tensor_bytes == 32 * WIDTH * 4


@pytest.fixture(params=range(3), ids=["first", "middle", "last"])
async def stages(request, tiny_model, monkeypatch):
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    monkeypatch.setattr(lane_rig, "LIMITS", LIMITS)
    config, idx = load_config(tiny_model), request.param
    layers = ((0, 1), (1, 3), (3, 4))[idx]
    shard = load_shard(
        tiny_model, config, *layers, kernels="native", ends=NO_ENDS, expected_hashes=None
    )
    made = [Stage(shard, idx, has_lane=has_lane) for has_lane in (True, False)]
    yield made
    for stage in made:
        await stage.aclose()


async def prefill(stages):
    wants = (Want.HIDDEN, Want.NOTHING, Want.HIDDEN)
    return await run_both(stages, 0, (0, 0, 3), (1, 0, 5), (2, 0, 1), wants=wants)


async def test_steps_of_one_token_go_straight_and_come_out_the_same(stages):
    straight, ordinary = stages
    _, outputs = await prefill(stages)
    is_last = straight.idx == 2
    assert [spec.shape for spec, _ in outputs] == ([(0,), (2, WIDTH)] if is_last else [(9, WIDTH)])
    held = {0: 3, 1: 5, 2: 1}
    batches = [[0], [0], [2], [0, 1], [1, 0], [2, 1], [0]]
    for number, slots in enumerate(batches, 1):
        segments = [(slot, held[slot], 1) for slot in slots]
        _, outputs = await run_both(stages, number, *segments, wants=Want.HIDDEN)
        rows = np.frombuffer(outputs[-1][1], "<f4").reshape(len(slots), WIDTH)
        assert np.isfinite(rows).all()
        for slot in slots:
            held[slot] += 1
    assert ordinary.num_ordinary == 1 + len(batches)
    assert straight.num_ordinary < ordinary.num_ordinary - 2


@pytest.mark.parametrize("idx", range(2))
def test_a_stage_keeps_what_it_sent_where_there_is_one_behind_it(tiny_model, idx):
    config = load_config(tiny_model)
    layers = (idx * 2, idx * 2 + 2)
    shard = load_shard(tiny_model, config, *layers, ends=NO_ENDS, expected_hashes=None)
    manifest = SimpleNamespace(stages=(None, None))
    setup = SimpleNamespace(
        shard=shard, max_kv_bytes=1 << 30, stage_idx=idx, manifest=manifest,
        session_memory=None, while_replaying=nullcontext,
    )  # fmt: skip
    assert (new_core(setup, LIMITS).log is None) is (idx == 1)


async def test_rows_that_nobody_wants_do_not_come_back(stages):
    await prefill(stages)
    wants = (Want.NOTHING, Want.HIDDEN)
    for number, position in enumerate((3, 4), 1):
        segments = ((0, position, 1), (2, position - 2, 1))
        _, outputs = await run_both(stages, number, *segments, wants=wants)
        shapes = [spec.shape for spec, _ in outputs]
        assert shapes == ([(0,), (1, WIDTH)] if stages[0].idx == 2 else [(2, WIDTH)])


async def test_the_straight_way_takes_no_other_want_either(stages):
    straight, _ = stages
    await prefill(stages)
    for number, position in enumerate((3, 4), 1):
        await run_both(stages, number, (0, position, 1), wants=Want.HIDDEN)
    with pytest.raises((FrameError, MessageError), match="wants TOKEN"):
        await lane_rig.run_one(straight, 3, (0, 5, 1))
