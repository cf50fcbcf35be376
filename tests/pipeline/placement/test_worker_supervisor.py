"""Worker processes: which command they run does not matter here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from pipeline.errors import InputError, StageHung, StageMismatch, StageSilent
from pipeline.placement import worker_supervisor
from pipeline.placement.worker_supervisor import Supervisor

SPARE = "import sys; print('ready', flush=True); a = sys.stdin.readline(); "
WORK = "import time; time.sleep(60)"


def python(code):
    return (sys.executable, "-c", code)


@pytest.fixture
async def supervisor(monkeypatch, nursery):
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 0.0)
    yield Supervisor(None, lambda stage_idx: (f"--flag-{stage_idx}",), nursery)
    nursery.cancel_scope.cancel()


async def until(condition):
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - another process is waited for
            await trio.sleep(0.01)


async def pid_other_than(supervisor, known):
    await until(lambda: supervisor.pid(0) not in (None, *known))
    return supervisor.pid(0)


async def spare_of(supervisor):
    await until(lambda: supervisor._spare is not None)
    return supervisor._spare[0]


def branching(spare, worker):
    """What the command does as `--standby`, and otherwise."""
    return python(f"import sys\nif sys.argv[1:] == ['--standby']:\n  {spare}\nelse:\n  {worker}")


async def test_the_spare_becomes_the_successor_and_another_takes_its_place(
    supervisor, monkeypatch, tmp_path
):
    told = tmp_path / "told"
    spare = f"{SPARE} open({str(told)!r}, 'w').write(a); {WORK}"
    monkeypatch.setattr(worker_supervisor, "COMMAND", branching(spare, WORK))
    await supervisor.start(0)
    await supervisor.start(0)  # once is enough
    first = await pid_other_than(supervisor, ())
    waiting = await spare_of(supervisor)
    supervisor.on_loss(StageHung(0, "it says nothing"))
    assert await pid_other_than(supervisor, (first,)) == waiting.pid
    assert (await spare_of(supervisor)).pid != waiting.pid
    await until(lambda: told.exists() and told.read_text())
    assert '"--stage-idx", "0"' in told.read_text()
    assert "--flag-0" in told.read_text()


async def test_a_worker_of_another_manifest_makes_way_for_one_that_reads_it_anew(
    nursery, monkeypatch
):
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 60.0)
    monkeypatch.setattr(worker_supervisor, "COMMAND", python(WORK))
    supervisor = Supervisor(None, lambda stage_idx: (), nursery)
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    supervisor.on_loss(StageMismatch("another core", 0))
    await pid_other_than(supervisor, (first,))
    nursery.cancel_scope.cancel()


async def test_a_spare_that_has_died_costs_one_more_try(supervisor, monkeypatch):
    monkeypatch.setattr(worker_supervisor, "COMMAND", branching(f"{SPARE} {WORK}", WORK))
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    waiting = await spare_of(supervisor)
    waiting.kill()
    await waiting.wait()
    supervisor.on_loss(StageHung(0, "it says nothing"))
    await pid_other_than(supervisor, (first, waiting.pid))


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_spare_whose_supervisor_is_gone_ends_quietly(is_reading):
    command = [*worker_supervisor.COMMAND, "--standby"]
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


async def test_a_silent_worker_is_killed_once_it_is_seen_to_do_nothing(supervisor, monkeypatch):
    monkeypatch.setattr(worker_supervisor, "COMMAND", python(WORK))
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 60.0)
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    await idle(supervisor)
    silent = StageSilent(0, "it says nothing")
    supervisor.on_loss(silent)
    await trio.sleep(0.2)
    assert supervisor.pid(0) == first  # one refused handshake is no evidence
    supervisor.on_loss(silent)
    assert await pid_other_than(supervisor, (first,))


async def test_a_silent_worker_that_runs_is_left_alone(supervisor, monkeypatch):
    """As one is whose places for handshakes are all taken by strangers."""
    busy = "import time\nwhile True: time.sleep(0.01)"
    monkeypatch.setattr(worker_supervisor, "COMMAND", python(busy))
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 60.0)
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    for _ in range(5):
        before = supervisor.progress(0)
        supervisor.on_loss(StageSilent(0, "it says nothing"))
        await until(lambda before=before: supervisor.progress(0) != before)
    assert supervisor.pid(0) == first


async def idle(supervisor):
    """Return once it sleeps, and not for want of a processor or a disk."""
    seen = []

    def is_idle():
        state = Path(f"/proc/{supervisor.pid(0)}/stat").read_text().rpartition(") ")[2][0]
        seen.append((state, supervisor.progress(0)))
        return len(seen) > 20 and seen[-20:] == [("S", seen[-1][1])] * 20

    await until(is_idle)


async def test_how_far_a_worker_has_come_is_what_it_has_computed(supervisor, monkeypatch):
    assert supervisor.progress(0) is None
    working = "import time\nend = time.process_time() + 0.3\n"
    working += f"while time.process_time() < end: pass\n{WORK}"
    monkeypatch.setattr(worker_supervisor, "COMMAND", python(working))
    await supervisor.start(0)
    await pid_other_than(supervisor, ())
    await until(lambda: supervisor.progress(0).seconds > 0.3)
    await idle(supervisor)
    life, seconds, _ = supervisor.progress(0)
    assert life == supervisor.pid(0)
    assert seconds < 5


def says(*reports, code):
    """A worker that says so and ends, or stays where `code` is None."""
    lines = [f"print({report!r}, flush=True)" for report in reports]
    return python("\n".join([*lines, WORK if code is None else f"raise SystemExit({code})"]))


async def test_a_first_worker_with_unusable_input_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(worker_supervisor, "COMMAND", says("failed m.json: no such file", code=2))
    with (
        trio.fail_after(60),
        pytest.RaisesGroup(
            pytest.RaisesExc(InputError, match="stage 0 cannot start: m.json: no such file")
        ),
    ):
        async with trio.open_nursery() as nursery:
            await Supervisor(None, lambda stage_idx: (), nursery).start(0)


async def test_how_much_a_worker_has_read_is_known_while_it_reads(nursery, monkeypatch):
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 60.0)
    supervisor = Supervisor(None, lambda stage_idx: (), nursery)
    reads = says("a library's line", "loaded 10 40", "loaded 30 40", code=None)
    monkeypatch.setattr(worker_supervisor, "COMMAND", reads)
    await supervisor.start(0)
    await until(lambda: supervisor.progress(0) and supervisor.progress(0).loaded == (30, 40))
    first = supervisor.pid(0)
    monkeypatch.setattr(worker_supervisor, "COMMAND", says(code=None))
    os.kill(first, signal.SIGKILL)
    await pid_other_than(supervisor, (first,))
    assert supervisor.progress(0).loaded is None
    nursery.cancel_scope.cancel()


LOOK = (
    "import json, os; fd = int(a[a.index('--weights-fd') + 1]); s = os.fstat(fd); "
    "open(TOLD, 'a').write(json.dumps([s.st_ino, s.st_mode & 0o777]) + '\\n'); " + WORK
)


async def test_a_successor_with_unusable_input_is_tried_until_that_is_mended(
    nursery, monkeypatch, caplog
):
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 60.0)
    monkeypatch.setattr(worker_supervisor, "COMMAND", says("listening tcp:h:1 tcp:h:2", code=None))
    supervisor = Supervisor(None, lambda stage_idx: (), nursery)
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    assert supervisor.problem(0) is None
    monkeypatch.setattr(worker_supervisor, "COMMAND", says("failed other weights", code=2))
    with caplog.at_level("INFO"):
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.problem(0) == "other weights")
        monkeypatch.setattr(
            worker_supervisor, "COMMAND", says("listening tcp:h:1 tcp:h:2", code=None)
        )
        await until(lambda: supervisor.problem(0) is None)
    assert "event=worker_back" in caplog.text
    assert "error=other weights" in caplog.text
    nursery.cancel_scope.cancel()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that can be sealed")
async def test_a_successor_is_handed_the_memory_that_its_stage_had(
    supervisor, monkeypatch, tmp_path
):
    told = tmp_path / "told"
    look = LOOK.replace("TOLD", repr(str(told)))
    spare = SPARE + f"import json; a = json.loads(a); {look}"
    monkeypatch.setattr(
        worker_supervisor, "COMMAND", branching(spare, f"import sys; a = sys.argv; {look}")
    )
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    await until(lambda: told.exists() and told.read_text())
    await spare_of(supervisor)
    supervisor.on_loss(StageHung(0, "it says nothing"))
    await pid_other_than(supervisor, (first,))
    await until(lambda: len(told.read_text().splitlines()) == 2)
    before, after = map(json.loads, told.read_text().splitlines())
    assert before == after
    assert before[1] == 0o600


async def test_without_such_memory_workers_load_for_themselves(
    supervisor, monkeypatch, tmp_path, caplog
):
    def refuse(name, flags):
        raise OSError("no such call")

    told = tmp_path / "told"
    write = f"open({str(told)!r}, 'w').write(' '.join(sys.argv)); {WORK}"
    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    monkeypatch.setattr(worker_supervisor, "COMMAND", branching(f"{SPARE}{WORK}", write))
    with caplog.at_level("INFO"):
        await supervisor.start(0)
        await until(lambda: told.exists() and "--flag-0" in told.read_text())
    assert "--weights-fd" not in told.read_text()
    assert caplog.text.count("event=weights_not_kept") == 1


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that can be sealed")
async def test_one_that_is_ended_while_it_starts_a_worker_ends_quietly(monkeypatch):
    start = trio.lowlevel.open_process

    def is_open(fd):
        try:
            return bool(os.fstat(fd))
        except OSError:
            return False

    async def start_too_late(command, *, pass_fds, **pipes):
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await until(lambda: not any(map(is_open, pass_fds)))
            return await start(command, pass_fds=pass_fds, **pipes)

    monkeypatch.setattr(worker_supervisor, "COMMAND", python(WORK))
    monkeypatch.setattr(worker_supervisor, "QUIET_SECONDS", 60.0)
    monkeypatch.setattr(trio.lowlevel, "open_process", start_too_late)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await Supervisor(None, lambda stage_idx: (), nursery).start(0)
