"""What befalls a cluster that runs the stages: each is one line, and what can go on does."""

import os
import signal
import sys

import pytest
import trio

from pipeline.errors import InputError, ManifestError, StageLost
from pipeline.placement.ray import placement as ray_placement
from pipeline.placement.ray.messages import Away, Cluster, Kept, Report, line_of
from pipeline.placement.ray.placement import RayPlacement, _environment
from tests.pipeline.placement.conftest import RayHome, job_of


@pytest.fixture
async def home(tmp_path, monkeypatch):
    with trio.fail_after(120):
        async with RayHome.open(tmp_path, monkeypatch) as home:
            yield home


async def until(condition):
    while not condition():  # noqa: ASYNC110 - other processes are waited for
        await trio.sleep(0.01)


async def started(home):
    for idx in range(2):
        await home.placement.start(idx)
    return [await home.other_than(idx) for idx in range(2)]


def count(caplog, text):
    return sum(text in record.getMessage() for record in caplog.records)


async def test_a_lost_node_costs_its_stage_a_life_and_the_other_none(home, caplog):
    with caplog.at_level("INFO"):
        first, other = await started(home)
        before = home.placement.progress(0).life
        home.happens("node-0")
        now = await home.other_than(0, first)
        await until(lambda: home.placement.progress(0) is not None)
    assert home.placement.progress(0).life > before
    assert await home.who(1) == other
    assert count(caplog, "event=stage_away stage=0 error=the node is gone") == 1
    assert count(caplog, f"event=stage_placed stage=0 node=127.0.0.1 pid={now}") == 1


async def test_a_stage_that_is_away_is_waited_for_by_who_starts_it(home):
    await started(home)
    home.happens("full")
    home.happens("node-1")
    said = "a stage takes GPU 1 of one node, and the 3 nodes have GPU 0 at most"
    await until(lambda: home.placement.problem(1) == said)
    with trio.move_on_after(0.2) as scope:
        await home.placement.start(1)
    assert scope.cancelled_caught
    (home.directory / "full").unlink()
    await home.placement.start(1)
    assert home.placement.problem(1) is None


async def test_a_node_that_vanishes_while_it_loads_is_replaced_by_another(
    tmp_path, monkeypatch, caplog
):
    is_read = tmp_path / "read"
    with trio.fail_after(120):
        async with RayHome.open(tmp_path, monkeypatch, "--load-until", str(is_read)) as home:
            placement = home.placement
            async with trio.open_nursery() as nursery:
                nursery.start_soon(placement.start, 0)
                await until(lambda: placement.progress(0) and placement.progress(0).loaded)
                life = placement.progress(0).life
                with pytest.raises(ManifestError, match="has not been placed yet"):
                    placement.where(0)
                home.happens("node-0")
                await until(
                    lambda: count(caplog, "event=stage_away stage=0 error=the node is gone")
                )
                is_read.touch()
            assert await home.other_than(0)
            assert placement.progress(0).life > life


async def test_what_cannot_be_placed_is_said_once_however_long_it_lasts(home, caplog):
    home.happens("full")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(home.placement.start, 0)
        await until(lambda: home.placement.problem(0))
        await trio.sleep(0.5)
        (home.directory / "full").unlink()
    assert count(caplog, "event=stage_away stage=0 error=a stage takes GPU 1") == 1


async def test_a_stage_whose_node_flaps_fills_no_log(home, caplog):
    (pid, _) = await started(home)
    for _ in range(3):
        home.happens("node-0")
        pid = await home.other_than(0, pid)
    assert count(caplog, "event=stage_away") == 1


async def test_a_head_that_is_silent_is_told_and_the_stages_stay(home, caplog):
    pids = await started(home)
    with caplog.at_level("INFO"):
        home.happens("silent")
        await until(lambda: count(caplog, "event=cluster_away"))
        assert "its head has not answered" in home.placement.problem(0)
        assert [await home.who(idx) for idx in range(2)] == pids
        (home.directory / "silent").unlink()
        await until(lambda: count(caplog, "event=cluster_back"))
    assert home.placement.problem(0) is None
    assert [await home.who(idx) for idx in range(2)] == pids


async def test_a_cluster_that_does_not_answer_at_all_is_told_and_waited_for(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "unreachable").touch()
    with trio.fail_after(120):
        async with RayHome.open(tmp_path, monkeypatch) as home, trio.open_nursery() as nursery:
            nursery.start_soon(home.placement.start, 0)
            said = f"Ray at {tmp_path}: its head has not answered"
            await until(lambda: said in (home.placement.problem(0) or ""))
            (tmp_path / "unreachable").unlink()
            await until(lambda: home.placement.problem(0) is None)
    assert count(caplog, "event=cluster_away") == 1


