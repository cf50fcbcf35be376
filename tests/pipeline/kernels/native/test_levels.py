"""Levels of vector instructions: the same weights, the same bits."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dtypes import PRECISIONS
from pipeline.errors import InputError
from pipeline.kernels import kernel_selection, self_test
from pipeline.kernels.kernel_selection import LEVELS, choose_kernels, why_not_native

from .conftest import Packed

HEAD_DIM = 64
ROWS = (*range(1, 14), 16, 17, 35)


@pytest.fixture
def module():
    found = pytest.importorskip("pipeline.kernels._native", reason="built without a C compiler")
    if len(found.levels()) < 2:
        pytest.skip("this processor has one level, or none")
    before = found.features()[0]
    yield found
    found.use_level(before)


def is_rounded(module, kind):
    return kind == "BF16" and "bf16_dot" in module.features()


@pytest.mark.parametrize("num_in", [1, 33, 64, 200, 600])
@pytest.mark.parametrize("kind", ["F32", "BF16", "I8"])
def test_products_by_weights_packed_at_any_level_have_the_same_bits_at_all(module, kind, num_in):
    generator = torch.Generator().manual_seed(num_in)
    weight, bias = torch.randn(70, num_in, generator=generator), torch.randn(70)
    inputs = [torch.randn(rows, num_in, generator=generator) for rows in ROWS]
    packings, results = [], []
    for level in module.levels():
        module.use_level(level)
        if {"F32": "float32", "BF16": "bfloat16", "I8": "int8"}[kind] not in module.features():
            continue
        packed = Packed(module, getattr(module, kind), weight)
        packings.append(packed.memory)
        if not is_rounded(module, kind):
            results.append([packed.linear(x, bias, x.shape[0] % 4) for x in inputs])
    assert all(memory.equal(packings[0]) for memory in packings)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_all_else_has_the_same_bits_at_all_levels(module):
    found = []
    for level in module.levels():
        kernels = choose_kernels(f"native-{level}", HEAD_DIM)
        found.append({name: result for name, (result, _) in self_test._rest(kernels).items()})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, result in other.items():
            assert np.array_equal(result, found[0][name]), name


def test_a_level_that_is_asked_for_computes_until_another_is(module):
    for level in module.levels():
        choose_kernels(f"native-{level}", HEAD_DIM)
        assert module.features()[0] == level
        assert why_not_native() is None  # as others ask that compute nothing themselves
        assert module.features()[0] == level
    choose_kernels("auto", HEAD_DIM)
    assert module.features()[0] == module.levels()[0]


def test_a_level_that_the_processor_lacks_is_refused(module):
    lacking = next(level for level in LEVELS if level not in module.levels())
    with pytest.raises(InputError, match=f"--kernels native-{lacking}: this processor lacks"):
        choose_kernels(f"native-{lacking}", HEAD_DIM)
    with pytest.raises(ValueError, match="no level of this CPU"):
        module.use_level(lacking)


def test_a_level_that_computes_wrongly_gives_way_to_the_next(module, monkeypatch):
    best, next_best = module.levels()[:2]

    def difference(kernels):
        return "their products are wrong" if module.features()[0] == best else None

    monkeypatch.setattr(kernel_selection, "first_difference", difference)
    why_not_native.cache_clear()
    try:
        module.use_level(best)
        assert why_not_native() is None
        assert module.features()[0] == next_best
        choose_kernels("auto", HEAD_DIM)
        assert module.features()[0] == next_best
        with pytest.raises(InputError, match="their products are wrong"):
            choose_kernels(f"native-{best}", HEAD_DIM)
    finally:
        why_not_native.cache_clear()


def test_every_precision_has_a_kind_wherever_it_is_held(module):
    for level in module.levels():
        module.use_level(level)
        assert {"float32", "bfloat16"} <= set(module.features()) - {level}
        assert set(module.features()[1:]) <= {*PRECISIONS, "bf16_dot"}


def test_what_compares_processors_knows_the_kernels_as_they_are():
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = Path(__file__).with_name("level_bits.c")
    strict = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run([compiler, *strict, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
