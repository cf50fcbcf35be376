"""Angles are known as far as they were asked for, and are the same however they were."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.kernels.kernel_selection import choose_kernels, why_not_native
from pipeline.models.rope import TABLE_STEP, Angles
from pipeline.models.rope_config import Rope

NUM_POSITIONS, NUM_DIMS = 131_072, 128
ROPES = (Rope(5e5, NUM_DIMS), None, Rope(1e4, NUM_DIMS // 2))


@pytest.fixture(params=["native", "torch"])
def kernels(request):
    if request.param == "native" and (why := why_not_native()):
        pytest.skip(why)
    return choose_kernels(request.param, NUM_DIMS)


def rows(angles, kernels, positions):
    found = angles.rows(NUM_POSITIONS, kernels.to_device(np.asarray(positions)))
    return [each and [np.array(part) for part in kernels.to_host(*each)] for each in found]


def test_a_long_context_costs_what_is_reached_of_it(kernels):
    angles = Angles(ROPES, kernels, NUM_DIMS, NUM_POSITIONS)
    assert angles.reach(NUM_POSITIONS, 1) == TABLE_STEP
    assert angles.reach(NUM_POSITIONS, TABLE_STEP) == TABLE_STEP
    assert angles.reach(NUM_POSITIONS, TABLE_STEP + 1) == 2 * TABLE_STEP
    assert angles.reach(NUM_POSITIONS, 3) == 2 * TABLE_STEP


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_not_reached_is_not_in_memory(kernels):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    angles = Angles(ROPES, kernels, NUM_DIMS, 1 << 20)
    angles.reach(1 << 20, 1)
    assert resident() - before < 64 << 20  # of 1.5 GB


def test_angles_are_the_same_whether_reached_at_once_or_one_by_one(kernels):
    positions = [0, 1, TABLE_STEP - 1, TABLE_STEP, 5 * TABLE_STEP + 7]
    at_once, one_by_one = (Angles(ROPES, kernels, NUM_DIMS, NUM_POSITIONS) for _ in range(2))
    at_once.reach(NUM_POSITIONS, positions[-1] + 1)
    expected = rows(at_once, kernels, positions)
    assert expected[1] is None
    assert expected[2][0].shape == (len(positions), NUM_DIMS // 2)
    for place, position in enumerate(positions):
        one_by_one.reach(NUM_POSITIONS, position + 1)
        for found, known in zip(rows(one_by_one, kernels, [position]), expected, strict=True):
            assert (found is None) == (known is None)
            for mine, theirs in zip(found or (), known or (), strict=True):
                assert (mine == theirs[place]).all()


def test_without_angles_every_position_is_reached(kernels):
    assert Angles([None], kernels, NUM_DIMS, 64).reach(64, 3) == 64
