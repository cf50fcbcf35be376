"""One's own machines, as real processes: offered, joined, sent their parts, and computing."""

import fcntl
import io
import os
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest

from tests.e2e.conftest import BIN, Ports, end

pytestmark = pytest.mark.slow

PROMPT = "Hello there"
WORDS = ("--text", PROMPT, "--max-tokens", "12", "--ignore-eos")


class OwnMachines:
    """A home, and machines beside it that share nothing with it but a network."""

    def __init__(self, directory, model_dir):
        self.directory = directory
        self.model_dir = model_dir
        self.manifest = directory / "home" / "cluster.json"
        self.manifest.parent.mkdir()
        self.machines = {}
        self.ports = Ports(40)

    def run(self, *words, name="home"):
        """What a command at home says: exit code, stdout, stderr."""
        return subprocess.run(
            [BIN / "pipeline-orch", *map(str, words)], capture_output=True, text=True,
            env=self.environment(name), timeout=300, check=False,
        )  # fmt: skip

    def environment(self, name):
        environment = {key: value for key, value in os.environ.items() if "VEILPIPE" not in key}
        return environment | {"HOME": str(self.directory / name), "XDG_STATE_HOME": ""}

    def start(self, name, command, *extra):
        """A machine's process, once it listens; with its line, if it offers one."""
        index = int(name[-1])
        (self.directory / name).mkdir(exist_ok=True)
        log = self.directory / name / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [BIN / "stage-worker", command, "--listen",
                 f"127.0.0.1:{self.ports.base + 10 * index}", "--threads", "1", *extra],
                stdout=file, stderr=file, env=self.environment(name), stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.machines[name] = process
        self.wait_for_log(name, "event=listening")
        found = re.search(r"^VP1-\w+$", log.read_text(), re.MULTILINE)
        return SimpleNamespace(process=process, log=log, line=found and found[0])

    def wait_for_log(self, name, text, seconds=60):
        log = self.directory / name / "log"
        until = time.monotonic() + seconds
        while text not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            assert self.machines[name].poll() is None, log.read_text()
            time.sleep(0.05)

    def join(self, *words):
        return self.run("join", *words, "--model-dir", self.model_dir, "-o", self.manifest)

    def text(self):
        return self.run("--manifest", self.manifest, *WORDS)

    def here(self):
        """What the whole model says in one process here."""
        alone = self.directory / "alone.json"
        base = self.ports.base + 36
        words = ("--model-dir", self.model_dir, "--stages", 1, "--base-port", base, "-o", alone)
        assert self.run("plan", *words).returncode == 0
        tokenizer = self.model_dir / "tokenizer.json"
        found = self.run(
            "--manifest", alone, "--tokenizer", tokenizer, *WORDS,
            "--supervise", "--model-dir", self.model_dir, "--dev",
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found.stdout

    def stop(self):
        for process in self.machines.values():
            if process.poll() is None:
                end(process)
        self.ports.release()


@pytest.fixture
def own(tmp_path, tiny_model):
    machines = OwnMachines(tmp_path, tiny_model)
    yield machines
    machines.stop()


def refused(found, *words, code=1):
    assert found.returncode == code, found.stderr
    errors = [line for line in found.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, found.stderr
    assert "Traceback" not in found.stderr
    for word in words:
        assert word in errors[0]


def test_two_machines_are_joined_sent_their_parts_and_compute_what_one_does(own):
    offers = [own.start(name, "offer", "--yes") for name in ("machine0", "machine1")]
    joined = own.join(*(offer.line for offer in offers), "--push")
    assert joined.returncode == 0, joined.stderr
    heads, *rows = joined.stdout.splitlines()
    assert heads.split()[:3] == ["stage", "machine", "layers"]
    assert len(rows) == 2
    found = own.text()
    assert found.returncode == 0, found.stderr
    assert found.stdout == own.here()
    # Whoever has copied a line has nothing.
    (own.directory / "thief").mkdir()
    stolen = own.directory / "stolen.json"
    words = ("join", offers[0].line, "--model-dir", own.model_dir, "-o", stolen)
    refused(own.run(*words, name="thief"), "has been used already, by SHA256:")
    copied = own.run("--manifest", own.manifest, *WORDS, name="thief")
    refused(copied, "lists other orchestrators than this one", code=2)


def test_machines_come_back_are_added_and_left_out_and_parts_are_kept_in_order(own):
    lines = [own.start(f"machine{idx}", "offer", "--yes").line for idx in range(2)]
    assert own.join(*lines, "--push").returncode == 0
    expected = own.here()
    end(own.machines["machine1"])
    own.start("machine1", "serve")
    own.wait_for_log("machine1", "event=serving")
    assert own.text().stdout == expected
    third = own.start("machine2", "offer", "--yes").line
    joined = own.join(third, "--push")
    assert joined.returncode == 0, joined.stderr
    assert len(joined.stdout.splitlines()) == 4
    assert own.text().stdout == expected
    first = f"127.0.0.1:{own.ports.base}"
    refused(own.join("--remove", "nobody:1"), "the manifest has these machines", first, code=2)
    left = own.join("--remove", first, "--push")
    assert left.returncode == 0, left.stderr
    assert first not in left.stdout
    assert own.text().stdout == expected
    listed = own.run("parts", "--manifest", own.manifest).stdout
    assert " unused" in listed
    kept = own.run("parts", "--manifest", own.manifest, "--remove-unused").stdout
    assert " unused" not in kept
    assert own.text().stdout == expected
    shutil.rmtree(own.manifest.with_suffix(".parts") / "stage0")
    refused(own.run("push", "--manifest", own.manifest), "give --model-dir", code=2)
    again = own.run("push", "--manifest", own.manifest, "--model-dir", own.model_dir)
    assert again.returncode == 0, again.stderr


def test_a_machine_that_was_set_up_anew_is_somebody_else_until_it_is_joined_again(own):
    line = own.start("machine0", "offer", "--yes").line
    assert own.join(line, "--push").returncode == 0
    expected = own.text().stdout
    end(own.machines["machine0"])
    shutil.rmtree(own.directory / "machine0")
    again = own.start("machine0", "offer", "--yes")
    push = own.run("push", "--manifest", own.manifest)
    refused(push, "its key is not SHA256:", "SOMEBODY ELSE MAY BE ANSWERING")
    assert own.join(again.line, "--push").returncode == 0
    assert own.text().stdout == expected


def test_a_machine_that_is_lost_in_mid_sentence_is_done_without(own):
    lines = [own.start(f"machine{idx}", "offer", "--yes").line for idx in range(3)]
    assert own.join(*lines, "--push").returncode == 0
    words = (
        "--manifest", own.manifest, "--text", PROMPT, "--max-tokens", 4000, "--ignore-eos",
        "--temperature", 1, "--seed", 5,
    )  # fmt: skip
    expected = own.run(*words)
    assert expected.returncode == 0, expected.stderr
    replan = ("--replan", "--connect-timeout", "2", "--model-dir", own.model_dir)
    replan = (*replan, "--tokenizer", own.model_dir / "tokenizer.json")
    home = subprocess.Popen(
        [BIN / "pipeline-orch", *map(str, (*words, *replan))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own.environment("home"), bufsize=0,
    )  # fmt: skip
    # More text than this pipe holds: the end waits until it is read, however slow this test is.
    size = fcntl.fcntl(home.stdout.fileno(), fcntl.F_SETPIPE_SZ, 1)
    begun = home.stdout.read(64)
    while len(begun) <= len(PROMPT) + 1:
        begun += home.stdout.read(64)
    assert len(begun) + size < len(expected.stdout.encode())
    own.machines["machine1"].kill()
    rest, said = home.communicate(timeout=300)
    assert home.returncode == 0, said.decode()
    # As the other was read, which takes every kind of line's end for one.
    text = io.TextIOWrapper(io.BytesIO(begun + rest), "utf-8").read()
    assert text == expected.stdout
    assert b"event=replanned" in said
    assert b"lost=1" in said
