"""What every placement of live stages does for an orchestrator, whoever runs the stages."""

import os
import signal
from pathlib import Path

import pytest
import trio

from pipeline.errors import StageHung, StageLost
from pipeline.placement.base import Progress
from tests.pipeline.placement.conftest import HOMES


def is_there(pid):
    return Path(f"/proc/{pid}").exists()


async def test_each_started_stage_is_where_it_is_said_to_be(home):
    pids = [await home.other_than(idx) for idx in range(2)]
    assert len(set(pids)) == 2
    for idx in range(2):
        assert await home.who(idx, "data_in") == pids[idx]


async def test_a_stage_is_told_to_dial_the_one_behind_it(home):
    first, last = map(home.placement.where, range(2))
    assert first.data_out == last.data_in
    named = None if last.data_out is None else last.data_out.to_endpoint()
    assert home.placement.results_at == named


async def test_starting_what_runs_changes_nothing(home):
    pids = [await home.other_than(idx) for idx in range(2)]
    for _ in range(3):
        await home.placement.start(0)
    assert [await home.who(idx) for idx in range(2)] == pids


async def test_one_that_is_lost_is_found_again_and_the_other_has_not_moved(home):
    other, at = await home.other_than(1), home.placement.where(1).control
    known = []
    for _ in range(3):
        known.append(await home.kill(0))
        home.placement.on_loss(StageLost(0, "gone"))
        await home.placement.start(0)
        await home.other_than(0, *known)
    assert await home.who(1) == other
    assert home.placement.where(1).control == at
    # Who is told to dial the one that has moved is told where it is now.
    assert home.placement.where(0).data_out == home.placement.where(1).data_in


async def test_one_that_hangs_makes_way(home):
    if not home.supervises:
        pytest.skip("whoever runs it sees to that")
    pid = await home.other_than(1)
    os.kill(pid, signal.SIGSTOP)
    home.placement.on_loss(StageHung(1, "it says nothing"))
    # What listens at the address of one that is stopped takes connections: nobody asks there.
    while is_there(pid):  # noqa: ASYNC110 - another process is waited for
        await trio.sleep(0.01)
    await home.other_than(1, pid)


async def test_what_is_known_of_a_stage_is_progress_or_nothing(home):
    for idx in range(2):
        await home.other_than(idx)
        found = home.placement.progress(idx)
        assert found is None or isinstance(found, Progress)
        assert home.placement.problem(idx) is None


@pytest.mark.parametrize("kind", [kind for kind, home in HOMES.items() if home.supervises])
async def test_stopping_leaves_nothing_behind(kind, tmp_path, monkeypatch):
    with trio.fail_after(120):
        async with HOMES[kind].open(tmp_path, monkeypatch) as home:
            for idx in range(2):
                await home.placement.start(idx)
            pids = {await home.kill(0), await home.other_than(1)}
            await home.placement.start(0)
            pids.add(await home.other_than(0, *pids))
        assert len(pids) == 3
    assert not any(map(is_there, pids))
    assert all(path.is_socket() for path in tmp_path.iterdir())
