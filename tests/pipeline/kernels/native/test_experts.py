"""Rows through the experts that their logits choose: what a row becomes is its own affair."""

import numpy as np
import pytest

from pipeline.kernels.base import LinearSpec
from pipeline.kernels.gates import GELU, SILU, Gate
from pipeline.kernels.routing import Routing

HIDDEN, INNER, NUM = 40, 24, 7
CLAMPED = Gate("clamped", 1.702, 0.8)


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "biased"])
def made(native, request):
    from pipeline.kernels.native_kernels import NativeKernels

    kernels, random = NativeKernels(), np.random.default_rng(0)
    pairs, weights = [], []
    for _ in range(NUM):
        shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
        own = [random.standard_normal(each).astype(np.float32) / 4 for each in shapes]
        own += [random.standard_normal(each[0]).astype(np.float32) for each in shapes]
        linears = [
            kernels.linear(LinearSpec(*each.shape[::-1], request.param, "float32"))
            for each in own[:2]
        ]
        for linear, *each in zip(linears, own[:2], own[2:], strict=True):
            for sink, rows in zip(linear.sinks("").values(), each, strict=False):
                sink.write(0, rows)
        if not request.param:
            own[2:] = [np.zeros_like(each) for each in own[2:]]
        pairs.append(tuple(linears))
        weights.append(own)
    return kernels, pairs, weights


def rows(count, seed=1):
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((count, HIDDEN)).astype(np.float32),
        3 * random.standard_normal((count, NUM)).astype(np.float32),
    )


def compute(made, routing, x, logits, residual=None):
    kernels, pairs, _ = made
    out = np.full_like(x, 9.0)
    kernels.experts(pairs, routing)(x, logits, out, residual)
    return out


def reference(made, routing, x, logits):
    out = np.zeros(x.shape)
    for row, own in enumerate(logits.astype(np.float64)):
        chosen = np.argsort(-own, kind="stable")[: routing.num_chosen]
        scores = np.exp(own - own.max())
        shares = scores / (scores[chosen] if routing.are_normalised else scores).sum()
        for each in chosen:
            gate_up, down, *biases = made[2][each]
            gate, up = np.split(gate_up.astype(np.float64) @ x[row] + biases[0], 2)
            out[row] += shares[each] * (down @ let_through(routing.gate, gate, up) + biases[1])
    return out


def let_through(kind, gate, up):
    turn = gate
    if kind == CLAMPED:
        gate, up = np.minimum(gate, kind.limit), 1 + np.clip(up, -kind.limit, kind.limit)
        turn = kind.alpha * gate
    elif kind == GELU:
        turn = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return gate / (1 + np.exp(-turn)) * up


@pytest.mark.parametrize("num_chosen", [1, 2, NUM])
@pytest.mark.parametrize("are_normalised", [False, True])
@pytest.mark.parametrize("gate", [SILU, GELU, CLAMPED], ids=lambda gate: gate.kind)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_they_are_what_float64_makes_of_them(made, num_chosen, are_normalised, gate, count):
    routing, (x, logits) = Routing(num_chosen, are_normalised, gate), rows(count)
    expected = reference(made, routing, x, logits)
    assert np.abs(compute(made, routing, x, logits) - expected).max() <= 1e-5
    assert np.abs(compute(made, routing, x, logits, x) - (x + expected)).max() <= 1e-5
    out = x.copy()
    made[0].experts(made[1], routing)(x, logits, out, out)
    assert np.abs(out - (x + expected)).max() <= 1e-5


def test_a_row_is_the_same_alone_and_among_others(made):
    routing, (x, logits) = Routing(3, are_normalised=True), rows(50)
    together = compute(made, routing, x, logits)
    for row in range(50):
        own = slice(row, row + 1)
        assert (compute(made, routing, x[own].copy(), logits[own].copy()) == together[own]).all()


def test_of_equal_logits_the_first_are_chosen(made):
    routing, (x, logits) = Routing(2, are_normalised=False), rows(2)
    logits[0] = 0.5
    expected = reference(made, routing, x, logits)
    assert np.abs(compute(made, routing, x, logits) - expected).max() <= 1e-5


def test_what_is_no_number_stays_in_its_row(made):
    routing, (x, logits) = Routing(2, are_normalised=True), rows(3)
    expected = compute(made, routing, x, logits)
    logits[1] = float("nan")
    found = compute(made, routing, x, logits)
    assert np.isnan(found[1]).any()
    assert (found[[0, 2]] == expected[[0, 2]]).all()


def test_impossible_sizes_are_refused(native, made):
    table = np.zeros((2, 4), np.int64)
    x = np.zeros((1, 16), np.float32)

    def call(num_experts=2, num_chosen=1, hidden=16, inner=16, gate=0):
        shape = (0, hidden, inner)
        native.experts(
            0, table, num_experts, num_chosen, 0, gate, 1.0, 1.0, x, x, *shape, x, None
        )  # fmt: skip

    call()
    for wrong in ({"num_experts": 0}, {"num_chosen": 0}, {"num_chosen": 3}):
        with pytest.raises(ValueError, match="experts"):
            call(**wrong)
    with pytest.raises(ValueError, match="gate"):
        call(gate=3)
    with pytest.raises(ValueError, match="num_in"):
        call(hidden=0)
    with pytest.raises(ValueError, match="num_out"):
        call(inner=0)
    table[1, 1] = 8
    with pytest.raises(ValueError, match="aligned"):
        call()
