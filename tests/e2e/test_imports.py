"""What a command imports: most of a worker's start, and of its memory beside its weights."""

import subprocess
import sys

import pytest

from pipeline.models.kernel_choice import why_not_native

# A command that says, when it ends, what it has imported of some packages.
COMMAND = """
import atexit, sys
from pipeline.cli import entry

@atexit.register
def tell():
    print("imported:", *sorted({names!r} & sys.modules.keys()), file=sys.stderr)

entry.{command}()
"""
COMPUTING = {"torch", "transformers", "safetensors"}
SERVING = {"hypercorn", "jinja2", "pipeline.gateway", "prometheus_client", "rich", "starlette"}


@pytest.fixture
def start(cluster):
    """Starts a command that is to import none of `names`."""

    def start(command, names, *arguments):
        code = COMMAND.format(command=command, names=names)
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cluster.environment,
        )  # fmt: skip

    return start


def imported(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    return err.split("imported:")[1].split()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_worker_on_native_kernels_imports_no_torch(cluster, start, dtype):
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    cluster.plan(2, precision=dtype)
    workers = [
        start(
            "stage_worker", COMPUTING | SERVING | {"tokenizers"}, "--manifest", cluster.manifest,
            "--stage-idx", idx, "--model-dir", cluster.model_dir, "--dev", "--once",
        )
        for idx in range(2)
    ]  # fmt: skip
    arguments = cluster.arguments("Hello", "--max-tokens", "5", "--ignore-eos")
    assert not imported(start("pipeline_orch", COMPUTING, *arguments))
    assert [imported(worker) for worker in workers] == [[], []]


def test_a_worker_on_torchs_kernels_imports_it(cluster, start):
    """So that the test above cannot pass whatever is imported."""
    cluster.plan(1)
    worker = start(
        "stage_worker", COMPUTING, "--manifest", cluster.manifest, "--stage-idx", 0,
        "--model-dir", cluster.model_dir, "--dev", "--once", "--kernels", "torch",
    )  # fmt: skip
    assert cluster.orch("Hello", "--max-tokens", "3").returncode == 0
    assert "torch" in imported(worker)


def test_planning_and_cutting_a_model_imports_no_torch(cluster, start):
    model = cluster.model_dir
    manifest = cluster.directory / "planned.json"
    plan = ("plan", "--model-dir", model, "--stages", 2, "--output", manifest)
    assert not imported(start("pipeline_orch", COMPUTING, *plan))
    shard = ("shard", "--manifest", manifest, "--model-dir", model, "--dtype", "int8",
             "--out", cluster.directory / "shards")  # fmt: skip
    assert not imported(start("pipeline_orch", COMPUTING, *shard))
