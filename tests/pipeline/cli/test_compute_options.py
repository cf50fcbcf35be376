"""What workers that are started here are told of how to compute."""

import pytest

from pipeline.cli.compute_options import WorkerOptions
from pipeline.errors import InputError
from pipeline.planning.plan import PlanOptions, plan


@pytest.fixture(scope="module")
def manifest(tiny_model):
    return plan(tiny_model, PlanOptions(2))


def test_workers_get_what_was_given_and_nothing_else(manifest):
    options = WorkerOptions(
        dtype="int8", kernels="torch", threads=2, kv_memory=0.5, device="cpu", masks="m"
    )
    expected = [
        *("--dtype", "int8", "--kernels", "torch", "--threads", "2"),
        *("--device", "cpu", "--kv-memory", "0.5", "--masks", "m"),
    ]
    assert options.arguments(manifest) == [expected, expected]
    assert WorkerOptions().arguments(manifest) == [[], []]
    assert WorkerOptions().given() == []
    assert WorkerOptions(threads=1, cpus="0").given() == ["--threads", "--cpus"]


def test_each_stage_has_its_own_cpus_where_lists_are_given(manifest):
    several = WorkerOptions(cpus="0-1/2,3").arguments(manifest)
    assert several == [["--cpus", "0-1"], ["--cpus", "2,3"]]
    assert WorkerOptions(cpus="0-1").arguments(manifest) == [["--cpus", "0-1"]] * 2


def test_each_of_several_pipelines_has_its_own_cpus_where_there_are_lists_for_all(manifest):
    def cpus(text, replica):
        return [words[1] for words in WorkerOptions(cpus=text).arguments(manifest, replica, 2)]

    assert [cpus("0/1/2/3", idx) for idx in range(2)] == [["0", "1"], ["2", "3"]]
    assert [cpus("0/1", idx) for idx in range(2)] == [["0", "1"]] * 2
    assert [cpus("0", idx) for idx in range(2)] == [["0", "0"]] * 2
    with pytest.raises(InputError, match="one list of CPUs, or 2 or 4 between slashes"):
        cpus("0/1/2", 0)


@pytest.mark.parametrize("cpus", ["0/1/2", "0/", "0-", "a", "", "1-0", "0,0/1"])
def test_cpus_that_are_none_are_refused_before_anything_is_started(manifest, cpus):
    with pytest.raises(InputError, match="--cpus"):
        WorkerOptions(cpus=cpus).arguments(manifest)


def test_what_no_worker_could_start_with_is_refused_before_any_is(manifest, tiny_model):
    with pytest.raises(InputError, match="--dtype int3: use float32"):
        WorkerOptions(dtype="int3").arguments(manifest)
    with pytest.raises(InputError, match="--kernels fast: use auto"):
        WorkerOptions(kernels="fast").arguments(manifest)
    with pytest.raises(InputError, match="has 2 CPUs for --threads 3"):
        WorkerOptions(threads=3, cpus="0-1").arguments(manifest)
    pinned = plan(tiny_model, PlanOptions(2, precision="int8"))
    with pytest.raises(InputError, match="the manifest says int8 for stage 0"):
        WorkerOptions(dtype="float32").arguments(pinned)
