"""However a command ends: with an exit code, at most a line, and nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import error_reporting
from tests.e2e.processes import state

BIN = Path(sys.executable).parent

SHELL = {"full": '"$@" >/dev/full', "closed": '"$@" >&-'}


@pytest.mark.parametrize(
    ("arguments", "redirection"),
    [
        (["--help"], SHELL["full"]),
        (["plan", "--stages", "2", "--model-dir"], SHELL["closed"]),
        pytest.param(["--help"], SHELL["closed"], marks=pytest.mark.slow),
        pytest.param(
            ["plan", "--stages", "2", "--model-dir"], SHELL["full"], marks=pytest.mark.slow
        ),
    ],
    ids=["help-full", "plan-closed", "help-closed", "plan-full"],
)
def test_output_that_cannot_be_written_is_one_line(cluster, arguments, redirection):
    if arguments[-1] == "--model-dir":
        arguments = [*arguments, cluster.model_dir]
    result = subprocess.run(
        ["sh", "-c", redirection, "sh", BIN / "pipeline-orch", *arguments],
        capture_output=True, text=True, env=cluster.environment, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("pipeline-orch: error: cannot write to stdout: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_command_whose_lines_cannot_be_written_ends_as_with_them(cluster, redirection):
    def code(*arguments):
        return subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", BIN / "pipeline-orch", *arguments],
            stdout=subprocess.DEVNULL, env=cluster.environment, timeout=900, check=False,
        ).returncode  # fmt: skip

    assert code("--nonsense") == 2
    assert code("plan", "--stages", "2", "--model-dir", cluster.model_dir) == 0


def test_a_worker_needs_no_output_to_say_what_is_wrong(cluster):
    result = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", BIN / "stage-worker", "--stage-idx", "0",
         "--manifest", "/nowhere.json", "--model-dir", "/nowhere"],
        capture_output=True, text=True, env=cluster.environment, timeout=300,
    )  # fmt: skip
    assert result.returncode == 2
    assert "/nowhere.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def broken_command(monkeypatch, capfd):
    """Runs a command with a bug in it: (exit code, stderr)."""

    def run(*flags):
        app = error_reporting.new_app()

        @app.command()
        def broken(verbose: bool = False):
            raise KeyError("the prompt")

        monkeypatch.setattr(sys, "argv", ["stage-worker", *flags])
        with pytest.raises(SystemExit) as caught:
            error_reporting.run_app(app, "stage-worker")
        return caught.value.code, capfd.readouterr().err

    return run


def test_a_bug_is_one_line_that_says_where_and_quotes_nothing(broken_command):
    code, err = broken_command()
    assert code == 1
    assert "stage-worker: error: internal error: KeyError: in test_endings.py line" in err
    assert "--verbose" in err
    assert "prompt" not in err
    assert len(err.splitlines()) == 1


def test_a_bug_is_traced_when_asked(broken_command):
    code, err = broken_command("--verbose")
    assert code == 1
    assert "Traceback" in err
    assert "internal error" in err.splitlines()[-1]


# Stands in for seconds of importing: says when it has begun, and never ends by itself.
SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "numpy" or name == "typer":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
from pipeline.cli import entry
entry.{command}()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
@pytest.mark.parametrize("command", ["stage_worker", "pipeline_orch"])
def test_a_signal_during_the_imports_ends_a_command_quietly(command, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT.format(command=command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert stderr == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_while_a_worker_loads_ends_it_quietly(cluster, number):
    cluster.plan(1)
    config = cluster.model_dir / "config.json"
    config.unlink()
    os.mkfifo(config)  # opening it for writing waits until the worker reads
    worker = cluster.start_worker(0)
    with config.open("wb"):
        # A signal that comes between opening and reading would be noticed after the read.
        while state(worker.pid) != "S":
            time.sleep(0.001)
        worker.send_signal(number)
        assert worker.wait(300) == 128 + number
    assert "Traceback" not in cluster.log(0)
    assert "error" not in cluster.log(0)


def test_a_shard_that_is_interrupted_leaves_nothing_behind(cluster):
    cluster.plan(1)
    config = cluster.model_dir / "config.json"
    content = config.read_bytes()
    config.unlink()
    os.mkfifo(config)
    process = subprocess.Popen(
        [BIN / "pipeline-orch", "shard", "--manifest", cluster.manifest,
         "--model-dir", cluster.model_dir, "-o", cluster.directory / "shards"],
        env=cluster.environment,
    )  # fmt: skip
    before = {"model", "manifest.json"}

    def has_begun():
        return {each.name for each in cluster.directory.iterdir()} > before

    while True:
        with opened_for(process, config) as file:
            if has_begun():
                # A signal that comes between opening and reading would be noticed after the read.
                while state(process.pid) != "S":
                    time.sleep(0.001)
                process.terminate()
                assert process.wait(300) == 128 + signal.SIGTERM
                break
            # Another pipe each time it reads: the same one could be written to twice for one read.
            another = config.with_name("another")
            os.mkfifo(another)
            another.replace(config)
            file.write(content)
    assert not has_begun()


def opened_for(process, pipe):
    """The pipe, to be written to, once the process reads it."""
    while True:
        try:
            return os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb")
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        assert process.poll() is None
        time.sleep(0.001)


MODES = {"plain": {}, "dp": {"split": "client", "noise": (1e-9, 10.0)}}


@pytest.mark.parametrize("mode", ["plain", pytest.param("dp", marks=pytest.mark.slow)])
def test_sessions_that_end_as_they_should_break_no_link(cluster, mode):
    """Neither a prompt that is done nor a server that is stopped, in any stage's eyes."""
    cluster.plan(2, **MODES[mode])
    for idx in range(2):
        cluster.start_worker(idx)
    bound = ("--dp-epsilon", "1e30") if mode == "dp" else ()
    done = cluster.orch("Hello", "--max-tokens", "6", "--ignore-eos", *bound)
    assert done.returncode == 0, done.stderr
    server = cluster.serve(*bound)
    server.text("Hello", 3)
    server.stop()
    for idx in range(2):
        cluster.wait_for_log(idx, "event=session_ended", 2)
        log = cluster.log(idx)
        assert log.count("reason=shutdown") == 2, log
        assert "link_broken" not in log
