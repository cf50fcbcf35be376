"""Workers that a server starts: how far they are while they load, and what keeps them from it."""

import json
import os
import shutil
import signal
import struct

import httpx

WEIGHTS = "model.safetensors"


def widen(path, num_bytes):
    """Add a tensor that no layer needs: it is read and hashed with the others."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, end = json.loads(raw[8 : 8 + length]), len(raw) - 8 - length
    header["unused"] = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [end, end + num_bytes]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    os.truncate(path, path.stat().st_size + num_bytes)


def test_stages_that_load_and_those_that_cannot_are_told_of_and_served_once_they_can(cluster):
    weights = cluster.model_dir / WEIGHTS
    widen(weights, 64 << 20)
    cluster.plan(2)
    server = cluster.begin_to_serve("--supervise", "--connect-timeout", "2", "--log-format", "json")
    expect_progress(server, weights.stat().st_size)
    expected = server.text("Hello", 8)
    kept = shutil.copy(cluster.manifest, cluster.directory / "kept")
    cluster.edit(lambda raw: raw.update(model_version="2"))
    victim = server.workers()[1]
    server.begin()
    os.kill(victim, signal.SIGKILL)
    expect_problem(server)
    shutil.copy(kept, cluster.manifest)
    server.wait_for(server.is_ready)
    assert server.text("Hello", 8) == expected


def expect_progress(server, num_bytes):
    """Whatever /health says each stage has read, of whenever it is asked, is of all its weights.

    It may be asked before they begin to read and not again until they have read everything.
    """
    told = {0: [], 1: []}

    def is_ready():
        health = server.get("/health")
        for each in health.json()["awaited"]:
            if "loaded_bytes" in each:
                assert each["total_bytes"] == num_bytes
                told[each["stage"]].append(each["loaded_bytes"])
        return health.status_code == 200

    server.wait_for(is_ready)
    for amounts in told.values():
        assert amounts == sorted(amounts)
        assert all(0 <= amount <= num_bytes for amount in amounts)


def expect_problem(server):
    """Clients are told that stage 1 cannot start, the log once why: no attempt says it again."""
    awaited = server.wait_for(lambda: what_is_wrong(server.get("/health").json()))
    assert awaited["stage"] == 1
    assert "cannot start" in awaited["problem"]
    refused = httpx.post(f"{server.url}/v1/completions", json=server.wish("Hello", 8), timeout=300)
    assert refused.status_code == 503
    assert awaited["problem"] in refused.json()["error"]["message"]
    told = [line.get("error") or "" for line in server.events("worker_died")]
    assert ["another manifest" in error for error in told] == [False, True]
    assert "handshake_refused" not in server.log()
    assert server.events("pipeline_away")


def what_is_wrong(health):
    """The stage that cannot start, once requests are refused for it."""
    awaited = [each for each in health["awaited"] if "problem" in each]
    return awaited[0] if health["status"] == "away" and awaited else None
