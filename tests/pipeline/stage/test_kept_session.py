"""Keys and values that outlive a worker: a successor goes on from them, and believes no other."""

import os
from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import InputError, MessageError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.session_memory import SessionMemory
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import token_ids_to_wire
from pipeline.protocol.tide_window import TideWindow
from pipeline.stage.session_admission import check_init, with_memory
from pipeline.stage.worker_setup import new_core
from tests.pipeline.stage.test_worker_setup import init

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or why_not_native() is not None,
    reason="needs memory without a name, and native kernels",
)
PROMPT = 19
# The row that a killed process was in the middle of.
NEXT = Segment(0, PROMPT, 1)


class Stage:
    """One worker after another, all handed the same memory."""

    def __init__(self, setup, fd):
        self.setup, self.fd = replace(setup, session_memory=SessionMemory(fd)), fd

    def worker(self, name=None, lengths=None, setup=None, **changes):
        """A core as a worker begins with it."""
        setup = setup or self.setup
        if name is not None:
            changes = {"kept": name, "lengths": lengths, **changes}
        message, limits = check_init(init(setup, **changes), setup)
        core = new_core(setup, limits, message.kept)
        is_found = message.kept is not None and message.kept == core.name
        core.go_on(message.lengths if is_found else None)
        return core

    def filled(self):
        """What a worker leaves that is killed behind a prompt in each of two slots."""
        core = self.worker()
        for slot in range(2):
            run(core, Segment(slot, 0, PROMPT))
        return core

    def bytes(self):
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)


@pytest.fixture
def fd():
    found = os.memfd_create("session")
    yield found
    os.close(found)


@pytest.fixture
def stage(deployment, fd):
    return Stage(deployment.setup(0), fd)


def run(core, *segments, kind=StepKind.STEP):
    """What it sends on for tokens that follow from where they are."""
    ids = [7 * each.slot + at for each in segments for at in range(each.position, end(each))]
    header = StepHeader(kind, 1, segments, (Want.NOTHING,) * len(segments))
    return bytes(core.step(header, (token_ids_to_wire(ids),))[0].data)


def end(segment):
    return segment.position + segment.num_tokens


def kv(core, slot):
    return [np.array(each) for layer in exported(core, slot) for each in layer]


def exported(core, slot):
    return core.cache.export(slot, range(core.cache.lengths[slot]))


def test_a_successor_goes_on_where_the_one_before_it_was(stage):
    first = stage.filled()
    expected, left = run(first, NEXT), [kv(first, slot) for slot in range(2)]
    second = stage.worker(first.name, [PROMPT, PROMPT])
    assert second.name == first.name
    assert second.cache.lengths == (PROMPT, PROMPT)
    for slot in range(2):
        for found, own in zip(kv(second, slot), left[slot], strict=True):
            assert (found == own[:, :PROMPT]).all()
    assert run(second, NEXT) == expected


