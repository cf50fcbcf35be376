"""The script that generates on this machine: a worker that dies ends it only where it is to."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import PIPE_BYTES, Ports

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Of three bytes each: they do not fit into the pipe that they are read from.
NUM_TOKENS = 2000


@pytest.fixture
def base_port():
    ports = Ports(23)
    yield ports.base
    ports.release()


def own_scripts(directory):
    """A directory with the script, for which what the tests run in is set up."""
    scripts = directory / "scripts"
    shutil.rmtree(scripts, ignore_errors=True)
    scripts.mkdir()
    for name in ("run_local.sh", "lib.sh"):
        shutil.copy(SCRIPTS / name, scripts)
    (scripts / "setup.sh").write_text("")
    return scripts


def generate_and_kill_a_worker(directory, model, base_port, num_bytes, *flags):
    """Exit status, text and log, where a worker is killed after so many bytes of text."""
    scripts = own_scripts(directory)
    log = directory / "log"
    environment = os.environ | {
        "MODEL_DIR": str(model), "VEILPIPE_VENV": sys.prefix, "VEILPIPE_DEV_DIR": str(directory),
        "BASE_PORT": str(base_port),
    }  # fmt: skip
    command = ["bash", scripts / "run_local.sh", *flags, "Hello there", str(NUM_TOKENS)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=environment, pipesize=PIPE_BYTES
        )
    begun = process.stdout.read(num_bytes)
    assert len(begun) == num_bytes, log.read_text()
    started = re.findall(r"worker_started stage=1 pid=(\d+)", log.read_text())
    os.kill(int(started[-1]), signal.SIGKILL)
    with process.stdout as stdout:
        text = begun + stdout.read()
    return process.wait(300), text, log.read_text()


def test_a_worker_that_dies_is_replaced_unless_its_loss_is_to_end_it(
    tiny_model, tmp_path, base_port
):
    status, whole, log = generate_and_kill_a_worker(tmp_path, tiny_model, base_port, 100)
    assert status == 0, log
    assert "event=failover_complete" in log
    assert f"latency: {NUM_TOKENS} tokens" in log
    status, begun, log = generate_and_kill_a_worker(
        tmp_path, tiny_model, base_port, 600, "--exit-on-loss"
    )
    assert status == 1, log
    assert "error: stage 1 is lost" in log.splitlines()[-1]
    assert len(begun) < len(whole)
    # What it ends with may be the half of a letter.
    assert whole.decode().startswith(begun.decode().rstrip("\ufffd\n"))


def test_a_model_file_that_is_not_there_is_refused_and_not_downloaded_to(tmp_path):
    scripts = own_scripts(tmp_path)
    missing = tmp_path / "model.gguf"
    environment = os.environ | {"MODEL_DIR": str(missing), "VEILPIPE_VENV": sys.prefix}
    command = ["bash", scripts / "run_local.sh", "Hello there"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"run_local.sh: error: there is no {missing}\n"
    assert not missing.exists()
