"""Talking in a terminal, and through a pipe."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time

import pytest

from tests.e2e.conftest import BIN, new_cluster

# After an answer, or a line that was taken back; the last that is shown.
PROMPT = r"\r\n> $"


class Terminal:
    """A command that believes it is at a terminal."""

    def __init__(self, command, environment):
        self._fd, theirs = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=environment | {"TERM": "dumb"},
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def type(self, text):
        self.shown = ""
        os.write(self._fd, text.encode())

    def wait_for(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition(self.shown):
            assert time.monotonic() < end, self.shown[-3000:]
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 65536).decode(errors="replace")
        return self.shown

    def wait_for_prompt(self):
        return self.wait_for(lambda shown: re.search(PROMPT, shown), 20)

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def command(tmp_path, text_model):
    """A chat over two stages that are started with it."""
    with new_cluster(tmp_path, text_model) as cluster:
        cluster.plan(2)
        yield [
            BIN / "pipeline-orch", "chat", "--manifest", cluster.manifest,
            "--model-dir", cluster.model_dir, "--supervise", "--dev",
        ], cluster.environment  # fmt: skip


def piped(command, said, *extra, kills=None, log):
    """What a chat answers to lines from a pipe, while the worker of a stage is killed."""
    arguments, environment = command
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*arguments, *extra], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment,
        )  # fmt: skip
    process.stdin.write(said.encode())
    process.stdin.flush()
    first = os.read(process.stdout.fileno(), 1)
    if kills is not None:
        started = re.findall(rf"worker_started stage={kills} pid=(\d+)", log.read_text())
        os.kill(int(started[-1]), signal.SIGKILL)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log.read_text()
    return (first + rest).decode()


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_the_conversation(command, tmp_path):
    whole = piped(command, "hello\n", log=tmp_path / "log")
    arguments, environment = command
    terminal = Terminal(arguments, environment)
    try:
        terminal.wait_for(lambda shown: shown.endswith("> "))
        terminal.type("hello\n")
        terminal.wait_for(lambda shown: len(shown) > 60)
        terminal.type("\x03")
        said = terminal.wait_for_prompt()
        assert len(said) < len(whole) / 2
        terminal.type("half a line\x03")
        terminal.wait_for_prompt()
        terminal.type("again\n")  # the stages have not been told to end
        terminal.wait_for(lambda shown: len(shown) > 60)
        terminal.type("\x03")
        terminal.wait_for_prompt()
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.end()


@pytest.mark.slow
def test_an_answer_goes_on_when_a_stage_is_lost_in_its_middle(command, tmp_path):
    log = tmp_path / "log"
    said = "hello\nand again\n"
    extra = ("--verbose", "--max-tokens", "400")
    undisturbed = piped(command, said, *extra, log=log)
    assert len(undisturbed) > 400
    assert piped(command, said, *extra, kills=1, log=log) == undisturbed
    assert "event=worker_died stage=1" in log.read_text()
