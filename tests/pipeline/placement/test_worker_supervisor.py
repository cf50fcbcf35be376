"""Worker processes: what they do does not matter here."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from pipeline.errors import InputError, StageHung, StageMismatch, StageSilent
from pipeline.placement import fork_server, forked_worker
from pipeline.placement.worker_supervisor import Supervisor

needs_sealed_memory = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="no memory that can be sealed"
)
WORK = "import time; time.sleep(60)"
FORK = """import sys
from pipeline.placement.fork_server import fork_for_requests
sys.argv[1:] = fork_for_requests()
exec(open({path!r}).read())
"""


@pytest.fixture
def work(monkeypatch, tmp_path):
    """Sets what every worker does that is started from then on."""
    path, new = tmp_path / "worker.py", tmp_path / "new.py"

    def work(code):
        new.write_text(code)
        new.replace(path)

    work(WORK)
    command = (sys.executable, "-c", FORK.format(path=str(path)))
    monkeypatch.setattr(fork_server, "COMMAND", command)
    return work


@pytest.fixture
async def supervisor(work, nursery):
    yield Supervisor(None, lambda stage_idx: (f"--flag-{stage_idx}",), nursery)
    nursery.cancel_scope.cancel()


async def until(condition):
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - another process is waited for
            await trio.sleep(0.01)


async def pid_other_than(supervisor, known):
    await until(lambda: supervisor.pid(0) not in (None, *known))
    return supervisor.pid(0)


async def test_workers_are_forks_of_one_process_and_so_are_their_successors(supervisor):
    await supervisor.start(0)
    await supervisor.start(0)  # once is enough
    await supervisor.start(1)
    first = await pid_other_than(supervisor, ())
    await until(lambda: supervisor.pid(1) is not None)
    server = supervisor._forks.pid
    assert {parent(first), parent(supervisor.pid(1))} == {server}
    supervisor.on_loss(StageHung(0, "it says nothing"))
    assert parent(await pid_other_than(supervisor, (first,))) == server
    assert parent(server) == os.getpid()


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


async def test_a_worker_of_another_manifest_makes_way_for_one_that_reads_it_anew(supervisor):
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    supervisor.on_loss(StageMismatch("another core", 0))
    await pid_other_than(supervisor, (first,))


async def test_where_what_workers_are_forks_of_is_killed_there_are_others_of_another(
    supervisor, caplog
):
    for stage_idx in range(2):
        await supervisor.start(stage_idx)
    await until(lambda: None not in (supervisor.pid(0), supervisor.pid(1)))
    before = supervisor.pid(0), supervisor.pid(1)
    with caplog.at_level("INFO"):
        os.kill(supervisor._forks.pid, signal.SIGKILL)
        await until(lambda: {supervisor.pid(0), supervisor.pid(1)}.isdisjoint({*before, None}))
    assert not any(map(is_running, before))
    assert caplog.text.count(f"code={-signal.SIGKILL}") == 2


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


async def test_what_cannot_even_be_imported_is_told_of_and_tried_again(
    monkeypatch, supervisor, caplog
):
    works = fork_server.COMMAND
    monkeypatch.setattr(fork_server, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with caplog.at_level("INFO"):
        await supervisor.start(0)
        await until(lambda: supervisor.problem(0) == "it ended with status 3")
    monkeypatch.setattr(fork_server, "COMMAND", works)
    await pid_other_than(supervisor, ())


async def test_nothing_is_left_of_workers_that_are_not_to_run_any_more(work):
    async with trio.open_nursery() as nursery:
        supervisor = Supervisor(None, lambda stage_idx: (), nursery)
        for stage_idx in range(2):
            await supervisor.start(stage_idx)
        await until(lambda: None not in (supervisor.pid(0), supervisor.pid(1)))
        pids = supervisor.pid(0), supervisor.pid(1), supervisor._forks.pid
        nursery.cancel_scope.cancel()
    assert not any(map(is_left, pids))


def is_left(pid):
    """Also where it has ended, and nobody has waited for it."""
    return Path(f"/proc/{pid}").exists()


async def test_signals_end_workers_and_not_what_they_are_forks_of(supervisor):
    await supervisor.start(0)
    first, server = await pid_other_than(supervisor, ()), supervisor._forks.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(server, number)
    os.kill(first, signal.SIGTERM)
    second = await pid_other_than(supervisor, (first,))
    os.kill(second, signal.SIGINT)
    assert parent(await pid_other_than(supervisor, (first, second))) == server


LOOK = """
import json, os, signal, sys
numbers = os.listdir("/proc/self/fd")
fds = [int(number) for number in numbers if os.path.exists("/proc/self/fd/" + number)]
blocked = len(signal.pthread_sigmask(signal.SIG_BLOCK, []))
memories = [int(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--weights-fd", "--session-fd")]
statuses = [os.fstat(memory) for memory in memories]
found = [fds, blocked, memories, [[each.st_ino, each.st_mode & 0o777] for each in statuses]]
open(TOLD, "a").write(json.dumps(found) + "\\n")
"""


@needs_sealed_memory
async def test_a_worker_has_its_own_streams_and_nothing_of_others(supervisor, work, tmp_path):
    told = tmp_path / "told"
    work(LOOK.replace("TOLD", repr(str(told))) + WORK)
    for stage_idx in range(3):
        await supervisor.start(stage_idx)
    await until(lambda: told.exists() and told.read_text().count("\n") == 3)
    for fds, blocked, memories, _ in map(json.loads, told.read_text().splitlines()):
        assert {*fds} == {0, 1, 2, *memories}
        assert len({*memories}) == 2
        assert blocked == 0


SHOW = """
import json, os, sys
pairs = list(zip(sys.argv, sys.argv[1:]))
own = [os.fstat(int(word)).st_ino for flag, word in pairs if flag == "--weights-fd"]
stages = [int(word) for flag, word in pairs if flag == "--beside-stage"]
others = [os.fstat(int(word)).st_ino for flag, word in pairs if flag == "--beside-fd"]
open(TOLD, "a").write(json.dumps([own, stages, others]) + "\\n")
"""


@needs_sealed_memory
async def test_workers_of_the_same_files_have_room_for_each_others_weights(work, tmp_path, nursery):
    told = tmp_path / "told"
    work(SHOW.replace("TOLD", repr(str(told))) + WORK)
    others = {0: [2], 1: [], 2: [0]}
    supervisor = Supervisor(None, lambda idx: (), nursery, alike=lambda idx: others[idx])
    for stage_idx in others:
        await supervisor.start(stage_idx)
    await until(lambda: told.exists() and told.read_text().count("\n") == 3)
    found = sorted(map(json.loads, told.read_text().splitlines()), key=lambda each: each[1:])
    (alone, (second, *rest), (first, *more)) = found
    assert alone[1:] == [[], []]
    assert rest == [[0], first]
    assert more == [[2], second]
    assert len({*alone[0], *first, *second}) == 3
    nursery.cancel_scope.cancel()


WATCH = """
import sys, trio
from pipeline.placement import fork_server, forked_worker
from pipeline.placement.worker_supervisor import Supervisor

async def main():
    async with trio.open_nursery() as nursery:
        supervisor = Supervisor(None, lambda stage_idx: (), nursery)
        await supervisor.start(0)
        while supervisor.pid(0) is None:
            await trio.sleep(0.01)
        print(supervisor.pid(0), supervisor._forks.pid, flush=True)

fork_server.COMMAND = (sys.executable, "-c", sys.argv[1])
trio.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only those end that can")
def test_a_worker_that_hangs_ends_with_whoever_watched_over_it(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WORK}")
    forks = "from pipeline.placement import fork_server; fork_server.LEAVE_SECONDS = 1\n"
    forks += FORK.format(path=str(path))
    command = [sys.executable, "-c", WATCH, forks]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watching:
        pids = list(map(int, watching.stdout.readline().split()))
        assert len(pids) == 2
        assert all(map(is_running, pids))
        watching.kill()
    for _ in range(600):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.1)
    raise AssertionError(pids)


async def test_a_silent_worker_is_killed_once_it_is_seen_to_do_nothing(supervisor):
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    await idle(supervisor)
    silent = StageSilent(0, "it says nothing")
    supervisor.on_loss(silent)
    await trio.sleep(0.2)
    assert supervisor.pid(0) == first  # one refused handshake is no evidence
    supervisor.on_loss(silent)
    assert await pid_other_than(supervisor, (first,))


async def test_a_silent_worker_that_runs_is_left_alone(supervisor, work):
    """As one is whose places for handshakes are all taken by strangers."""
    busy = "import time\nwhile True: time.sleep(0.01)"
    work(busy)
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


async def test_how_far_a_worker_has_come_is_what_it_has_computed(supervisor, work):
    assert supervisor.progress(0) is None
    working = "import time\nend = time.process_time() + 0.3\n"
    working += f"while time.process_time() < end: pass\n{WORK}"
    work(working)
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
    return "\n".join([*lines, WORK if code is None else f"raise SystemExit({code})"])


async def test_a_first_worker_with_unusable_input_is_not_tried_again(work):
    work(says("failed m.json: no such file", code=2))
    with (
        trio.fail_after(60),
        pytest.RaisesGroup(
            pytest.RaisesExc(InputError, match="stage 0 cannot start: m.json: no such file")
        ),
    ):
        async with trio.open_nursery() as nursery:
            await Supervisor(None, lambda stage_idx: (), nursery).start(0)


async def test_how_much_a_worker_has_read_is_known_while_it_reads(supervisor, work):
    work(says("a library's line", "loaded 10 40", "loaded 30 40", code=None))
    await supervisor.start(0)
    await until(lambda: supervisor.progress(0) and supervisor.progress(0).loaded == (30, 40))
    first = supervisor.pid(0)
    work(says(code=None))
    os.kill(first, signal.SIGKILL)
    await pid_other_than(supervisor, (first,))
    assert supervisor.progress(0).loaded is None


async def test_a_successor_with_unusable_input_is_tried_until_that_is_mended(
    supervisor, work, caplog
):
    work(says("listening 127.0.0.1:1 127.0.0.1:2", code=None))
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    assert supervisor.problem(0) is None
    work(says("failed other weights", code=2))
    with caplog.at_level("INFO"):
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.problem(0) == "other weights")
        work(says("listening 127.0.0.1:1 127.0.0.1:2", code=None))
        await until(lambda: supervisor.problem(0) is None)
    assert "event=worker_back" in caplog.text
    assert "error=other weights" in caplog.text


