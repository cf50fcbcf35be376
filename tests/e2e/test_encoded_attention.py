"""Real processes: a home stage, and a worker that holds its keys and values encoded."""

import json
import re
import signal
import sys
import time

import pytest

from pipeline.agreement.identity import create_identity
from tests.e2e.conftest import BIN, Ports, end
from tests.e2e.texts_under_way import completing, undisturbed
from transport.address import parse_endpoint

LENGTH = ("--max-tokens", "40", "--ignore-eos")
# Answers right for a while, and then as its first argument says.
LIAR = """
import sys
import numpy as np
from pipeline.cli import part_worker
from pipeline.remote_parts.wire import to_array, to_tensor
from pipeline.scx.attention_worker import AttentionWorker

how, right, num_asked, before = sys.argv.pop(1), AttentionWorker.answer, 0, {}

def answer(self, header, tensors):
    global num_asked
    num_asked += 1
    found, answered = right(self, header, tensors)
    arrays = [to_array(each).copy() for each in answered]
    shapes = tuple(each.shape for each in arrays)
    old = before.setdefault(shapes, arrays)
    if num_asked > 60 and arrays:
        if how == "old":
            arrays = old
        elif how == "long":
            arrays[0] *= 100
        elif how == "short":
            arrays = [each[:, :-1] for each in arrays]
        elif how == "no numbers":
            arrays[0][:] = np.nan
    return found, tuple(map(to_tensor, arrays))

AttentionWorker.answer = answer
part_worker.main()
"""


class AttentionWorker:
    """`stage-worker attention` of a cluster's manifest, started anew whenever it is wanted."""

    def __init__(self, cluster):
        self._ports = Ports(1)
        self.address = f"127.0.0.1:{self._ports.base}"
        self._cluster = cluster
        self.log = cluster.directory / "attention.log"
        self.process = None
        part = {"type": "tcp", "addr": self.address}
        cluster.plan(1)
        cluster.edit(lambda raw: raw.update(part={"kind": "attention", "address": part}))

    def start(self, *extra, lies=None, trust=("--dev",)):
        command = (
            [BIN / "stage-worker", "attention"] if lies is None
            else [sys.executable, "-c", LIAR, lies]
        )  # fmt: skip
        with self.log.open("ab") as file:
            self.process = self._cluster.popen(
                [*command, "--manifest", self._cluster.manifest, *trust, *extra],
                stdout=file, stderr=file, env=self._cluster.environment,
            )  # fmt: skip

    def wait_for_log(self, text, count=1):
        for _ in range(600):
            if self.log.read_text().count(text) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            end(self.process)
        self._ports.release()


@pytest.fixture
def attention(cluster):
    worker = AttentionWorker(cluster)
    yield worker
    worker.stop()


def answer(cluster, *extra):
    out = cluster.directory / "latency.json"
    result = cluster.orch(
        "Hello there", *LENGTH, "--latency-out", out, "--supervise",
        "--model-dir", cluster.model_dir, *extra,
    )  # fmt: skip
    return result, json.loads(out.read_text())["token_ids"] if result.returncode == 0 else None


@pytest.mark.slow
def test_the_text_is_that_of_an_ordinary_stage(cluster, attention):
    attention.start()
    result, found = answer(cluster)
    assert result.returncode == 0, result.stderr
    assert "mode scx: Keys and values lie encoded" in result.stderr
    assert "event=session_ended reason=closed" in attention.log.read_text()
    cluster.plan(1)
    assert answer(cluster)[1] == found


def test_a_worker_lost_in_the_middle_costs_no_text(cluster, attention):
    """Its rows are encoded anew from the tokens, with other keys."""
    attention.start()
    cluster.start_worker(0)
    server = cluster.serve("--context", "512")
    expected = undisturbed(server)
    with completing(server, attention.process.pid) as texts:
        attention.process.send_signal(signal.SIGKILL)
        attention.process.wait()
        attention.start()
    assert texts == expected
    assert server.pipeline()["engine"]["num_failovers"] >= 1
    assert re.search(r"the attention worker at \S+ is lost", server.log())


@pytest.mark.slow
@pytest.mark.parametrize("lies", ["old", "long", "short", "no numbers"])
def test_a_lie_is_one_error_and_the_text_goes_on_with_an_honest_worker(cluster, attention, lies):
    attention.start(lies=lies)
    flags = ("Hello there", *LENGTH, "--supervise", "--model-dir", cluster.model_dir)
    result = cluster.orch(*flags)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "answer about encoded rows" in errors[0] or "answer about an encoded cache" in errors[0]
    begun = result.stdout.rstrip("\n\ufffd")  # half a character at its end is none
    attention.process.kill()
    attention.process.wait()
    attention.start()
    whole = cluster.orch(*flags)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.startswith(begun)


@pytest.mark.slow
def test_a_worker_without_room_says_so_once(cluster, attention):
    attention.start("--kv-memory", "0.001")
    result = cluster.orch_command(
        "serve", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--port", "0",
        "--dev", "--max-batch", "8", "--context", "1024", "--supervise",
    )  # fmt: skip
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "the attention worker at" in errors[0]
    assert "are left of its memory; ask for less with --context or --max-batch" in errors[0]


@pytest.mark.slow
def test_a_worker_that_is_not_up_is_named(cluster, attention):
    result, _ = answer(cluster, "--connect-timeout", "4")
    assert result.returncode == 1
    assert f"the attention worker at tcp:{attention.address} is not up" in result.stderr


@pytest.mark.slow
def test_a_manifest_without_a_part_has_no_worker(cluster, attention):
    cluster.plan(1)
    result = cluster.worker("attention", "--manifest", cluster.manifest, "--dev")
    assert result.returncode == 2
    assert "has no part of kind attention; plan it with --attention" in result.stderr


@pytest.mark.slow
def test_without_dev_everybody_is_known_by_his_key(cluster, attention):
    keys = {name: cluster.directory / name for name in ("orch", "stage", "part", "other")}
    known = {name: create_identity(path) for name, path in keys.items()}
    where = parse_endpoint(attention.address)
    cluster.plan(
        1, orchestrator_keys=(known["orch"],), stage_keys=(known["stage"],),
        part=("attention", where, known["part"]),
    )  # fmt: skip
    manifest = ("--manifest", cluster.manifest)
    refused = cluster.worker("attention", *manifest, "--identity", keys["other"])
    assert refused.returncode == 2
    assert f"another part than this machine, whose key is {known['other']}" in refused.stderr
    assert "`pipeline-orch plan --part-key` names it" in refused.stderr
    attention.start(trust=("--identity", keys["part"]))
    cluster.workers[0] = cluster.popen(
        [BIN / "stage-worker", *manifest, "--stage-idx", "0", "--identity", keys["stage"],
         "--model-dir", cluster.model_dir, "--quiet"],
        env=cluster.environment,
    )  # fmt: skip
    found = cluster.orch_command(
        *manifest, "--tokenizer", cluster.model_dir / "tokenizer.json", "--identity", keys["orch"],
        "--text", "Hello there", *LENGTH,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    cluster.plan(1)
    expected = cluster.orch("Hello there", *LENGTH, "--supervise", "--model-dir", cluster.model_dir)
    assert found.stdout == expected.stdout
