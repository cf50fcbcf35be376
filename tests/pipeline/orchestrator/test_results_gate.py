"""What the last stage may return is known before any of it is stored."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.orchestrator.connector import Connector
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Result, Want
from pipeline.protocol.step_header import StageTiming, StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import SessionLimits
from pipeline.protocol.step_results import result_to_wire
from transport.errors import FrameError

VOCAB, WIDTH = 5, 8
WANT = Want(Result.LOGPROBS, 2, 1, 2)


@pytest.fixture
def gate():
    limits = SessionLimits(2, 64, 32, make_codec("F32", WIDTH))
    connector = Connector(SimpleNamespace(stages=(None, None)), None, limits, None, print)
    gate = connector.new_gate()
    connector.vocab_size = VOCAB  # once the stages have named it
    return gate


def answer(want, num_timings=2, kind=StepKind.STEP):
    segments = (Segment(0, 0, 2),)
    return encode_step(
        StepHeader(kind, 1, segments, (want,), (StageTiming(0, 0, 0),) * num_timings)
    )


def specs(tokens=(), **sizes):
    shapes = {"logits": (0, VOCAB), "hidden": (0, WIDTH), "logprobs": (0,), "top_ids": (0,)}
    arrays = {
        name: np.zeros(sizes.get(name, shape), np.uint32 if name == "top_ids" else np.float32)
        for name, shape in shapes.items()
    }
    return tuple(tensor.spec for tensor in result_to_wire(tokens, **arrays))


@pytest.mark.parametrize(
    ("want", "good"),
    [
        (Want.TOKEN, specs([1])),
        (Want.NOTHING, specs()),
        (Want(Result.LOGITS, 2), specs(logits=(2, VOCAB))),
        (Want(Result.HIDDEN, 2), specs(hidden=(2, WIDTH))),
        (WANT, specs(logprobs=(6,), top_ids=(2,))),
        (Want(Result.DRAWN, 1, 2, 1), specs([1], logprobs=(3,), top_ids=(2,))),
    ],
    ids=str,
)
def test_a_result_is_what_its_header_wants_and_nothing_else(gate, want, good):
    gate.check(answer(want), good)
    wrong = [
        good[:-1],
        (*good, good[-1]),
        specs([1, 2]),
        specs(logits=(2, VOCAB + 1)),
        specs(logits=(1, VOCAB)),
        specs(hidden=(2, WIDTH + 1)),
        specs(logprobs=(6,), top_ids=(3,)),
        specs(logprobs=(1 << 20,)),
    ]
    for each in wrong:
        with pytest.raises(FrameError, match="expected"):
            gate.check(answer(want), each)
    with pytest.raises(FrameError, match="returned"):
        gate.check(answer(want, num_timings=1), good)
