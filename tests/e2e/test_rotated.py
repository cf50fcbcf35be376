"""Real processes on shards with a secret rotation in them."""

import json

import pytest

from pipeline.cli import pipeline_orch, stage_worker
from tests.e2e.conftest import expect
from tests.e2e.texts_under_way import REQUESTS, expect_the_same_whoever_dies, undisturbed


def shard(cluster, out, *extra):
    cut = cluster.orch_command(
        "shard", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--out", out,
        *extra,
    )  # fmt: skip
    assert cut.returncode == 0, cut.stderr
    return out


@pytest.fixture
def shards(cluster):
    """Rotated by one secret, by another, and plain, of one plan."""
    cluster.plan(2, split="client")
    made = {}
    for name in ("rotated", "other", "plain"):
        secret = cluster.directory / f"{name}.secret"
        flags = [] if name == "plain" else ["--rotate-secret", secret]
        made[name] = shard(cluster, cluster.directory / name, *flags)
    return made


@pytest.mark.slow
def test_texts_are_those_of_plain_stages_and_a_killed_stage_costs_none(cluster):
    cluster.plan(3)
    server = cluster.serve("--context", "512", "--supervise")
    expected = list(undisturbed(server))
    server.stop()
    cluster.plan(3, split="client")
    secret = cluster.directory / "secret"
    cluster.model_dir = shard(cluster, cluster.directory / "out", "--rotate-secret", secret)
    cluster.manifest = cluster.model_dir / "manifest.json"
    server = cluster.serve("--context", "512", "--supervise")
    assert [server.text(max_tokens=250, **each) for each in REQUESTS] == expected
    expect_the_same_whoever_dies(server, expected)


@pytest.mark.parametrize(
    ("manifest", "part", "problem"),
    [
        ("rotated", "other", "rotated by another secret than the manifest's"),
        ("rotated", "plain", "holds plain weights, the manifest is of weights rotated"),
        ("plain", "rotated", "holds weights rotated by a secret, the manifest is of plain ones"),
    ],
)
@pytest.mark.parametrize("is_pinned", [True, False])
def test_parts_of_another_secret_or_none_are_refused_before_anything_is_sent(
    command, cluster, shards, manifest, part, problem, is_pinned
):
    raw = json.loads((shards[manifest] / "manifest.json").read_text())
    if not is_pinned:  # then the weights' own word for it is all there is
        del raw["config_hash"]
        for stage in raw["stages"]:
            stage["weight_hashes"], stage["require_weight_hashes"] = [], False
    path = cluster.directory / "m.json"
    path.write_text(json.dumps(raw))
    worker = command(
        stage_worker, "--manifest", path, "--stage-idx", 0, "--dev",
        "--model-dir", shards[part] / "stage0",
    )  # fmt: skip
    expect(worker, 2, problem)
    orchestrator = command(
        pipeline_orch, "--manifest", path, "--text", "Hi", "--dev",
        "--tokenizer", shards[manifest] / "client" / "tokenizer.json",
        "--client-part", shards[part] / "client",
    )  # fmt: skip
    expect(orchestrator, 2, problem)


def test_a_stage_of_rotated_shards_speaks_to_nobody_with_the_plain_manifest(cluster, shards):
    out = shards["rotated"]
    cluster.start_worker(0, "--model-dir", out / "stage0", manifest=out / "manifest.json")
    cluster.wait_for_log(0, "listening")
    plain = shards["plain"]
    result = cluster.orch_command(
        "--manifest", plain / "manifest.json", "--text", "Hi", "--dev", "--connect-timeout", "3",
        "--tokenizer", plain / "client" / "tokenizer.json",
    )  # fmt: skip
    assert result.returncode != 0
    assert "error:" in result.stderr


def test_a_secret_that_is_none(command, cluster, tmp_path):
    cluster.plan(1, split="client")
    arguments = ["--manifest", cluster.manifest, "--model-dir", cluster.model_dir]

    def run(secret, *extra):
        out = tmp_path / "out"
        result = command(
            pipeline_orch, "shard", *arguments, "--out", out, "--rotate-secret", secret, *extra
        )
        assert not out.exists()
        return result

    secret = tmp_path / "secret"
    secret.write_bytes(bytes(31))
    secret.chmod(0o600)
    expect(run(secret), 2, "has 31 bytes; it needs at least 32")
    secret.write_bytes(bytes(32))
    secret.chmod(0o644)
    code, line = run(secret)
    assert code != 0
    assert "open to other users" in line
    expect(run(tmp_path / "none" / "secret"), 2, "--rotate-secret", "No such file")
    expect(run(tmp_path / "missing", "--stage", 0), 2, "--rotate-secret", "No such file")
    cluster.plan(1)
    secret.chmod(0o600)
    expect(run(secret), 2, "split is client")
