"""Who runs the stages, and what a cluster is told of them."""

import itertools
import json
import sys

import pytest

from pipeline.agreement.manifest import Manifest, build_manifest, dump_manifest, load_manifest
from pipeline.cli import pipeline_orch
from pipeline.cli.compute_options import WorkerOptions
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.placing import placed_early, placing
from pipeline.cli.ray_flags import OWN_NETWORKS, RayOptions
from pipeline.errors import InputError
from pipeline.placement import worker_supervisor
from pipeline.placement.worker_supervisor import Supervisor
from pipeline.planning.plan import PlanOptions, plan


@pytest.fixture(scope="module")
def manifest(tiny_model):
    return plan(tiny_model, PlanOptions(2))


@pytest.fixture
def refused(manifest, tiny_model, tmp_path, monkeypatch, capfd):
    """Runs `serve` with flags that cannot be meant: the exit code, and the one line of why."""
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(manifest))
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(tmp_path / "dev"))

    def run(*flags, command=("serve", "--port", "0")):
        words = (*command, "--manifest", path, "--model-dir", tiny_model, "--dev", *flags)
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        (line,) = [each for each in capfd.readouterr().err.splitlines() if "error:" in each]
        return caught.value.code, line

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--place", "slurm"), "--place slurm: "),
        (("--place", "ray", "--supervise"), "give one"),
        (("--ray-cpus", "2"), "--ray-cpus is of a Ray cluster; give --place ray too"),
        (("--place", "ray", "--ray-cpus", "0"), "--ray-cpus 0: "),
        (("--place", "ray", "--ray-memory", "nan"), "--ray-memory nan: "),
        (("--place", "ray", "--ray-strategy", "spread"), "--ray-strategy spread: "),
        (("--place", "ray", "--ray-resource", "nitro"), "--ray-resource nitro: expected NAME=N"),
        (("--place", "ray", "--ray-resource", "nitro=0"), "--ray-resource nitro=0: expected"),
        (("--place", "ray", "--ray-resource", "CPU=2"), "--ray-resource CPU=2: expected"),
        (("--place", "ray", "--ray-network", "here"), "--ray-network here: "),
        (("--place", "ray", "--kv-store", "redis://:secret@h"), "--kv-store is not for stages"),
        (("--place", "ray", "--replan"), "--replan is for machines that this home has joined"),
        (("--place", "ray", "--data-out-port", "5"), "none arrive at an address here"),
        (("--replicas", "2"), "--replicas has the workers of each pipeline started; give"),
        (("--replicas", "0", "--supervise"), "--replicas 0: "),
        (("--replicas", "65", "--supervise"), "--replicas 65: "),
        (("--replicas", "2", "--supervise", "--data-out-port", "5"), "none arrive at an address"),
        (("--replicas", "2", "--supervise", "--cpus", "0/1/2"), "or 2 or 4 between slashes"),
        (("--replicas", "2", "--supervise", "--replan"), "--replan is for machines that this"),
    ],
)
def test_what_cannot_be_placed_so_is_one_line(refused, flags, said):
    code, line = refused(*flags)
    assert code == 2
    assert said in line
    assert "secret" not in line


def test_a_manifest_is_not_overwritten_by_where_its_stages_are(refused, tmp_path):
    code, line = refused("--output", tmp_path / "manifest.json", command=("place", "ray"))
    assert code == 2
    assert "--output is the manifest itself" in line


def flags(**given):
    return PipelineFlags(workers=WorkerOptions(threads=3), development={"dev": True}, **given)


def test_a_cluster_is_told_what_workers_need_and_no_address(manifest, tiny_model, tmp_path):
    options = RayOptions(ray_memory=1.5, ray_resource=("nitro=1",), ray_strategy="STRICT_SPREAD")
    job = options.job(manifest, tiny_model, flags(ray=options))
    assert job.needs == {"CPU": 3.0, "memory": 1.5 * (1 << 30), "nitro": 1.0}
    assert (job.address, job.strategy) == ("auto", "STRICT_SPREAD")
    path = tmp_path / "core.json"
    path.write_text(job.core)
    core = load_manifest(path)
    assert core.core_hash() == manifest.core_hash()
    assert all(stage.endpoint is None for stage in core.stages)
    for words in job.arguments:
        given = dict(itertools.pairwise(words))
        assert given["--model-dir"] == str(tiny_model)
        assert given["--threads"] == "3"
        assert "--dev" in words
        assert [words[i + 1] for i, word in enumerate(words) if word == "--allow-dial"] == [
            *OWN_NETWORKS
        ]


def test_workers_of_several_pipelines_are_told_that_they_share_a_machine(manifest, tiny_model):
    job = RayOptions().job(manifest, tiny_model, flags(ray=RayOptions()), 3)
    for words in job.arguments:
        assert dict(itertools.pairwise(words))["--pipelines"] == "3"
    assert (
        "--pipelines"
        not in RayOptions().job(manifest, tiny_model, flags(ray=RayOptions())).arguments[0]
    )


def test_a_part_of_a_model_elsewhere_is_not_for_a_cluster(manifest, tiny_model):
    raw = manifest.model_dump(mode="json")
    raw["stages"] = [{**raw["stages"][0], "layer_end": 4}]
    raw["part"] = {"kind": "attention", "address": {"type": "tcp", "addr": "h:1"}}
    alone = build_manifest(raw, "test")
    options = RayOptions()
    with pytest.raises(InputError, match="the manifest's part"):
        options.job(alone, tiny_model, flags(ray=options))


async def test_stages_of_the_same_files_are_told_apart_from_others(manifest, tiny_model, nursery):
    raw = manifest.model_dump(mode="json")
    first, second = raw["stages"][0], raw["stages"][1]
    assert first["weight_hashes"] == second["weight_hashes"]
    given = flags(supervise=True, ray={})

    def alike(raw):
        found = Manifest.model_validate_json(json.dumps(raw))
        placement = placing(found, tiny_model, tiny_model, given)(nursery)
        return [placement._alike(each.stage_idx) for each in found.stages]

    assert alike(raw) == [[1], [0]]
    second["weight_hashes"] = ["0" * 64]
    assert alike(raw) == [[], []]
    nursery.cancel_scope.cancel()


async def test_workers_that_are_started_here_begin_before_anything_else(
    manifest, tiny_model, monkeypatch
):
    class Recording(Supervisor):
        async def start(self, stage_idx):
            started.append(stage_idx)

    started = []
    monkeypatch.setattr(worker_supervisor, "Supervisor", Recording)
    path = tiny_model / "manifest.json"
    async with placed_early(manifest, path, tiny_model, flags(ray={}, supervise=True)) as place:
        assert started == [0, 1]
        assert place(None) is place(None)
