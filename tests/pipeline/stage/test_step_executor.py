"""Decode steps from the wire to the wire answer as any other step does."""

import pytest

from pipeline.codecs.registry import make_codec
from pipeline.errors import MessageError
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.step_executor import StageCore

SLOTS = 3
WANTS = [
    (Want.TOKEN, Want.TOKEN, Want.TOKEN),
    (Want.LOGITS, Want.LOGITS, Want.LOGITS),
    (Want.TOKEN, Want.LOGITS, Want.NOTHING),
    (Want.NOTHING, Want.TOKEN, Want.NOTHING),
    (Want.NOTHING, Want.NOTHING, Want.NOTHING),
]


@pytest.fixture(params=["F32", "BF16", "I8"])
def cores(request, shards):
    """Two pipelines of stages that keep what they send; the second takes no decode steps."""
    limits = SessionLimits(SLOTS, 32, 32, make_codec(request.param, 64))

    def make(shard):
        return StageCore(shard, limits, ActivationLog(SLOTS, 32, 64))

    return [make(shard) for shard in shards], [make(shard) for shard in shards]


def through(stages, header, tensors):
    seen = []
    for core in stages:
        tensors = core.step(header, tensors)
        seen.append([(tensor.spec, bytes(tensor.data)) for tensor in tensors])
    return seen


@pytest.fixture
def without_decode_steps(monkeypatch, shards):
    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(type(shards[0].kernels), "has_decode_steps", False)
            return through(*args)

    return run


def test_every_want_is_answered_alike(cores, without_decode_steps):
    decoding, other = cores
    sent = []
    for step, wants in enumerate(WANTS):
        segments = tuple(Segment(slot, step, 1) for slot in (1, 0, 2))
        header = StepHeader(StepKind.STEP, step, segments, wants)
        tensors = (token_ids_to_wire([step, 7, 40 + step]),)
        sent.append(through(decoding, header, tensors))
        assert sent[-1] == without_decode_steps(other, header, tensors)
    assert all(core.cache.recordings.keys() for core in decoding)
    assert not any(core.cache.recordings.keys() for core in other)
    for stages in (decoding, other):
        for idx, core in enumerate(stages[:-1]):
            replayed = [
                [(tensor.spec, bytes(tensor.data)) for tensor in tensors]
                for _, tensors in core.replay(3)
            ]
            assert replayed == [seen[idx] for seen in sent]


def test_a_released_core_leaves_nothing_of_its_steps_in_the_shard(cores):
    header = StepHeader(StepKind.STEP, 0, (Segment(0, 0, 3),), (Want.LOGITS,))
    tensors = (token_ids_to_wire([1, 7, 40]),)
    through(cores[0], header, tensors)
    kept = [each for core in cores[0] for each in (*core.shard._room._buffers, core.shard._logits)]
    assert any(each.any() for each in kept)
    for core in cores[0]:
        core.release()
    assert not any(each.any() for each in kept)


def test_a_token_outside_the_vocabulary_is_named_as_such(cores):
    header = StepHeader(StepKind.STEP, 0, (Segment(0, 0, 1),), (Want.TOKEN,))
    first = cores[0][0]
    with pytest.raises(MessageError, match="outside the vocabulary"):
        first.step(header, (token_ids_to_wire([1 << 31]),))
    assert first.cache.lengths == (0, 0, 0)
