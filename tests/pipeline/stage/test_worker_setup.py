"""A worker's sessions are what it was set up with, whatever an orchestrator asks for."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.codecs.plain import Plain
from pipeline.errors import MessageError, SessionRefused
from pipeline.protocol.batch import Segment
from pipeline.protocol.messages import Init
from pipeline.stage.session_admission import check_init
from pipeline.stage.worker_setup import new_core
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


def test_a_session_larger_than_the_stage_gives_is_refused(setup):
    least = setup.shard.kv_bytes(2, 64)
    assert check_init(init(setup), replace(setup, max_kv_bytes=least))
    with pytest.raises(SessionRefused, match=f"take {least} bytes of KV memory"):
        check_init(init(setup), replace(setup, max_kv_bytes=least - 1))