async def test_what_speaks_with_the_cluster_may_crash_and_the_stages_come_back(
    home, caplog, monkeypatch
):
    monkeypatch.setattr(ray_placement, "FIRST_PAUSE_SECONDS", 0.01)
    pids = await started(home)
    home.happens("crash")
    for idx in range(2):
        await home.other_than(idx, *pids)
    assert count(caplog, "event=placing_failed error=what speaks with Ray has ended") == 1
    assert count(caplog, "status 7") == 1


@pytest.mark.parametrize(
    ("event", "more", "said"),
    [
        ("unusable", (), "stages cannot be placed: Ray at .*: no such cluster"),
        (None, ("--refuse", "x"), "stage 0 cannot start: no weights here .on node 127.0.0.1."),
    ],
    ids=["cluster", "worker"],
)
async def test_what_will_never_work_is_the_users_to_mend(tmp_path, monkeypatch, event, more, said):
    if event is not None:
        (tmp_path / event).touch()
    with trio.fail_after(60), pytest.RaisesGroup(pytest.RaisesExc(InputError, match=said)):
        async with RayHome.open(tmp_path, monkeypatch, *more) as home:
            await home.placement.start(0)


async def test_a_cluster_that_has_answered_is_awaited_when_it_is_gone(home, monkeypatch, caplog):
    monkeypatch.setattr(ray_placement, "FIRST_PAUSE_SECONDS", 0.01)
    pids = await started(home)
    home.happens("unusable")
    home.happens("crash")
    said = f"Ray at {home.directory}: no such cluster"
    await until(lambda: count(caplog, f"event=placing_failed error={said}"))
    assert home.placement.problem(0) == said
    (home.directory / "unusable").unlink()
    await home.other_than(0, *pids)


async def test_a_loss_that_a_supervisor_would_leave_alone_is_left_alone(home):
    pids = await started(home)
    for _ in range(3):
        home.placement.on_loss(StageLost(0, "it has hung up"))
    # By now they have been heard, if they were sent: what is sent later has an effect.
    os.kill(pids[1], signal.SIGKILL)
    await home.other_than(1, pids[1])
    assert await home.who(0) == pids[0]


SAY = """
import sys, time
sys.stdin.readline()
sys.stdout.buffer.write(open(sys.argv[1], "rb").read())
sys.stdout.flush()
time.sleep(600)
"""


KEPT = Kept(node="n", keeper_pid=1, pid=2)


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b'{"type":"cluster"}\n',
        b'{"type":"report","stage_idx":0,"kept":{"node":"n","keeper_pid":1}}\n',
        b'{"type":"away","stage_idx":"0","reason":"x"}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (1 << 18),
        line_of(Away(stage_idx=7, reason="x")),
        line_of(Report(stage_idx=-1, kept=KEPT)),
        line_of(Report(stage_idx=0, kept=KEPT)).replace(b'"control":null', b'"control":"h:1"'),
    ],
    ids=range(9),
)
async def test_what_a_cluster_makes_up_is_a_line_in_the_log(
    line, tmp_path, monkeypatch, caplog, nursery
):
    job = job_of(tmp_path)
    monkeypatch.setattr(ray_placement, "STOP_SECONDS", 0.0)
    said = tmp_path / "said"
    said.write_bytes(line_of(Cluster(reason=None)) + line)
    monkeypatch.setattr(ray_placement, "COMMAND", (sys.executable, "-S", "-c", SAY, str(said)))
    placement = RayPlacement(job, nursery)
    with trio.fail_after(60):
        with trio.move_on_after(0.01):
            await placement.start(0)
        await until(lambda: count(caplog, "event=placing_failed error=what speaks with Ray"))
    nursery.cancel_scope.cancel()


def test_what_speaks_with_ray_is_told_nothing_in_confidence():
    told = {
        "PATH": "/bin", "HOME": "/h", "RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled",
        "VEILPIPE_API_KEY_FILE": "k", "OPENAI_API_KEY": "k", "PYTHONSTARTUP": "x",
    }  # fmt: skip
    assert _environment(told) == {
        "PATH": "/bin", "HOME": "/h", "RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "token",
    }  # fmt: skip
