"""Stages placed by Slurm, on the cluster that scripts/test_slurm.sh starts on this machine."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.agreement.identity import create_identity
from pipeline.agreement.manifest import dump_manifest
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from tests.e2e.conftest import BIN, Ports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "VEILPIPE_SLURM" not in os.environ, reason="scripts/test_slurm.sh starts a cluster"
    ),
]

WORDS = ("--text", "Hello there", "--max-tokens", "24", "--ignore-eos", "--connect-timeout", "300")
NUM_STAGES = 3


def call(*words):
    """What a command says; it has to end well."""
    found = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def wait_until(is_so):
    deadline = time.monotonic() + 300
    while not (found := is_so()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


class Placed:
    """A job, and the home beside it."""

    def __init__(self, model, directory):
        self.directory = directory
        # Slurm's steps run as who has sent the job, below the temporary directory of pytest's.
        keys = []
        for idx in range(NUM_STAGES):
            own = directory / "keys" / f"stage{idx}"
            own.mkdir(parents=True, mode=0o700)
            keys.append(create_identity(own / "machine.pem"))
        home = create_identity(directory / "me.pem")
        self.ports = Ports(NUM_STAGES * 10 + 10)
        options = PlanOptions(
            NUM_STAGES,
            base_port=self.ports.base,
            stage_keys=tuple(keys),
            orchestrator_keys=(home,),
        )
        cut_model(plan(model, options), model, directory / "parts")
        self.manifest = directory / "parts" / "manifest.json"
        script = directory / "stages.sbatch"
        call(
            BIN / "pipeline-orch", "place", "slurm", "--manifest", self.manifest, "-o", script,
            "--nodes", "node0,node1,node2", "--keys-path", directory / "keys",
            "--worker", BIN / "stage-worker",
        )  # fmt: skip
        self.job = call(
            "sbatch", "--parsable", "-o", directory / "job.log", "-D", directory, script
        ).strip()

    def text(self):
        """What the stages generate, whenever they are up."""
        return call(
            BIN / "pipeline-orch", "--manifest", self.manifest, "--identity",
            self.directory / "me.pem", "--tokenizer", self.directory / "parts/tokenizer.json",
            *WORDS,
        )  # fmt: skip

    def workers(self):
        """The stages that run: pid, and node as Slurm has told it."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended, or is another's
                continue
            is_ours = f"--manifest={self.manifest}" in words and "srun" not in words[0]
            if is_ours and str(BIN / "stage-worker") in words[:2]:
                (idx,) = (word[len("--stage-idx=") :] for word in words if "--stage-idx=" in word)
                nodes = [v.partition("=")[2] for v in variables if v.startswith("SLURMD_NODENAME=")]
                found[int(idx)] = (int(path.name), *nodes)
        return found


@pytest.fixture
def placed(tiny_model, tmp_path):
    found = Placed(tiny_model, tmp_path)
    try:
        yield found
    finally:
        subprocess.run(["scancel", found.job], check=False)
        wait_until(lambda: not found.workers())
        found.ports.release()


def alone(model, directory):
    """The text of one process."""
    manifest = directory / "alone.json"
    ports = Ports(20)
    manifest.write_text(dump_manifest(plan(model, PlanOptions(1, base_port=ports.base))))
    try:
        return call(
            BIN / "pipeline-orch", "--manifest", manifest, "--model-dir", model,
            "--tokenizer", model / "tokenizer.json", "--supervise", "--dev", *WORDS,
        )  # fmt: skip
    finally:
        ports.release()


def test_stages_run_where_their_keys_are_come_back_alone_and_end_with_the_job(
    placed, tiny_model, tmp_path
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    expected = alone(model, tmp_path)
    assert placed.text() == expected
    before = placed.workers()
    assert {idx: node for idx, (_, node) in before.items()} == {
        idx: f"node{idx}" for idx in range(NUM_STAGES)
    }
    os.kill(before[1][0], signal.SIGKILL)
    wait_until(lambda: placed.workers().get(1, before[1]) != before[1])
    assert placed.text() == expected
    after = placed.workers()
    assert {idx for idx in before if after[idx] != before[idx]} == {1}
    call("scancel", placed.job)
    wait_until(lambda: not placed.workers())
    state = wait_until(lambda: _ended(placed.job))
    assert state.startswith("CANCELLED"), (tmp_path / "job.log").read_text()


def _ended(job):
    state = call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()
    return state if state not in {"RUNNING", "COMPLETING", "PENDING"} else None
