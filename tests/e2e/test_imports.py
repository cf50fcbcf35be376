"""What a command imports: most of a worker's start, and of its memory beside its weights."""

import subprocess
import sys

import pytest

from pipeline.kernels.kernel_selection import why_not_native

# A command that says, when it ends, what it has imported of some packages, and the kilobytes that
# it has for itself.
COMMAND = """
import atexit, pathlib, re, sys
from pipeline.cli import entry

@atexit.register
def tell():
    status = pathlib.Path("/proc/self/status")
    anonymous = re.search(r"RssAnon:\\s+(\\d+)", status.read_text())[1] if status.exists() else 0
    print("kilobytes:", anonymous, file=sys.stderr)
    print("imported:", *sorted({names!r} & sys.modules.keys()), file=sys.stderr)

entry.{command}()
"""
COMPUTING = {"torch", "transformers", "safetensors"}
SERVING = {"hypercorn", "jinja2", "pipeline.gateway", "prometheus_client", "rich", "starlette"}
# What one careless import brings along, and no stage needs.
HEAVY = {
    "asyncio", "concurrent.futures", "http", "multiprocessing", "numpy.fft", "numpy.ma",
    "numpy.polynomial", "numpy.random", "numpy.testing", "pipeline.engine", "pipeline.gguf.header",
    "pipeline.models.gemma", "pipeline.models.qwen", "pipeline.orchestrator",
    "pipeline.placement", "pipeline.planning", "pydantic.networks",
    "pydantic.v1", "pygments", "tokenizers", "unittest", "urllib.request", "xml",
}  # fmt: skip
# A worker with hardly any shard has some 40 MB for itself, one with torch several times as much.
MOST_KILOBYTES = 56 << 10


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


def ended(process):
    """What it has imported, and its memory in kilobytes, once it has ended as it should."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    kilobytes, _, names = err.split("kilobytes:")[1].partition("imported:")
    return names.split(), int(kilobytes)


def imported(process):
    return ended(process)[0]


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "int8"]
)
def test_a_worker_on_native_kernels_imports_little_and_stays_small(cluster, start, dtype):
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    cluster.plan(2, precision=dtype)
    workers = [
        start(
            "stage_worker", COMPUTING | SERVING | HEAVY, "--manifest", cluster.manifest,
            "--stage-idx", idx, "--model-dir", cluster.model_dir, "--dev", "--once",
        )
        for idx in range(2)
    ]  # fmt: skip
    arguments = cluster.arguments("Hello", "--max-tokens", "5", "--ignore-eos")
    assert not imported(start("pipeline_orch", COMPUTING, *arguments))
    for names, kilobytes in map(ended, workers):
        assert names == []
        assert kilobytes < MOST_KILOBYTES


def test_an_orchestrator_that_holds_the_ends_computes_them_without_torch(cluster, start):
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    cluster.plan(1, split="client")
    cluster.start_worker(0, "--once")
    arguments = cluster.arguments("Hello", "--max-tokens", "5", "--ignore-eos")
    assert not imported(start("pipeline_orch", COMPUTING, *arguments))


def test_a_worker_on_torchs_kernels_imports_it(cluster, start):
    """So that the test above cannot pass whatever is imported, and however much it takes."""
    cluster.plan(1)
    worker = start(
        "stage_worker", COMPUTING, "--manifest", cluster.manifest, "--stage-idx", 0,
        "--model-dir", cluster.model_dir, "--dev", "--once", "--kernels", "torch",
    )  # fmt: skip
    assert cluster.orch("Hello", "--max-tokens", "3").returncode == 0
    names, kilobytes = ended(worker)
    assert "torch" in names
    assert kilobytes > MOST_KILOBYTES or sys.platform != "linux"


def test_planning_and_cutting_a_model_imports_no_torch(cluster, start):
    model = cluster.model_dir
    manifest = cluster.directory / "planned.json"
    plan = ("plan", "--model-dir", model, "--stages", 2, "--output", manifest)
    assert not imported(start("pipeline_orch", COMPUTING, *plan))
    shard = ("shard", "--manifest", manifest, "--model-dir", model, "--dtype", "int8",
             "--out", cluster.directory / "shards")  # fmt: skip
    assert not imported(start("pipeline_orch", COMPUTING, *shard))