def test_of_what_was_begun_nothing_is_left(stage):
    first = stage.filled()
    first.cache.reserve((Segment(1, PROMPT, 20),))
    for each in (*first.cache.keys, *first.cache.values):
        each[1][each[1] == 0] = 9  # killed while it wrote rows
    expected = stage_without_memory(stage)
    second = stage.worker(first.name, [PROMPT, PROMPT])
    assert run(second, Segment(1, PROMPT, 1)) == expected
    second.cache.truncate(1, PROMPT)
    block = second.cache.keys[0].shape[-1]
    behind = -(-PROMPT // block)
    for each in (*second.cache.keys, *second.cache.values):
        assert not each[1, behind : (PROMPT + 20) // block].any()


def stage_without_memory(stage):
    core = new_core(
        replace(stage.setup, session_memory=None), check_init(init(stage.setup), stage.setup)[1]
    )
    run(core, Segment(1, 0, PROMPT))
    return run(core, Segment(1, PROMPT, 1))


def test_a_row_that_was_not_counted_is_not_there(stage):
    """What the step from frame to frame has written alone, which announces nothing before."""
    first = stage.filled()
    for each in (*first.cache.keys, *first.cache.values):
        each[0][each[0] == 0] = 9
    second = stage.worker(first.name, [PROMPT, PROMPT])
    assert second.cache.lengths == (PROMPT, PROMPT)
    zeroed = second.cache.storage.read(0, range(PROMPT, PROMPT + 1))
    assert not any(each.any() for layer in zeroed for each in layer)
    with pytest.raises(MessageError, match="holds 19 tokens, it cannot keep 20"):
        stage.worker(first.name, [PROMPT + 1, PROMPT])
    assert not any(stage.bytes())


@pytest.mark.parametrize("num_counted", range(3))
def test_a_step_that_was_on_its_way_counts_wherever_its_worker_was_killed(stage, num_counted):
    first = stage.filled()
    segments = NEXT, Segment(1, PROMPT, 1)
    run(first, *segments)
    for slot in range(num_counted, 2):  # all is computed, and not all of it counted
        first.cache.kept.held[slot] = PROMPT
    header = StepHeader(StepKind.STEP, 2, segments, (Want.TOKEN,) * 2)
    first.computed(memoryview(encode_step(header)))
    second = stage.worker(first.name, [PROMPT + 1, PROMPT + 1])
    assert second.cache.lengths == (PROMPT + 1, PROMPT + 1)
    assert not second.cache.kept.noted


def test_a_step_that_is_counted_is_noted_away(stage):
    core = stage.filled()
    header = StepHeader(StepKind.STEP, 2, (NEXT,), (Want.TOKEN,))
    core.computed(memoryview(encode_step(header)))
    core.served(2, (NEXT,), memoryview(bytes(64 * 4)))
    assert not core.cache.kept.noted
    assert stage.worker(core.name, [PROMPT + 1, PROMPT]).cache.lengths == (PROMPT + 1, PROMPT)


def test_a_worker_killed_while_it_forgets_has_left_nothing_to_be_believed(stage, monkeypatch):
    first = stage.filled()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(first.cache.storage), "zero", die)
    with pytest.raises(KeyboardInterrupt):
        first.cache.truncate(0, 3)
    monkeypatch.undo()
    second = stage.worker(first.name, [3, PROMPT])
    zeroed = second.cache.storage.read(0, range(3, PROMPT))
    assert not any(each.any() for layer in zeroed for each in layer)
    with pytest.raises(MessageError, match="holds 3 tokens, it cannot keep 4"):
        stage.worker(first.name, [4, PROMPT])


@pytest.mark.parametrize(
    "other",
    [
        {"name": bytes(16)}, {"name": None}, {"max_seq_len": 63}, {"num_slots": 1},
        {"setup": {"precision": "int8"}},
        {"setup": {"stage_idx": 1}},
    ],
    ids=["another name", "no name", "context", "slots", "precision", "stage"],
)  # fmt: skip
def test_who_is_not_the_same_session_finds_zeros(stage, other):
    first = stage.filled()
    changes = {"name": first.name, "num_slots": 2, **other}
    name, num_slots = changes.pop("name"), changes["num_slots"]
    setup = replace(stage.setup, **changes.pop("setup", {}))
    changes["stage_idx"] = setup.stage_idx
    second = stage.worker(name, [PROMPT] * num_slots, setup, **changes)
    assert second.name not in {None, first.name}
    assert second.cache.lengths == (0,) * num_slots
    assert not any(each.any() for each in (*second.cache.keys, *second.cache.values))
    # ... and takes it from whom it was of
    assert stage.worker(first.name, [0, 0]).name != first.name


def test_another_manifest_finds_zeros(stage):
    first = stage.filled()
    manifest = stage.setup.manifest.model_copy(update={"model_version": "another"})
    second = stage.worker(first.name, [PROMPT] * 2, replace(stage.setup, manifest=manifest))
    assert second.cache.lengths == (0, 0)


def test_a_session_that_ends_leaves_zeros_and_no_name(stage):
    core = stage.filled()
    core.computed(memoryview(encode_step(StepHeader(StepKind.STEP, 2, (NEXT,), (Want.TOKEN,)))))
    assert len(stage.bytes().strip(b"\0")) > 1000
    name = core.name
    core.release()
    assert not any(stage.bytes())
    assert SessionMemory(stage.fd).num_bytes == 0
    assert stage.worker(name, [0, 0]).name != name


def test_what_a_dead_worker_holds_is_this_stages_to_give(stage, monkeypatch):
    stage.filled()
    kept = stage.setup.session_memory.num_bytes
    assert kept > 0
    monkeypatch.setattr("pipeline.stage.session_admission.free_kv_bytes", lambda shard: 1 << 20)
    setup = replace(stage.setup, max_kv_bytes=None)
    alone = replace(setup, session_memory=None)
    assert with_memory(setup).max_kv_bytes == ((1 << 20) + kept) // 2
    assert with_memory(alone).max_kv_bytes == (1 << 20) // 2


def test_under_a_window_and_without_hashes_nothing_outlives_a_worker(stage):
    limits = check_init(init(stage.setup), stage.setup)[1]
    assert new_core(stage.setup, replace(limits, window=TideWindow(32, 4))).name is None
    manifest = stage.setup.manifest
    stages = [each.model_copy(update={"weight_hashes": ()}) for each in manifest.stages]
    manifest = manifest.model_copy(update={"stages": tuple(stages)})
    assert new_core(replace(stage.setup, manifest=manifest), limits).name is None


@pytest.mark.parametrize("lengths", [None, [1], [1, 2, 3]], ids=["none", "too few", "too many"])
def test_how_far_slots_go_on_is_said_of_each(stage, lengths):
    with pytest.raises(MessageError, match="and not how far"):
        check_init(init(stage.setup, kept=bytes(16), lengths=lengths), stage.setup)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_nobody_takes_another_users_memory(fd):
    os.fchown(fd, 65534, 65534)
    with pytest.raises(InputError, match="of another user"):
        SessionMemory(fd)
