"""Worker processes: which command they run does not matter here."""

import subprocess
import sys

import pytest
import trio

import pipeline.placement.supervisor
from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError, StageHung
from pipeline.placement.supervisor import Supervisor

SPARE = "import sys; print('ready', flush=True); a = sys.stdin.readline(); "
WORK = "import time; time.sleep(60)"


class OneStage:
    stages = (None,)


def python(code):
    return (sys.executable, "-c", code)


@pytest.fixture
def supervisor(monkeypatch):
    monkeypatch.setattr(pipeline.placement.supervisor, "QUIET_SECONDS", 0.0)
    manifest: Manifest = OneStage()
    return Supervisor(manifest, ("--flag",))


async def until(condition):
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - another process is waited for
            await trio.sleep(0.01)


async def pid_other_than(supervisor, known):
    await until(lambda: supervisor.pid(0) not in (None, *known))
    return supervisor.pid(0)


async def spare_of(supervisor):
    await until(lambda: supervisor._spare is not None)
    return supervisor._spare


def branching(spare, worker):
    """What the command does as `--standby`, and otherwise."""
    return python(f"import sys\nif sys.argv[1:] == ['--standby']:\n  {spare}\nelse:\n  {worker}")


async def test_the_spare_becomes_the_successor_and_another_takes_its_place(
    supervisor, monkeypatch, nursery, tmp_path
):
    told = tmp_path / "told"
    spare = f"{SPARE} open({str(told)!r}, 'w').write(a); {WORK}"
    monkeypatch.setattr(pipeline.placement.supervisor, "COMMAND", branching(spare, WORK))
    nursery.start_soon(supervisor.run)
    first = await pid_other_than(supervisor, ())
    waiting = await spare_of(supervisor)
    supervisor.on_loss(StageHung(0, "it says nothing"))
    assert await pid_other_than(supervisor, (first,)) == waiting.pid
    assert (await spare_of(supervisor)).pid != waiting.pid
    await until(lambda: told.exists() and told.read_text())
    assert '"--stage-idx", "0"' in told.read_text()
    assert "--flag" in told.read_text()


async def test_a_spare_that_has_died_costs_one_more_try(supervisor, monkeypatch, nursery):
    monkeypatch.setattr(
        pipeline.placement.supervisor, "COMMAND", branching(f"{SPARE} {WORK}", WORK)
    )
    nursery.start_soon(supervisor.run)
    first = await pid_other_than(supervisor, ())
    waiting = await spare_of(supervisor)
    waiting.kill()
    await waiting.wait()
    supervisor.on_loss(StageHung(0, "it says nothing"))
    await pid_other_than(supervisor, (first, waiting.pid))


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_spare_whose_supervisor_is_gone_ends_quietly(is_reading):
    command = [*pipeline.placement.supervisor.COMMAND, "--standby"]
    spare = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with spare.stdout as stdout, spare.stderr as stderr:
        if is_reading:
            assert stdout.readline() == b"ready\n"
        stdout.close()
        spare.stdin.close()
        assert stderr.read() == b""
        assert spare.wait(10) == 0


async def test_a_worker_that_keeps_dying_is_tried_ever_more_seldom(
    supervisor, monkeypatch, nursery
):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)
        await trio.lowlevel.checkpoint()
        if len(waits) == 8:
            nursery.cancel_scope.cancel()

    monkeypatch.setattr(pipeline.placement.supervisor, "COMMAND", python("raise SystemExit(1)"))
    monkeypatch.setattr(supervisor, "_keep_spare", trio.sleep_forever)
    monkeypatch.setattr(pipeline.placement.supervisor.trio, "sleep", sleep)
    with trio.move_on_after(20):
        await supervisor.run()
    assert waits[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]


async def test_a_worker_with_unusable_input_is_not_tried_again(supervisor, monkeypatch):
    monkeypatch.setattr(pipeline.placement.supervisor, "COMMAND", python("raise SystemExit(2)"))
    with trio.fail_after(10), pytest.RaisesGroup(InputError):
        await supervisor.run()
