"""A worker between its command line and its first connection."""

import os
import shutil
import subprocess
import sys

import pytest

from pipeline.agreement.manifest import dump_manifest, load_manifest
from pipeline.cli import stage_worker
from pipeline.cli.worker_flags import WorkerFlags
from pipeline.errors import InputError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.sealed_memory import SealedMemory, is_sealed, is_untouched
from pipeline.models.layer_parts import OWN
from pipeline.planning.plan import PlanOptions, plan

# Runs the command with what it calls told of on stdout.
TOLD = """
import os
import pipeline.cli.stage_worker as command
from pipeline.weights.read_ahead import run_ahead

def listen(endpoint):
    print("listening", sorted(os.sched_getaffinity(0)))

def load_stage(*arguments):
    print(sorted(os.sched_getaffinity(0)))
    print(*run_ahead(sorted(os.sched_getaffinity(0)) for _ in range(1)))
    shard = load(*arguments)
    print("loaded")
    return shard

load, command.load_stage, command.listen = command.load_stage, load_stage, listen
command.main()
"""


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def worker(model, tmp_path):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(dump_manifest(plan(model, PlanOptions(num_stages=2))))

    def run(*flags, pass_fds=(), stage_idx=0):
        arguments = ["--manifest", manifest, "--stage-idx", stage_idx, "--model-dir", model]
        return subprocess.run(
            [sys.executable, "-c", TOLD, *map(str, arguments), "--dev", *flags],
            capture_output=True, text=True, timeout=300, pass_fds=pass_fds,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("supervised", [(), ("--supervised",)], ids=["alone", "supervised"])
def test_weights_whose_last_byte_is_another_are_named_and_nothing_listens(
    worker, model, supervised
):
    (path,) = model.glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    result = worker("--quiet", *supervised)
    assert result.returncode == 2
    # On stdout whoever supervises it hears of it, and tells it once.
    told = result.stdout if supervised else result.stderr
    assert f"{path} has SHA-256" in told.splitlines()[-1]
    assert "loaded" not in result.stdout.splitlines()
    assert "listening" not in result.stdout


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that can be sealed")
@pytest.mark.parametrize("dev", [True, False], ids=["development", "enclave"])
def test_an_enclave_takes_no_weights_from_outside_of_it(model, tmp_path, monkeypatch, dev):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(dump_manifest(plan(model, PlanOptions(num_stages=2))))
    taken = []

    def load_stage(*arguments):
        taken.extend(each for each in arguments if isinstance(each, SealedMemory))
        raise InputError("that is all")

    monkeypatch.setattr(stage_worker, "load_stage", load_stage)
    monkeypatch.setattr(stage_worker, "_trust", lambda *_: None)
    fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    try:
        flags = WorkerFlags(
            manifest=manifest, stage_idx=0, model_dir=model, weights_fd=fd, store={}, times={},
            development={"dev": dev},
        )  # fmt: skip
        with pytest.raises(InputError, match="that is all"):
            stage_worker._prepare(flags)
    finally:
        os.close(fd)
    assert len(taken) == dev


@pytest.fixture
def memories():
    found = [os.memfd_create("weights", os.MFD_ALLOW_SEALING) for _ in range(3)]
    yield found
    for fd in found:
        os.close(fd)


@pytest.mark.skipif(why_not_native() is not None, reason="needs native kernels")
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that can be sealed")
def test_weights_are_left_for_others_where_these_have_none_and_nobody_has_begun(
    model, tmp_path, memories
):
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(plan(model, PlanOptions(num_stages=2))))
    manifest = load_manifest(path)

    def beside(**given):
        flags = WorkerFlags(
            manifest=path, stage_idx=1, model_dir=model, weights_fd=memories[1],
            beside_stage=(0,), beside_fd=(memories[0],), store={}, times={},
            **{"development": {"dev": True}} | given,
        )  # fmt: skip
        with stage_worker._memory(manifest, flags, OWN) as (own, others):
            assert given.get("development") or own is not None
            # What is filled while others may fill theirs, these leave alone.
            assert others or own is None or not is_untouched(memories[1])
            return [*others]

    assert beside() == [0]
    assert beside(cpus="0") == []
    assert beside(kernels="torch") == []
    assert beside(device="cuda") == []
    assert beside(development={"dev": False}) == []
    os.ftruncate(memories[0], 1)
    assert beside() == []
    assert os.fstat(memories[0]).st_size == 1
    os.ftruncate(memories[0], 0)
    SealedMemory(memories[1]).seal({})
    assert beside() == []


@pytest.mark.skipif(why_not_native() is not None, reason="needs native kernels")
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that can be sealed")
def test_a_worker_reads_for_another_stage_what_that_then_finds(worker, model, memories):
    handed = ("--weights-fd", memories[0], "--beside-stage", 1, "--beside-fd", memories[1])
    first = worker("--supervised", *map(str, handed), pass_fds=memories)
    assert first.stdout.splitlines().count("loaded") == 1
    assert all(map(is_sealed, memories[:2]))
    for path in model.glob("*.safetensors"):  # which nobody may read any more
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    handed = ("--weights-fd", memories[1], "--beside-stage", 0, "--beside-fd", memories[0])
    second = worker("--supervised", *map(str, handed), pass_fds=memories, stage_idx=1)
    assert second.stdout.splitlines().count("loaded") == 1, second.stderr


@pytest.mark.skipif(why_not_native() is not None, reason="torch's threads share all CPUs")
def test_weights_are_read_on_all_cpus_that_the_worker_is_given(worker):
    cpus = sorted(os.sched_getaffinity(0))[:2]
    result = worker("--cpus", ",".join(map(str, cpus)))
    own, reading, loaded, listening, *_ = result.stdout.splitlines()
    assert own == reading == str(cpus)
    assert loaded == "loaded"
    assert listening == f"listening {cpus[:1]}"
