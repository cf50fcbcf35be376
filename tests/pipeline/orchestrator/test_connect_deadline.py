"""Whoever waits for stages waits as long as they come nearer."""

import sys
from functools import partial

import pytest
import trio

from pipeline.orchestrator.connect_deadline import MAX_LIVES, Patience
from pipeline.placement import fork_server
from pipeline.placement.base import Progress
from pipeline.placement.worker_supervisor import Supervisor
from transport.dial_and_listen import UnixEndpoint, dial_retrying


async def seconds_of(patience, work=trio.sleep_forever):
    began = trio.current_time()
    is_done = await patience.run(work)
    return is_done, trio.current_time() - began


async def test_where_nothing_can_be_told_the_time_is_what_it_was_said_to_be(autojump_clock):
    assert await seconds_of(Patience(30, dict)) == (False, 30)


async def test_work_that_is_done_in_time_is_done(autojump_clock):
    assert await seconds_of(Patience(30, dict), partial(trio.sleep, 29)) == (True, 29)


async def test_what_fails_raises_its_own_error(autojump_clock):
    async def fail():
        await trio.sleep(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await Patience(30, dict).run(fail)


async def test_a_stage_that_loads_for_long_is_waited_for(autojump_clock):
    began = trio.current_time()

    def loading():
        return {1: Progress(7, min(trio.current_time() - began, 600))}

    is_done, seconds = await seconds_of(Patience(30, loading))
    assert not is_done
    assert seconds == pytest.approx(630, abs=2)
    assert await seconds_of(Patience(30, loading), partial(trio.sleep, 20)) == (True, 20)


async def test_a_stage_that_is_stuck_is_not_waited_for_longer(autojump_clock):
    stuck = {0: Progress(7, 4.0)}
    is_done, seconds = await seconds_of(Patience(30, lambda: stuck))
    assert not is_done
    assert seconds == pytest.approx(30, abs=2)


async def test_one_stage_that_comes_nearer_is_enough(autojump_clock):
    def progress():
        return {0: Progress(7, 4.0), 1: Progress(8, trio.current_time())}

    with trio.move_on_after(1000) as scope:
        await Patience(30, progress).run(trio.sleep_forever)
    assert scope.cancelled_caught


async def test_a_stage_that_dies_whenever_it_has_loaded_is_given_up(autojump_clock):
    began = trio.current_time()

    def dying():
        life, seconds = divmod(trio.current_time() - began, 20)
        return {0: Progress(int(life), seconds)}

    is_done, seconds = await seconds_of(Patience(30, dying))
    assert not is_done
    assert seconds == pytest.approx(MAX_LIVES * 20 + 30, abs=2)


LOADING = "end = time.process_time() + 2\nwhile time.process_time() < end: pass\n"
STUCK = "time.sleep(60)\n"


@pytest.mark.parametrize(("how", "is_reached"), [(LOADING, True), (STUCK, False)])
async def test_a_worker_is_waited_for_while_it_loads_and_not_when_it_is_stuck(
    how, is_reached, nursery, monkeypatch, tmp_path
):
    place = tmp_path / "s"
    worker = f"""import socket, time
from pipeline.placement.fork_server import fork_for_requests
fork_for_requests()
{how}
sock = socket.socket(socket.AF_UNIX)
sock.bind({str(place)!r})
sock.listen()
time.sleep(60)
"""
    monkeypatch.setattr(fork_server, "COMMAND", (sys.executable, "-c", worker))
    supervisor = Supervisor(None, lambda stage_idx: (), nursery)
    await supervisor.start(0)

    def progress():
        known = supervisor.progress(0)
        return {} if known is None else {0: known}

    async def reach():
        (await dial_retrying(lambda: UnixEndpoint(place), lambda error: None)).close()

    is_done, seconds = await seconds_of(Patience(1.0, progress), reach)
    assert is_done == is_reached
    assert seconds > 2 if is_reached else seconds < 30
    nursery.cancel_scope.cancel()
