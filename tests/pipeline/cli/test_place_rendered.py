"""`pipeline-orch place`: what it writes, where it finds the model, and what it says instead."""

import sys

import pytest
import yaml

from pipeline.agreement.manifest import dump_manifest, load_manifest
from pipeline.cli import pipeline_orch
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model

KEYS = tuple(f"{idx:064x}" for idx in range(2))


@pytest.fixture
def place(monkeypatch, capfd):
    """Runs the command: exit code, and the lines that it says."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", "place", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        out, err = capfd.readouterr()
        assert out == ""
        return caught.value.code, err.splitlines()

    return run


@pytest.fixture
def planned(tiny_model):
    options = PlanOptions(2, ("n0", "n1"), stage_keys=KEYS, orchestrator_keys=("f" * 64,))
    return plan(tiny_model, options)


@pytest.fixture
def manifest(planned, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(planned))
    return path


@pytest.fixture
def parts(planned, tiny_model, tmp_path):
    cut_model(planned, tiny_model, tmp_path / "parts")
    return tmp_path / "parts"


def test_parts_beside_the_manifest_are_the_model(place, parts, tmp_path):
    out = tmp_path / "out"
    code, lines = place("k8s", "--manifest", parts / "manifest.json", "--image", "r/v:1", "-o", out)
    assert (code, len(lines)) == (0, 5)
    assert load_manifest(out / "orchestrator/manifest.json").core_hash() == (
        load_manifest(parts / "manifest.json").core_hash()
    )
    (lws,) = yaml.safe_load_all((out / "workloads.yaml").read_text())
    assert lws["kind"] == "LeaderWorkerSet"
    volumes = lws["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["volumes"]
    claims = [each["persistentVolumeClaim"] for each in volumes if "persistentVolumeClaim" in each]
    assert claims == [{"claimName": "veilpipe-parts", "readOnly": True}]


def test_more_texts_and_longer_ones_ask_for_more(place, manifest, tiny_model, tmp_path):
    def memory(name, *flags):
        words = ["--manifest", manifest, "--model-dir", tiny_model, "--image", "r/v:1"]
        code, lines = place("k8s", *words, "-o", tmp_path / name, "--kind", "statefulset", *flags)
        assert code == 0, lines
        sets = yaml.safe_load_all((tmp_path / name / "workloads.yaml").read_text())
        containers = [each["spec"]["template"]["spec"]["containers"][0] for each in sets]
        return [int(c["resources"]["requests"]["memory"].removesuffix("Mi")) for c in containers]

    few, many = memory("few", "--max-batch", "1"), memory("many", "--max-batch", "64")
    long = memory("long", "--max-batch", "64", "--context", "4096")
    short = memory("short", "--max-batch", "64", "--context", "128")
    assert all(a < b for a, b in zip(few, many, strict=True))
    assert all(a < b for a, b in zip(short, long, strict=True))


def test_slurm_is_given_where_the_parts_are_on_its_nodes(place, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of here are made whole, since nodes are elsewhere
    manifest = parts.relative_to(tmp_path) / "manifest.json"
    assert place("slurm", "--manifest", manifest, "-o", "a.sbatch")[0] == 0
    text = (tmp_path / "a.sbatch").read_text()
    assert f"--manifest={parts}/manifest.json" in text
    assert f"--model-dir={parts}/stage1" in text
    assert place("slurm", "--manifest", manifest, "-o", "a.sbatch", "--parts", "/nodes/parts") == (
        0, ["pipeline-orch: wrote a.sbatch"]
    )  # fmt: skip
    assert "--model-dir=/nodes/parts/stage1" in (tmp_path / "a.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("k8s", "--image", "r/v:1", "-o", "DIR"), "missing --model-dir"),
        (("k8s", "--model-dir", "MODEL", "-o", "DIR"), "Missing option '--image'"),
        (("k8s", "--model-dir", "MODEL", "--image", "", "-o", "DIR"), "--image is empty"),
        (("k8s", "--model-dir", "MODEL", "--image", "i", "-o", "HERE"), "not an empty directory"),
        (("k8s", "--model-dir", "MODEL", "--image", "i"), "Missing option '--output'"),
        (("k8s", "--model-dir", "MODEL", "--image", "i", "-o", "DIR", "--kind", "pod"),
         "--kind pod: use leaderworkerset, statefulset"),
        (("k8s", "--model-dir", "MODEL", "--image", "i", "-o", "DIR", "--context", "5000"),
         "--context 5000: the manifest has 4096 at most"),
        (("k8s", "--model-dir", "MODEL", "--image", "i", "-o", "DIR", "--name", "A"), "--name 'A'"),
        (("slurm", "--model-dir", "MODEL", "-o", "HERE"), "it is a directory; name a file"),
        (("slurm", "--model-dir", "/nowhere", "-o", "FILE"), "no config.json in /nowhere"),
        (("slurm", "--model-dir", "MODEL", "-o", "FILE", "--nodes", "a"), "names 1 nodes for 2"),
        (("nomad",), "No such command 'nomad'"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_one_line_and_nothing_is_written(
    place, manifest, tiny_model, tmp_path, words, expected
):
    stands = {
        "MODEL": tiny_model,
        "DIR": tmp_path / "out",
        "FILE": tmp_path / "f",
        "HERE": tmp_path,
    }
    given = [stands.get(word, word) for word in words]
    if words[0] != "nomad":
        given += ["--manifest", manifest]
    code, lines = place(*given)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("pipeline-orch: error: ")
    assert expected in lines[0]
    assert list(tmp_path.iterdir()) == [manifest]


@pytest.mark.parametrize("command", ["k8s", "slurm"])
def test_a_manifest_that_is_no_plan_says_so_before_its_model_is_looked_at(
    place, planned, tmp_path, command
):
    (tmp_path / "config.json").write_text("{}")
    bare = planned.model_copy(update={"config_hash": None})
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(bare))
    image = ["--image", "i"] if command == "k8s" else []
    code, lines = place(command, "--manifest", path, "--model-dir", tmp_path, *image,
                        "-o", tmp_path / "out")  # fmt: skip
    assert code == 2
    assert "is no plan" in lines[0]
