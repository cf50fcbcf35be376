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

from tests.e2e.conftest import BIN, Ports
from transport.private_files import create_private

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROMPT, NUM_TOKENS = "Hello there", 200
# A pipe holds so much that nobody has read: nobody gets further than that ahead of the reader.
PIPE_BYTES = 4096
READ_BYTES = 300

# Real processes, up to five at a time, each of which takes seconds to start.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model; its tokens but the prompt's are long: a text nobody reads is never over."""
    directory = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model, directory)
    letters = sorted(set(PROMPT.replace(" ", "Ġ")))
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
        command = ["bash", scripts / "run_local.sh", *flags, PROMPT, str(NUM_TOKENS)]
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
        # so little noise, and so wide a bound, that no token is another
        ("dp", stage(1), {"DP_SIGMA": "1e-9", "DP_CLIP": "1000", "DP_EPSILON": "1e30"}),
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


@pytest.fixture
def rotated_parts(model, tmp_path):
    """Shards of a model rotated by a secret that is always the same, for rows in eight bits."""
    ports = Ports(22)
    parts, manifest, secret = (tmp_path / name for name in ("parts", "planned.json", "secret"))
    create_private(secret, bytes(range(32)))
    for command in (
        ["plan", "--stages", "2", "--base-port", ports.base, "--split", "client",
         "--wire-dtype", "I8", "-o", manifest],
        ["shard", "--manifest", manifest, "--rotate-secret", secret, "--out", parts],
    ):  # fmt: skip
        subprocess.run(
            [BIN / "pipeline-orch", *map(str, command), "--model-dir", model], check=True
        )
    yield parts
    ports.release()


def test_rows_in_eight_bits_are_the_same_again_when_a_stage_dies(generate, rotated_parts):
    flags = ("--mode", "rotate-int8")
    expected, _ = generate(*flags, MODEL_DIR=str(rotated_parts))
    text, log = generate(*flags, kill=stage(1), MODEL_DIR=str(rotated_parts))
    assert text == expected
    assert "event=failover_complete" in log