@needs_sealed_memory
async def test_a_successor_is_handed_the_memory_that_its_stage_had(supervisor, work, tmp_path):
    told = tmp_path / "told"
    work(LOOK.replace("TOLD", repr(str(told))) + WORK)
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    await until(lambda: told.exists() and told.read_text())
    supervisor.on_loss(StageHung(0, "it says nothing"))
    await pid_other_than(supervisor, (first,))
    await until(lambda: len(told.read_text().splitlines()) == 2)
    before, after = (json.loads(line)[-1] for line in told.read_text().splitlines())
    assert before == after
    assert [mode for _, mode in before] == [0o600] * 2


@needs_sealed_memory
@pytest.mark.parametrize("is_killed_with_its_parent", [False, True], ids=["its own", "uncertain"])
async def test_what_a_session_held_outlives_no_fault_and_no_worker_that_may_still_run(
    supervisor, work, tmp_path, is_killed_with_its_parent
):
    told = tmp_path / "told"
    work(LOOK.replace("TOLD", repr(str(told))) + WORK)
    await supervisor.start(0)
    first = await pid_other_than(supervisor, ())
    await until(lambda: told.exists() and told.read_text())
    if is_killed_with_its_parent:
        os.kill(supervisor._forks.pid, signal.SIGKILL)
    else:
        os.kill(first, signal.SIGSEGV)
    await pid_other_than(supervisor, (first,))
    await until(lambda: len(told.read_text().splitlines()) == 2)
    before, after = (json.loads(line)[-1] for line in told.read_text().splitlines())
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


async def test_without_such_memory_workers_load_for_themselves(
    supervisor, work, monkeypatch, tmp_path, caplog
):
    def refuse(name, flags):
        raise OSError("no such call")

    told = tmp_path / "told"
    work(f"import sys; open({str(told)!r}, 'w').write(' '.join(sys.argv)); {WORK}")
    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    with caplog.at_level("INFO"):
        await supervisor.start(0)
        await until(lambda: told.exists() and "--flag-0" in told.read_text())
    assert "-fd" not in told.read_text()
    assert caplog.text.count("event=weights_not_kept") == 1


async def test_one_that_is_ended_while_it_starts_a_worker_ends_quietly(monkeypatch, caplog):
    def start_too_late():
        nursery.cancel_scope.cancel()
        raise OSError(errno.EBADF, "what is handed on is closed already")

    monkeypatch.setattr(forked_worker, "started", start_too_late)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await Supervisor(None, lambda stage_idx: (), nursery).start(0)
    assert not caplog.records
