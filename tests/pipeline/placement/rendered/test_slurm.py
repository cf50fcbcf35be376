"""A batch script: a shell takes it, each stage is a step of its own node, and is started again."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.agreement.manifest import build_manifest
from pipeline.cli import stage_worker
from pipeline.errors import InputError, ManifestError
from pipeline.placement.rendered.slurm import SlurmJob, render

# Stands for Slurm's: notes its arguments, and ends as the file beside it says for this time.
SRUN = """\
#!/bin/bash
for word in "$@"; do
  case $word in --stage-idx=*) idx=${word#*=} ;; esac
done
printf '%q ' "$@" >>"$LOGS/stage$idx"
echo >>"$LOGS/stage$idx"
times=$(wc -l <"$LOGS/stage$idx")
exit "$(sed -n "${times}p" "$LOGS/codes$idx")"
"""


@pytest.fixture
def job():
    def make(**changes):
        given = {"manifest_file": Path("/shared/m.json"), "parts": Path("/shared/parts"),
                 "has_part_directories": True, "keys": Path("/var/lib/veilpipe")}  # fmt: skip
        return SlurmJob(**given | changes)

    return make


@pytest.fixture
def run(tmp_path):
    """Runs a script where steps end with these codes, one after the other: its code and calls."""

    def start(script, codes):
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("sleep", "#!/bin/sh\n")):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        for idx, each in enumerate(codes):
            (tmp_path / f"codes{idx}").write_text("".join(f"{code}\n" for code in each))
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "LOGS": str(tmp_path)}
        found = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert found.stderr == ""
        calls = [(tmp_path / f"stage{idx}").read_text().splitlines() for idx in range(len(codes))]
        return found.returncode, [[shlex.split(line) for line in each] for each in calls]

    return start


def directives(script):
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)


def test_each_stage_is_a_step_on_the_node_of_its_key(run, job, keyed, needs):
    code, calls = run(render(keyed, job(), needs), [[0], [0], [0]])
    assert code == 0
    known = {name for each in get_command(stage_worker.app).params for name in each.opts}
    for idx, (words,) in enumerate(calls):
        at = words.index("stage-worker")
        step, worker = words[:at], words[at + 1 :]
        assert f"--nodelist=node{idx}" in step
        assert f"--mem={needs[idx].limit_mib}M" in step
        given = dict(each.partition("=")[::2] for each in worker)
        assert given.keys() <= known
        assert given["--stage-idx"] == str(idx)
        assert given["--model-dir"] == f"/shared/parts/stage{idx}"
        assert given["--identity"] == f"/var/lib/veilpipe/stage{idx}/machine.pem"
        assert "--dev" not in given


def test_a_job_asks_for_a_node_for_each_stage_and_enough_of_each(job, keyed, needs):
    found = directives(render(keyed, job(partition="cpu", time="1-00:00:00"), needs))
    assert found["nodes"] == "3"
    assert found["nodelist"] == "node0,node1,node2"
    assert found["mem"] == f"{max(each.limit_mib for each in needs)}M"
    assert found["cpus-per-task"] == "2"
    assert (found["partition"], found["time"]) == ("cpu", "1-00:00:00")
    assert "no-kill" in found  # a node that is lost ends no other stage
    assert "partition" not in directives(render(keyed, job(), needs))


def test_a_stage_that_is_lost_is_started_again_and_no_other(run, job, keyed, needs):
    code, calls = run(render(keyed, job(), needs), [[0], [137, 1, 0], [143]])
    assert [len(each) for each in calls] == [1, 3, 1]
    assert len({tuple(each) for each in calls[1]}) == 1
    assert code == 143  # it was told to stop


def test_a_stage_that_cannot_be_started_as_it_is_is_not_tried_for_ever(run, job, keyed, needs):
    code, calls = run(render(keyed, job(), needs), [[2], [0], [0]])
    assert code == 2
    assert [len(each) for each in calls] == [1, 1, 1]


def test_no_word_becomes_another_of_the_shell(run, job, keyed, needs, tmp_path):
    odd = tmp_path / "a 'b' $(touch x); \"c\" `d`"
    found = job(manifest_file=odd / "m.json", parts=odd, keys=odd, worker=f"{odd}/stage-worker",
                has_part_directories=False)  # fmt: skip
    _, calls = run(render(keyed, found, needs), [[0], [0], [0]])
    for (words,) in calls:
        assert f"{odd}/stage-worker" in words
        assert f"--manifest={odd}/m.json" in words
        assert f"--model-dir={odd}" in words
    assert not Path("x").exists()


def test_nodes_may_be_called_otherwise_than_hosts(job, keyed, needs):
    found = render(keyed, job(nodes=("c1", "c2.rack-3", "c3")), needs)
    assert directives(found)["nodelist"] == "c1,c2.rack-3,c3"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": ("a", "b")}, "--nodes names 2 nodes for 3 stages"),
        ({"nodes": ("a", "b", "a")}, "node a would run 2 stages"),
        ({"nodes": ("a", "b", "c[1-3]")}, "--nodes 'c[1-3]'"),
        ({"nodes": ("a", "b", "")}, "--nodes ''"),
        ({"name": "a b"}, "--name 'a b'"),
        ({"name": "x\n#SBATCH --wrap=id"}, "--name"),
        ({"partition": "p;id"}, "--partition 'p;id'"),
        ({"worker": ""}, "--worker is empty"),
        ({"time": "soon"}, "--time 'soon'"),
        ({"time": "1:00\n"}, "--time"),
    ],
)
def test_what_slurm_would_not_take_is_one_line(job, keyed, needs, changes, words):
    with pytest.raises(InputError) as caught:
        render(keyed, job(**changes), needs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_enclaves_and_cores_without_addresses_are_not_for_slurm(job, fields, attested, needs):
    with pytest.raises(InputError, match=r"stage 0 runs in an enclave; scripts/run_nitro\.sh"):
        render(attested, job(), needs)
    for stage in fields["stages"]:
        stage |= {"expected_measurements": {}, "machine_keys": ["a" * 64]}
        del stage["endpoint"]
    with pytest.raises(ManifestError, match="stage 0 has no endpoint"):
        render(build_manifest(fields, "test"), job(), needs)


def test_an_address_that_is_no_nodes_name_asks_for_the_nodes(job, fields, needs):
    fields["stages"][1]["endpoint"]["control"]["addr"] = "[::1]:9010"
    with pytest.raises(InputError, match="'::1' is no name of a node; --nodes"):
        render(build_manifest(fields, "test"), job(), needs)
