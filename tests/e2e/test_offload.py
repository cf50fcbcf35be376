"""Linears computed by a worker nobody trusts: the plain text, whoever dies; lies are one error."""

import re
import stat
import subprocess
import sys

import pytest

from transport.dial_and_listen import TcpEndpoint

from .conftest import BIN, Ports, expect

PROMPT, NUM_TOKENS = "Hello there, my friend", 40
# Answers right for a while, and then as its first argument says.
LIAR = """
import signal
import sys
import numpy as np
from pipeline.cli import linear_worker
from pipeline.offload.linear_worker import LinearWorker
from pipeline.remote_parts.wire import to_array, to_tensor

how, right, num_asked, before = sys.argv.pop(1), LinearWorker.answer, 0, {}

def answer(self, header, tensors):
    global num_asked
    num_asked += 1
    if how == "silent" and num_asked > 320:
        signal.pause()
    found, (rows,) = right(self, header, tensors)
    rows = to_array(rows).copy()
    old = before.setdefault((header, rows.shape), rows.copy())
    if num_asked > 100:
        if how == "off":
            rows[0, 0] += np.uint64(1 << 63)
        elif how == "replayed":
            rows = old
        elif how == "short":
            rows = rows[:, :-1]
        elif how == "floats":
            rows = rows.astype(np.float64)
    return found, (to_tensor(rows),)

LinearWorker.answer = answer
linear_worker.main()
"""


class Home:
    """A stage at home, and the linear worker it asks."""

    def __init__(self, cluster):
        self.cluster = cluster

    def plan(self, kind, num_masks=0):
        ports = Ports(1)
        self.cluster._ports.append(ports)
        self.cluster.plan(1, part=(kind, TcpEndpoint("127.0.0.1", ports.base), None))
        if num_masks:
            self.make_masks(num_masks)

    def make_masks(self, num_masks):
        masks = self.cluster.directory / "masks"
        masks.unlink(missing_ok=True)
        result = self.cluster.orch_command(
            "masks", "make", "--manifest", self.cluster.manifest,
            "--model-dir", self.cluster.model_dir, "--tokens", str(num_masks), "-o", masks,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert stat.S_IMODE(masks.stat().st_mode) == 0o600

    def start(self, *, is_masked=True, lies=None):
        masks = ["--masks", self.cluster.directory / "masks"] if is_masked else []
        self.start_linear(lies)
        return self.cluster.start_worker(0, *masks)

    def start_linear(self, lies=None):
        command = (
            [BIN / "stage-worker", "linear"] if lies is None else [sys.executable, "-c", LIAR, lies]
        )
        with self.log_path.open("ab") as file:
            self.cluster.workers["linear"] = subprocess.Popen(
                [*command, "--manifest", self.cluster.manifest, "--model-dir",
                 self.cluster.model_dir, "--dev"],
                stdout=file, stderr=file, env=self.cluster.environment,
            )  # fmt: skip

    @property
    def log_path(self):
        return self.cluster.directory / "linear.log"

    def text(self, num_tokens=NUM_TOKENS):
        result = self.cluster.orch(PROMPT, "--max-tokens", str(num_tokens), "--ignore-eos")
        assert result.returncode == 0, result.stderr
        return result.stdout

    def text_while_dying(self):
        """What comes out where the linear worker is killed, and replaced, once a text has begun.

        And what was said of it.
        """
        process = self.cluster.start_orch(PROMPT, "--max-tokens", str(NUM_TOKENS), "--ignore-eos")
        read = b""
        while len(read) < len(PROMPT) + 5:
            read += process.stdout.read(1)
        self.cluster.workers["linear"].kill()
        self.cluster.workers["linear"].wait()
        self.start_linear()
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return (read + out).decode(), err.decode()


# Real processes, each of which takes seconds to start; what they do is tested beside the source.
pytestmark = pytest.mark.slow


@pytest.fixture
def home(cluster):
    return Home(cluster)


@pytest.fixture
def plain_text(cluster):
    cluster.plan(1)
    worker = cluster.start_worker(0, "--once")
    result = cluster.orch(PROMPT, "--max-tokens", str(NUM_TOKENS), "--ignore-eos")
    assert result.returncode == 0, result.stderr
    worker.wait(300)
    return result.stdout


def test_under_masks_the_text_is_the_plain_one_also_when_the_worker_dies(home, plain_text):
    home.plan("linear", 300)
    home.start(lies="silent")  # in the midst of a text, which waits for it until it dies
    text, said = home.text_while_dying()
    assert text == plain_text
    assert "event=failover_started" in said
    assert "linear worker" in said
    assert home.text() == plain_text


def test_mixed_prompts_give_the_plain_text_and_what_follows_needs_no_worker(home, plain_text):
    home.plan("mixed-linear")
    home.start(is_masked=False)
    text, said = home.text_while_dying()
    assert text == plain_text
    assert "failover" not in said
    assert home.text() == plain_text


@pytest.mark.parametrize("lies", ["off", "replayed", "short", "floats"])
def test_a_lie_is_one_error_and_the_text_goes_on_with_an_honest_worker(home, lies):
    home.plan("linear", 300)
    home.start(lies=lies)
    result = home.cluster.orch(PROMPT, "--max-tokens", str(NUM_TOKENS), "--ignore-eos")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "linear worker" in errors[0]
    honest = result.stdout.rstrip("\n\ufffd")  # half a character at its end is none
    home.cluster.workers["linear"].kill()
    home.cluster.workers["linear"].wait()
    home.start_linear()
    assert home.text().startswith(honest)


def test_masks_that_run_out_are_one_error_that_says_what_to_run(home):
    home.plan("linear", 30)
    worker = home.start()
    result = home.cluster.orch(PROMPT, "--max-tokens", str(NUM_TOKENS), "--ignore-eos")
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert re.search(
        r"error: .*0 of 30 masks are left and 1 are needed.*pipeline-orch masks make", error
    )
    assert worker.poll() is None


def test_what_does_not_go_together_is_refused_before_anything_is_sent(home):
    cluster = home.cluster
    home.plan("linear", 2)
    flags = ("--manifest", cluster.manifest, "--model-dir", cluster.model_dir)
    stage = (*flags, "--stage-idx", "0", "--dev")
    result = cluster.worker(*stage)
    expect((result.returncode, result.stderr), 2, "pipeline-orch masks make", "--masks FILE")
    result = cluster.orch_command(
        "masks", "make", *flags, "--tokens", "2", "-o", cluster.directory / "masks"
    )
    expect((result.returncode, result.stderr), 2, "never written over others")
    raw = (cluster.directory / "masks").read_bytes()
    (cluster.directory / "masks").write_bytes(
        re.sub(rb'"weight_hashes":\["..', b'"weight_hashes":["00', raw)
    )
    result = cluster.worker(*stage, "--masks", cluster.directory / "masks")
    expect((result.returncode, result.stderr), 2, "masks for other weights")
    cluster.plan(1)
    result = cluster.worker(*stage, "--masks", cluster.directory / "masks")
    expect((result.returncode, result.stderr), 2, "--masks", "plan it with --linear")
    result = cluster.worker("linear", *flags, "--dev")
    expect((result.returncode, result.stderr), 2, "no part of kind linear")
