"""A worker's sessions are what it was set up with, whatever an orchestrator asks for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.codecs.plain import Plain
from pipeline.errors import MessageError, SessionRefused
from pipeline.protocol.batch import Segment
from pipeline.protocol.messages import Init
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import step_tensors
from pipeline.stage.session_admission import (
    MAX_STEP_TOKENS,
    check_init,
    num_on_this_machine,
    with_memory,
)
from pipeline.stage.worker_setup import new_core
from transport.dial_and_listen import parse_endpoint
from transport.tensor_frames import DType


class Negated(Plain):
    """Rows with the other sign."""

    is_plain_f32 = False

    def encode(self, hidden):
        return super().encode(-hidden)

    def decode(self, tensors):
        return -super().decode(tensors)


@pytest.fixture
def setup(deployment):
    return deployment.setup(0)


def init(setup, **changes):
    fields = {
        "epoch": bytes(16),
        "stage_idx": 0,
        "activation_dtype": "F32",
        "hidden_dim": 64,
        "max_seq_len": 64,
        "num_slots": 2,
        "max_step_tokens": 34,
        "data_out": "127.0.0.1:1",
        "upstream_measurements": {},
        "downstream_measurements": {},
    }
    return Init(**fields | changes)


def test_a_stage_speaks_with_the_codec_that_it_was_handed(setup):
    asked = []

    def make(name, hidden_dim):
        asked.append((name, hidden_dim))
        return Negated(DType.F32, hidden_dim)

    handed = replace(setup, make_codec=make)
    cores = [new_core(each, check_init(init(each), each)[1]) for each in (setup, handed)]
    assert asked == [("F32", 64)]
    plain, negated = (
        core._codec.decode(
            core._codec.encode(
                core.shard.kernels.to_host(
                    core.shard.forward(np.arange(3), (Segment(0, 0, 3),), core.cache)
                )[0]
            )
        )
        for core in cores
    )
    assert (plain == negated).all()
    assert cores[0].decodes_in_place == setup.shard.has_decode_steps
    assert not cores[1].decodes_in_place


def test_a_codec_that_cannot_be_had_refuses_the_session(setup):
    def make(name, hidden_dim):
        raise ValueError(f"no {name} for {hidden_dim}")

    with pytest.raises(MessageError, match="no F32 for 64"):
        check_init(init(setup), replace(setup, make_codec=make))


def test_a_session_for_which_a_stage_has_no_memory_at_all_is_refused(setup):
    least = setup.shard.kv_bytes(1, 1)
    assert check_init(init(setup), replace(setup, max_kv_bytes=least))
    with pytest.raises(SessionRefused, match=f"take {least} bytes of KV memory"):
        check_init(init(setup), replace(setup, max_kv_bytes=least - 1))


def opened(setup, **changes):
    return new_core(setup, check_init(init(setup, **changes), setup)[1])


def step(core, number, *segments):
    wants = (Want.NOTHING,) * len(segments)
    header = StepHeader(StepKind.STEP, number, segments, wants)
    return core.step(header, step_tensors(header, [1] * header.num_tokens))


def test_slots_share_what_the_stage_gives(setup):
    row_bytes = setup.shard.kv_bytes(1, 64) // 64
    core = opened(replace(setup, max_kv_bytes=70 * row_bytes))
    assert (core.num_tokens, core.num_bytes) == (70, 70 * row_bytes)
    step(core, 0, Segment(0, 0, 30))
    step(core, 1, Segment(1, 0, 30))
    with pytest.raises(MessageError, match="hold 60 of at most 70 tokens in all"):
        step(core, 2, Segment(0, 30, 11))
    step(core, 3, Segment(0, 30, 10))
    core.cache.truncate(0, 20)
    step(core, 4, Segment(1, 30, 20))


def test_no_more_is_promised_than_slots_have_positions(setup):
    assert opened(replace(setup, max_kv_bytes=1 << 30)).num_tokens == 2 * 64


def test_a_request_may_be_as_long_as_the_model_is_whatever_memory_there_is(setup):
    longest = setup.manifest.activation_spec.max_seq_len
    core = opened(replace(setup, max_kv_bytes=1 << 20), max_seq_len=longest, num_slots=1024)
    assert core.num_bytes == 1 << 20
    assert core.num_tokens * core.cache.range_bytes(1) <= 1 << 20


def test_what_was_sent_on_gives_way_to_keys_and_values(setup):
    row_bytes = setup.shard.kv_bytes(1, 64) // 64
    core = opened(replace(setup, max_kv_bytes=60 * row_bytes))
    step(core, 0, Segment(0, 0, 20))
    core.keep()
    assert core.keeps_activations
    assert [header.step for header, _ in core.replay(1)] == [0]
    step(core, 1, Segment(1, 0, 38))  # with both logs it would be more than there is
    core.keep()
    assert not core.keeps_activations
    with pytest.raises(MessageError, match="does not keep"):
        next(core.replay(1))
    assert core.log.num_kept_bytes == 0
    for slot in range(2):
        core.cache.truncate(slot, 0)
        core.log.truncate(slot, 0)
    step(core, 2, Segment(0, 0, 3))
    core.keep()
    assert core.keeps_activations


def stages_at(*addresses):
    return SimpleNamespace(
        stages=[SimpleNamespace(stage_idx=idx) for idx in range(len(addresses))],
        stage=lambda idx: SimpleNamespace(
            machine_keys=(),
            endpoint=None
            if addresses[idx] is None
            else SimpleNamespace(
                control=SimpleNamespace(to_endpoint=lambda: parse_endpoint(addresses[idx]))
            ),
        ),
    )


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.1:9010"], [2, 1, 2]),
        (["vsock:16:5000", "vsock:17:5000"], [1, 1]),
        (["unix:/run/a", None, "10.0.0.1:9000"], [2, 2, 1]),
    ],
)
def test_stages_at_one_address_share_a_machine(addresses, expected):
    manifest = stages_at(*addresses)
    assert [num_on_this_machine(manifest, idx) for idx in range(len(addresses))] == expected


def test_a_stage_takes_its_share_of_what_is_free_when_a_session_begins(setup, monkeypatch):
    nothing_said = replace(setup, max_kv_bytes=None)
    needed = setup.shard.step_bytes(MAX_STEP_TOKENS)
    monkeypatch.setattr(type(setup.shard.kernels), "free_bytes", lambda self: needed + (1 << 22))
    num_stages = len(setup.manifest.stages)
    assert with_memory(nothing_said).max_kv_bytes == (1 << 22) // num_stages
    assert with_memory(setup) is setup
    beside_others = replace(nothing_said, num_pipelines=4)
    assert with_memory(beside_others).max_kv_bytes == (1 << 22) // (4 * num_stages)


def test_a_stage_takes_what_its_manifest_sets_aside_unless_it_is_told(setup):
    stages = tuple(each.model_copy(update={"kv_bytes": 1 << 21}) for each in setup.manifest.stages)
    planned = setup.manifest.model_copy(update={"stages": stages})
    assert with_memory(replace(setup, manifest=planned, max_kv_bytes=None)).max_kv_bytes == 1 << 21
    assert with_memory(replace(setup, manifest=planned)).max_kv_bytes == setup.max_kv_bytes
