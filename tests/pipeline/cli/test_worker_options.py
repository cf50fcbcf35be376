"""What workers that are started here are told of how to compute."""

import pytest

from pipeline.cli.worker_options import WorkerOptions
from pipeline.errors import InputError


def test_workers_get_what_was_given_and_nothing_else():
    options = WorkerOptions(dtype="int8", kernels="torch", threads=2, kv_memory=0.5, device="cpu")
    expected = [
        *("--dtype", "int8", "--kernels", "torch", "--threads", "2"),
        *("--device", "cpu", "--kv-memory", "0.5"),
    ]
    assert options.arguments(2) == [expected, expected]
    assert WorkerOptions().arguments(3) == [[], [], []]
    assert WorkerOptions().given() == []
    assert WorkerOptions(threads=1, cpus="0").given() == ["--threads", "--cpus"]


def test_each_stage_has_its_own_cpus_where_lists_are_given():
    assert WorkerOptions(cpus="0-1/2,3").arguments(2) == [["--cpus", "0-1"], ["--cpus", "2,3"]]
    assert WorkerOptions(cpus="0-1").arguments(2) == [["--cpus", "0-1"]] * 2


@pytest.mark.parametrize("cpus", ["0/1/2", "0/", "0-", "a", "", "1-0", "0,0/1"])
def test_cpus_that_are_none_are_refused_before_anything_is_started(cpus):
    with pytest.raises(InputError, match="--cpus"):
        WorkerOptions(cpus=cpus).arguments(2)
