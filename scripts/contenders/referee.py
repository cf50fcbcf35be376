"""Starts contenders, lets one compute at a time, round by round, and keeps the times."""

import fcntl
import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from time import monotonic, sleep

from contenders.quiet import DISTURBED, Watch

START_SECONDS = 180
ANSWER_SECONDS = 120
# The steps after a prompt find caches as the contender before left them.
WARM_STEPS = 2
MAX_TRIES = 5
PAUSE_SECONDS = 0.5
TURN_SECONDS = 60


@dataclass(frozen=True)
class Contender:
    """`kind` is the format of its weights, `processes` how many compute, one after another."""

    name: str
    kind: str
    engine: str
    processes: int
    threads: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """`figure` turns the times of one run into the number that is kept."""

    name: str
    rows: int
    steps: int
    prompt: tuple[int, ...]
    figure: Callable[[Sequence[float]], float]


def step_ms(times: Sequence[float]) -> float:
    """The median step, without the prompt and the steps that warm up."""
    return statistics.median(times[1 + WARM_STEPS :])


class ContenderFailed(Exception):
    """What a contender last said before it ended, or that it said nothing in time."""


@dataclass(frozen=True)
class Run:
    """`others`: how many cores other processes kept busy meanwhile."""

    ms: list[float]
    token_ids: list[int]
    others: float


class Running:
    """A contender's process."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - until stop
        self._process = subprocess.Popen(
            contender.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that its own children go with it
        )
        try:
            self.about = self._read(START_SECONDS)["about"]
        except ContenderFailed:
            self.stop()
            raise

    def run(self, task: Task) -> Run:
        watch = Watch(self._process.pid)
        words = ["generate", task.rows, task.steps, *task.prompt]
        try:
            print(*words, file=self._process.stdin, flush=True)
        except OSError:
            raise ContenderFailed(self._last_words()) from None
        answer = self._read(ANSWER_SECONDS)
        return Run(answer["ms"], answer["token_ids"], watch.others())

    def run_quietly(self, task: Task) -> Run:
        """Run again when others used the machine meanwhile; the least disturbed run counts."""
        runs = [self.run(task)]
        while min(run.others for run in runs) > DISTURBED and len(runs) < MAX_TRIES:
            sleep(PAUSE_SECONDS)
            runs.append(self.run(task))
        return min(runs, key=lambda run: run.others)

    def stop(self) -> None:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, stop)
                self._process.wait(2)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):  # a request that it never read
                pipe.close()

    def _read(self, seconds: float) -> dict:
        watchdog = Timer(seconds, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            raise ContenderFailed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return "it took too long"
        return lines[-1][:200] if lines else f"it ended with exit code {code}"


@dataclass
class Outcome:
    """Per contender's name: a figure per round of each task, what it is, what it generated."""

    figures: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    about: dict[str, str] = field(default_factory=dict)
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    # Cores that others used during each kept run.
    disturbance: list[float] = field(default_factory=list)


class Turns:
    """Takes turns of a minute with whoever else measures here and locks the same file."""

    def __init__(self, lock: Path | None) -> None:
        self._lock = lock
        self._held = ExitStack()
        self._until = 0.0

    @contextmanager
    def round(self) -> Iterator[None]:
        """A round is never split; several share a turn."""
        if self._lock is not None and self._until == 0.0:
            file = self._held.enter_context(self._lock.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
            self._until = monotonic() + TURN_SECONDS
        yield
        if monotonic() >= self._until:
            self.end()

    def end(self) -> None:
        self._held.close()
        self._until = 0.0


def compete(
    contenders: Sequence[Contender],
    tasks: Sequence[Task],
    rounds: int,
    lock: Path | None,
    say: Callable[[str], None],
) -> Outcome:
    """Every round runs each task once with every contender, the first one after another each time.

    A round before the first warms up and is not kept. A contender that fails is left out from then
    on, and its figures are dropped: medians of different rounds do not compare.
    """
    outcome = Outcome()
    running: list[Running] = []
    turns = Turns(lock)
    try:
        for contender in contenders:
            try:
                running.append(Running(contender))
            except ContenderFailed as error:
                outcome.skipped[contender.name] = str(error)
                continue
            outcome.about[contender.name] = running[-1].about
            say(f"{contender.name} is ready")
        for index in range(rounds + 1):
            with turns.round():
                for task in tasks:
                    _run_once(running, task, outcome, is_kept=index > 0)
            running.append(running.pop(0))
            say(f"round {index} of {rounds}")
    finally:
        turns.end()
        for each in running:
            each.stop()
    return outcome


def _run_once(running: list[Running], task: Task, outcome: Outcome, *, is_kept: bool) -> None:
    for each in list(running):
        name = each.contender.name
        try:
            run = each.run_quietly(task) if is_kept else each.run(task)
        except ContenderFailed as error:
            outcome.skipped[name] = str(error)
            outcome.figures.pop(name, None)
            running.remove(each)
            each.stop()
            continue
        if is_kept:
            outcome.figures[name][task.name].append(task.figure(run.ms))
            outcome.disturbance.append(run.others)
        if task.rows == 1 and task.steps > 1:
            outcome.token_ids[name] = run.token_ids
