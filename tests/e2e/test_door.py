"""A door served by `stage-worker door`, and what the client's command says of it."""

import json
import re
import socket
import subprocess
import time

import pytest

from pipeline.cli import door_server
from tests.e2e.conftest import BIN, end


@pytest.fixture(scope="module")
def shards(shared_cluster):
    """Directory of a client-split model of one stage."""
    cluster = shared_cluster
    cluster.plan(1, split="client")
    out = cluster.directory / "door_shards"
    cut = cluster.orch_command(
        "shard", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--out", out
    )
    assert cut.returncode == 0, cut.stderr
    return out


class DoorProcess:
    """`stage-worker door` on ports of its choice."""

    def __init__(self, cluster, shards, *flags):
        self._path = cluster.directory / f"door{time.monotonic_ns()}.log"
        with self._path.open("wb") as file:
            self.process = subprocess.Popen(
                [BIN / "stage-worker", "door", "--model-dir", shards / "stage0", *flags],
                stdout=file, stderr=file, env=cluster.environment,
            )  # fmt: skip

    def log(self):
        return self._path.read_text()

    def url(self, kind):
        deadline = time.monotonic() + 60
        while not (found := re.search(rf"event=listening.* {kind}=(\S+)", self.log())):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return f"{kind}://{found[1]}"


@pytest.fixture
def start_door(shared_cluster, shards):
    doors = []

    def start(*flags):
        doors.append(DoorProcess(shared_cluster, shards, *flags))
        return doors[-1]

    yield start
    for door in doors:
        if door.process.poll() is None:
            end(door.process)


def generate(cluster, shards, url, *flags):
    part, out = shards / "client", cluster.directory / "door_latency.json"
    result = cluster.orch_command(
        "--manifest", shards / "manifest.json", "--tokenizer", part / "tokenizer.json",
        "--text", "Hello there", "--max-tokens", "40", "--ignore-eos", "--dev",
        "--latency-out", out, "--door", url, *flags,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())["token_ids"]


def test_a_text_is_the_ordinary_pipelines_through_either_door(shared_cluster, shards, start_door):
    cluster = shared_cluster
    cluster.plan(1)
    out = cluster.directory / "latency.json"
    ordinary = cluster.orch_over(1, "--max-tokens", "40", "--ignore-eos", "--latency-out", out)
    assert ordinary.returncode == 0, ordinary.stderr
    expected = json.loads(out.read_text())["token_ids"]
    door = start_door(
        "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--dev", "--kv-store", "memory:",
        "--kv-ttl", "1h", "--kv-max-bytes", "1G",
    )  # fmt: skip
    for kind in ("grpc", "http"):
        assert generate(cluster, shards, door.url(kind)) == expected
    assert end(door.process) == 0
    assert "event=stopped" in door.log()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs --grpc"),
        (["--grpc", "0.0.0.0:0"], "open to other machines"),
        (["--grpc", "127.0.0.1:{taken}", "--dev"], "cannot listen on"),
        (["--http", "unix:/x"], "HOST:PORT"),
        (["--http", "127.0.0.1:0", "--tls-cert", "/none", "--tls-key", "/none"], "for TLS"),
        (["--http", "127.0.0.1:0", "--tls-cert", "/none"], "belong together"),
        (["--http", "127.0.0.1:0", "--dev", "--manifest", "/none"], "cannot read manifest"),
        (["--http", "127.0.0.1:0", "--dev", "--kv-store", "what:"], "a store of sessions is"),
        (["--http", "127.0.0.1:0", "--kv-ttl", "1h"], "give --kv-store"),
        (
            ["--http", "127.0.0.1:0", "--kv-store", "memory:", "--kv-max-bytes", "2Q"],
            "give a size",
        ),
        (["--http", "127.0.0.1:0", "--dev", "--context", "99999999"], "positions"),
    ],
)
def test_a_door_that_cannot_be_says_why_in_one_line(command, shards, flags, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [flag.format(taken=taken.getsockname()[1]) for flag in flags]
        code, line = command(door_server, "--model-dir", shards / "stage0", *words)
    assert code == 2
    assert message in line
