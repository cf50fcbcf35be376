"""Real processes whose orchestrator holds embedding, norm and head."""

import json
import shutil

import pytest

from pipeline.cli import pipeline_orch, stage_worker
from tests.e2e.conftest import expect
from tests.e2e.texts_under_way import expect_the_same_whoever_dies, undisturbed


@pytest.fixture(scope="module")
def expected(shared_cluster):
    """What two ordinary stages say to a prompt, greedily and drawn."""
    cluster = shared_cluster
    cluster.plan(2)
    return [answer(cluster, 2, *flags) for flags in FLAGS]


FLAGS = [(), ("--temperature", "0.9", "--seed", "5", "--repetition-penalty", "1.2")]


def answer(cluster, stages, *flags, worker_flags=()):
    """Over so many workers by hand, or where no number is given over supervised ones."""
    out = cluster.directory / "latency.json"
    flags = ("--max-tokens", "40", "--ignore-eos", "--latency-out", out, *flags, *worker_flags)
    if stages is None:
        supervise = ("--supervise", "--model-dir", cluster.model_dir)
        result = cluster.orch("Hello there", *flags, *supervise)
    else:
        result = cluster.orch_over(stages, *flags, flags=worker_flags)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())["token_ids"], result.stdout


# Two stages are those with shards of their own.
@pytest.mark.parametrize(("stages", "by_hand"), [(1, False), (3, True)])
def test_texts_are_those_of_ordinary_stages(cluster, expected, stages, by_hand):
    cluster.plan(stages, split="client")
    num = stages if by_hand else None
    found = [answer(cluster, num, *flags, worker_flags=("--threads", "2")) for flags in FLAGS]
    assert found == expected


def test_shards_and_a_clients_part_are_all_that_each_side_needs(cluster, expected):
    cluster.plan(2, split="client")
    for layout in ([], ["--client-file"]):
        out = cluster.directory / f"shards{len(layout)}"
        cut = cluster.orch_command(
            "shard", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir,
            "--out", out, *layout,
        )  # fmt: skip
        assert cut.returncode == 0, cut.stderr
        for idx in range(2):
            cluster.start_worker(
                idx, "--once", "--model-dir", out / f"stage{idx}", manifest=out / "manifest.json"
            )
        part = out / "client"
        latency = cluster.directory / "latency.json"
        result = cluster.orch_command(
            "--manifest", out / "manifest.json", "--tokenizer", part / "tokenizer.json",
            "--text", "Hello there", "--max-tokens", "40", "--ignore-eos", "--dev",
            "--latency-out", latency,
            *(["--client-part", part / "client_weights.safetensors"] if layout else []),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("mode client: Stages are never sent") == 1
        assert (json.loads(latency.read_text())["token_ids"], result.stdout) == expected[0]
        for idx in range(2):
            assert cluster.workers[idx].wait(300) == 0


@pytest.mark.slow  # tests/pipeline/orchestrator/test_client_frames.py mends losses in one process
def test_a_stage_killed_in_the_middle_costs_no_text(cluster):
    """As with ordinary stages, whose texts are the same."""
    cluster.plan(3, split="client")
    for idx in range(3):
        cluster.start_worker(idx)
    server = cluster.serve("--context", "512")
    expect_the_same_whoever_dies(server, undisturbed(server), by_hand=cluster)


@pytest.fixture
def orch(command, cluster):
    cluster.plan(1, split="client")

    def run(*extra):
        return command(pipeline_orch, *cluster.arguments("Hi", *extra))

    return run


def test_a_clients_part_that_will_not_do(orch, cluster, tmp_path):
    part = tmp_path / "part"
    expect(orch("--client-part", part), 2, "--client-part", "config.json", str(part))
    shutil.copytree(cluster.model_dir, part)
    weights = part / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    expect(orch("--client-part", part), 2, "client's part", "SHA-256", "expected")
    weights.unlink()
    expect(orch("--client-part", part), 2, "client's part", "no model.safetensors")
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    expect(orch("--client-part", part), 2, "config.json", "the manifest pins")
    expect(orch("--dtype", "int12"), 2, "--dtype int12")
    expect(orch("--kv-memory", "1"), 2, "--kv-memory", "--supervise")


def test_a_part_for_an_orchestrator_that_holds_none(orch, cluster):
    cluster.plan(1)
    expect(orch("--client-part", cluster.model_dir), 2, "--client-part", "split is stages")
    expect(orch("--threads", "2"), 2, "--threads", "--supervise")


def test_a_shard_of_another_split(command, orch, cluster, tmp_path):
    shards = {}
    for split in ("stages", "client"):
        cluster.plan(2, split=split)
        out = tmp_path / split
        cut = cluster.orch_command(
            "shard", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--out", out
        )
        assert cut.returncode == 0, cut.stderr
        shards[split] = out
    for split, other in (("stages", "client"), ("client", "stages")):
        for unpinned in (False, True):
            manifest = json.loads((shards[split] / "manifest.json").read_text())
            for stage in manifest["stages"] if unpinned else ():
                stage["weight_hashes"], stage["require_weight_hashes"] = [], False
            path = tmp_path / "m.json"
            path.write_text(json.dumps(manifest))
            if unpinned and split == "client":
                continue  # whole weights hold its layers as well
            result = command(
                stage_worker, "--manifest", path, "--stage-idx", 0, "--dev",
                "--model-dir", shards[other] / "stage0",
            )  # fmt: skip
            expect(result, 2, "is missing" if unpinned else "SHA-256")
    result = command(
        pipeline_orch, "plan", "--model-dir", cluster.model_dir, "--stages", 1, "--split", "both"
    )
    expect(result, 2, "--split both", "stages, client")
