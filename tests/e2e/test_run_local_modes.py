"""The script in each of its modes: whoever dies in the midst, the text is the plain one."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.e2e.conftest import Ports

SCRIPTS = Path(__file__).parents[2] / "scripts"
NUM_TOKENS = 200
# A pipe holds so much that nobody has read: nobody gets further than that ahead of the reader.
PIPE_BYTES = 4096
READ_BYTES = 300

# Real processes, up to five at a time, each of which takes seconds to start.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model, most of whose tokens are long: a text that nobody reads is never over."""
    directory = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model, directory)
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    names = [*letters, *(f"<{number}{'-' * 100}>" for number in range(256 - len(letters)))]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    # no token may end it
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((directory / name).read_text()) | {"eos_token_id": None}
        (directory / name).write_text(json.dumps(fields))
    return directory


@pytest.fixture
def generate(model, tmp_path):
    """Runs the script; `kill` is called once some of the text has been read."""
    ports = Ports(33)

    def run(*flags, kill=lambda run_dir, log: None, **environment):
        log = tmp_path / "log"
        scripts = tmp_path / "scripts"
        if not scripts.exists():
            scripts.mkdir()
            for name in ("run_local.sh", "lib.sh"):
                shutil.copy(SCRIPTS / name, scripts)
            (scripts / "setup.sh").write_text("")  # what the tests run in is set up
        environment = os.environ | {
            "MODEL_DIR": str(model), "VEILPIPE_VENV": sys.prefix, "VEILPIPE_DEV_DIR": str(tmp_path),
            "BASE_PORT": str(ports.base), "TMPDIR": str(tmp_path), **environment,
        }  # fmt: skip
        command = ["bash", scripts / "run_local.sh", *flags, "Hello there", str(NUM_TOKENS)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env=environment
            )
        with process:
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            begun = process.stdout.read(READ_BYTES)
            assert len(begun) == READ_BYTES, log.read_text()
            kill(tmp_path, log)
            text = begun + process.stdout.read()
        assert process.returncode == 0, log.read_text()
        assert len(text) > READ_BYTES + 2 * PIPE_BYTES
        return text, log.read_text()

    yield run
    ports.release()


def part_worker(run_dir, log):
    """Kill whoever is asked for a part of the layers' work."""
    del log
    found = [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and is_part_worker(process, run_dir)
    ]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)


def is_part_worker(process, run_dir):
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return False
    names = {Path(os.fsdecode(word)).name for word in words[:3]}
    is_of_run = any(os.fsdecode(word).startswith(str(run_dir)) for word in words)
    return is_of_run and "stage-worker" in names and bool(names & {"attention", "linear"})


def stage(index):
    """Kill a stage."""

    def kill(run_dir, log):
        del run_dir
        started = re.findall(rf"worker_started stage={index} pid=(\d+)", log.read_text())
        os.kill(int(started[-1]), signal.SIGKILL)

    return kill


@pytest.fixture(scope="module")
def plain_text():
    """What all modes are to say, once one has said it."""
    return []


@pytest.mark.parametrize(
    ("mode", "kill", "environment"),
    [
        ("plain", stage(1), {}),
        ("client", stage(1), {}),
        ("rotate", stage(1), {}),
        ("scx", part_worker, {}),
        ("scx", stage(0), {}),
        ("scx", part_worker, {"KV_NOISE": "1", "KV_DECOYS": "8", "ONE_TIME_KEYS": "1"}),
        ("scx-paper", stage(1), {}),
        ("scx-paper", stage(1), {"KV_NOISE": "1", "ONE_TIME_KEYS": "1"}),
        ("offload", part_worker, {"MASKS": "900"}),
        ("offload", stage(0), {"MASKS": "900"}),
        ("mix", part_worker, {}),
        ("mix", stage(0), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_whoever_dies_the_text_is_the_plain_one(generate, plain_text, mode, kill, environment):
    if not plain_text:
        plain_text.append(generate("--mode", "plain")[0])
    text, log = generate("--mode", mode, kill=kill, **environment)
    assert text == plain_text[0]
    # behind its prompt a text whose prompt's rows were mixed asks nobody
    assert ("event=failover_complete" in log) == ((mode, kill) != ("mix", part_worker)), log
