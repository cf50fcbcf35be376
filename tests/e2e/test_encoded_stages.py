"""Real processes: stages between two at home keep keys and values encoded."""

import json
import os
import signal

import pytest

from tests.e2e.texts_under_way import completing, undisturbed


def answer(cluster, *extra):
    out = cluster.directory / "latency.json"
    result = cluster.orch(
        "Hello there", "--max-tokens", "40", "--ignore-eos", "--latency-out", out, "--supervise",
        "--model-dir", cluster.model_dir, *extra,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result, json.loads(out.read_text())["token_ids"]


@pytest.mark.slow
def test_the_text_is_that_of_ordinary_stages(cluster):
    cluster.plan(3, home_layers=(1, 1))
    result, found = answer(cluster)
    assert "mode scx-paper: Outer layers stay at home" in result.stderr
    cluster.plan(2)
    assert answer(cluster)[1] == found


@pytest.mark.slow
def test_a_stage_lost_in_the_middle_costs_no_text(cluster):
    """Its keys and values are encoded anew, with keys that it is handed anew."""
    cluster.plan(3, home_layers=(1, 1))
    server = cluster.serve("--context", "512", "--supervise")
    expected = undisturbed(server)
    victim = server.workers()[1]
    with completing(server, victim) as texts:
        os.kill(victim, signal.SIGKILL)
        server.wait_for_log("event=failover_complete", 1)
    assert texts == expected


@pytest.mark.slow
def test_encoded_rows_are_not_kept_beyond_their_session(cluster):
    cluster.plan(3, home_layers=(1, 1))
    result = cluster.worker(
        "--manifest", cluster.manifest, "--stage-idx", "1", "--model-dir", cluster.model_dir,
        "--dev", "--kv-store", f"file:{cluster.directory}/store",
    )  # fmt: skip
    assert result.returncode == 2
    assert "--kv-store: keys and values that are encoded for one session" in result.stderr
