"""Whether kernels compute rightly on this machine: each operation against plain numpy's."""

import math
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from pipeline.dtypes import (
    FLOAT32,
    KV_DTYPES,
    PRECISIONS,
    Array,
    ArrayDType,
    Floats,
    HostArray,
    Precision,
    from_floats,
    to_floats,
)
from pipeline.kernels.base import HeadShape, Kernels, LinearSpec, Norm
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.routing import Routing
from pipeline.protocol.batch import Segment
from pipeline.weights.int4 import dequantise_int4, quantise_int4
from pipeline.weights.quantization import dequantise, quantise

# Of the largest value. A wrong kernel is wrong by far more; those for int8 and int4 round what they
# multiply as well.
TOLERANCES: dict[Precision, float] = {
    "float32": 1e-4,
    "bfloat16": 2e-2,
    "int8": 3e-2,
    "int4": 3e-2,
}
EPS = 1e-5
SHAPE = HeadShape(num_heads=4, num_kv_heads=2, head_dim=32, window=0)
ALPHA, LIMIT = 1.702, 0.7
PART = 20  # dimensions of a head that turn, where not all do
AnyNorm = TypeVar("AnyNorm", bound=Norm)


def first_difference(
    kernels: Kernels, precisions: Iterable[Precision] = tuple(PRECISIONS)
) -> str | None:
    """The first operation that is wrong, if there is one."""
    for precision in precisions:
        found, expected = _products(kernels, precision)
        if not _agree(found, expected, TOLERANCES[precision]):
            return f"their {precision} products are wrong on this machine"
    for name, (found, expected) in _rest(kernels).items():
        if not _agree(found, expected, TOLERANCES["float32"]):
            return f"their {name} is wrong on this machine"
    return None


def _agree(found: HostArray, expected: HostArray, tolerance: float) -> bool:
    error = np.abs(found - expected).max()
    return bool(error <= tolerance * np.abs(expected).max())  # False for NaN


def _wave(*shape: int) -> Floats:
    """Numbers without a pattern that an indexing mistake could hide in, the same every time."""
    count = math.prod(shape)
    return np.sin(np.linspace(-1.0, 7.0 * count, count)).astype(np.float32).reshape(shape)


def _products(kernels: Kernels, precision: Precision) -> tuple[HostArray, HostArray]:
    """Several rows and one through a layer with everything: [4, out]."""
    num_in, num_out = 80, 56
    linear = kernels.linear(LinearSpec(num_in, num_out, True, precision, "gelu_tanh"))
    weight, bias = _wave(num_out, num_in), _wave(num_out)
    weight /= 4
    for name, rows in ((".weight", weight), (".bias", bias)):
        linear.sinks("")[name].write(0, rows)
    x, residual = _wave(3, num_in), _wave(3, num_out)
    several = linear(
        kernels.to_device(x), kernels.empty(3, num_out), residual=kernels.to_device(residual)
    )
    one = linear(kernels.to_device(x[1:2]), kernels.empty(1, num_out))
    if precision == "int4":
        rounded = dequantise_int4(quantise_int4(weight))
    elif precision == "int8":
        rounded = dequantise(*quantise(weight))
    else:
        rounded = to_floats(from_floats(weight, PRECISIONS[precision]))
    y = x @ rounded.T + bias
    y = _gelu(y)
    return np.concatenate(kernels.to_host(several, one)), np.concatenate((y + residual, y[1:2]))


def _gelu(x: Floats) -> Floats:
    found: Floats = x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return found


def _clamped(gate: Floats, up: Floats) -> Floats:
    gate = np.minimum(gate, LIMIT)
    found: Floats = gate / (1 + np.exp(-ALPHA * gate)) * (1 + np.clip(up, -LIMIT, LIMIT))
    return found


def _rest(kernels: Kernels) -> dict[str, tuple[HostArray, HostArray]]:
    """What lies between the products, on small rows: found and expected."""
    x = _wave(5, 64)
    gate, up = x[:, :32], x[:, 32:]
    silu = kernels.silu_mul(kernels.to_device(x), kernels.empty(5, 32))
    gelu = kernels.gelu_mul(kernels.to_device(x), kernels.empty(5, 32))
    clamped = kernels.clamped_mul(kernels.to_device(x), kernels.empty(5, 32), ALPHA, LIMIT)
    scaled = kernels.to_device(x.copy())
    kernels.scale(scaled, 2.5)
    turned, matrices = kernels.to_device(x.copy()), _wave(2, 16, 16)
    kernels.turn(turned, kernels.to_device(matrices), 2, 0.5)
    heads = x.reshape(5, 2, 2, 16) * np.float32(0.5) @ matrices
    qkv, angles = _wave(5, SHAPE.qkv_width), _wave(5, SHAPE.head_dim)
    cos, sin = np.cos(angles), np.sin(angles)
    rotated, partly, within = (kernels.to_device(qkv.copy()) for _ in range(3))
    kernels.rope(rotated, SHAPE, kernels.to_device(cos), kernels.to_device(sin))
    some = [np.ascontiguousarray(each[:, :PART]) for each in (cos, sin)]
    kernels.rope(partly, SHAPE, *map(kernels.to_device, some))
    added = kernels.to_device(x.copy())
    _filled(kernels.rms_norm(64, EPS)).add(kernels.to_device(x), added)
    _filled(kernels.rms_norm(SHAPE.head_dim, EPS)).within(within[:, : 2 * SHAPE.head_dim])
    some_heads = qkv[:, : 2 * SHAPE.head_dim].reshape(-1, SHAPE.head_dim)
    normed = (_over_deviation(some_heads) * _wave(SHAPE.head_dim)).reshape(5, -1)
    results = {
        "silu": (silu, gate / (1 + np.exp(-gate)) * up),
        "gelu": (gelu, _gelu(gate) * up),
        "clamped gate": (clamped, _clamped(gate, up)),
        "scaling": (scaled, x * np.float32(2.5)),
        "turned heads": (turned, heads.reshape(5, 64)),
        "LayerNorm": (
            _normed(kernels, kernels.layer_norm(64, EPS), x),
            _over_deviation(x - x.mean(-1, keepdims=True)) * _wave(64) + _wave(64),
        ),
        "RMSNorm": (
            _normed(kernels, kernels.rms_norm(64, EPS), x),
            _over_deviation(x) * _wave(64),
        ),
        "added RMSNorm": (added, x + _over_deviation(x) * _wave(64)),
        "RMSNorm of heads": (within, np.hstack((normed, qkv[:, 2 * SHAPE.head_dim :]))),
        "rotation": (rotated, _rotated(qkv, cos, sin)),
        "rotation in part": (partly, _rotated(qkv, *some)),
    }
    routed = _routed(kernels)
    if routed is not None:
        results["experts"] = routed
    for dtype in sorted(set(KV_DTYPES.values()), key=str):
        found, expected = _attended(kernels, qkv, dtype), _attention(qkv, dtype)
        results[f"attention in {dtype}"] = (found, expected)
    sinks = _wave(SHAPE.num_heads)
    results["attention with sinks"] = (
        _attended(kernels, qkv, FLOAT32, sinks),
        _attention(qkv, FLOAT32, sinks),
    )
    return {name: (kernels.to_host(found)[0], each) for name, (found, each) in results.items()}


def _routed(kernels: Kernels) -> tuple[Array, HostArray] | None:
    """Two of three experts for each of five rows, by logits that they begin with."""
    weights = [(_wave(48, 32) / (4 + at), _wave(32, 24) / (3 + at)) for at in range(3)]
    pairs = []
    for pair in weights:
        linears = [
            kernels.linear(LinearSpec(each.shape[1], len(each), bias=False, precision="float32"))
            for each in pair
        ]
        for linear, each in zip(linears, pair, strict=True):
            linear.sinks("")[".weight"].write(0, each)
        pairs.append((linears[0], linears[1]))
    experts = kernels.experts(pairs, Routing(num_chosen=2, are_normalised=True))
    if experts is None:
        return None
    x = _wave(5, 32)
    logits, out = np.ascontiguousarray(x[:, :3]), kernels.to_device(x.copy())
    experts(kernels.to_device(x), kernels.to_device(logits), out, out)
    expected = x.astype(np.float64)
    for row, own in enumerate(logits):
        chosen = np.argsort(-own)[:2]
        shares = np.exp(own[chosen]) / np.exp(own[chosen]).sum()
        for share, (gate_up, down) in zip(shares, [weights[each] for each in chosen], strict=True):
            gate, up = np.split(gate_up @ x[row], 2)
            expected[row] += share * (down @ (gate / (1 + np.exp(-gate)) * up))
    return out, expected


def _normed(kernels: Kernels, norm: Norm, x: Floats) -> Array:
    return _filled(norm)(kernels.to_device(x), kernels.empty(*x.shape))


def _filled(norm: AnyNorm) -> AnyNorm:
    for sink in norm.sinks("").values():
        sink.write(0, _wave(norm.size))
    return norm


def _over_deviation(x: Floats) -> HostArray:
    scaled: HostArray = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return scaled


def _rotated(qkv: Floats, cos: Floats, sin: Floats) -> Floats:
    """Queries and keys by their row's angles, values as they are."""
    num_dims = cos.shape[1]
    heads = qkv.reshape(len(qkv), -1, SHAPE.head_dim).copy()
    turned = heads[:, : SHAPE.num_heads + SHAPE.num_kv_heads, :num_dims]
    swapped = np.roll(turned, num_dims // 2, -1)
    turned[:] = turned * cos[:, None] + swapped * sin[:, None]
    return heads.reshape(qkv.shape)


def _attended(
    kernels: Kernels, qkv: Floats, dtype: ArrayDType, sinks: Floats | None = None
) -> Array:
    """Two requests side by side: three rows of the second, then one of each."""
    cache = KVCache(
        kernels,
        num_layers=1,
        num_slots=2,
        num_kv_heads=SHAPE.num_kv_heads,
        max_seq_len=32,
        head_dim=SHAPE.head_dim,
        dtype=dtype,
        key_block=kernels.key_block,
        scratch_slots=kernels.scratch_slots,
    )
    out = kernels.empty(5, SHAPE.num_heads * SHAPE.head_dim)
    for batch, first in (([Segment(1, 0, 3)], 0), ([Segment(0, 0, 1), Segment(1, 3, 1)], 3)):
        last = first + sum(segment.num_tokens for segment in batch)
        attention = kernels.attention(batch, SHAPE, cache.capacity)
        rows = kernels.to_device(qkv[first:last])
        own = None if sinks is None else kernels.to_device(sinks)
        attention(rows, cache.keys[0], cache.values[0], out[first:last], own)
    return out


def _attention(qkv: Floats, dtype: ArrayDType, sinks: Floats | None = None) -> HostArray:
    """The same: what each of these rows sees, and the values there in the proportion they match."""
    queries, keys, values = np.split(
        qkv.reshape(5, -1, SHAPE.head_dim),
        [SHAPE.num_heads, SHAPE.num_heads + SHAPE.num_kv_heads],
        axis=1,
    )
    keys, values = (to_floats(from_floats(each, dtype)) for each in (keys, values))
    group = SHAPE.num_heads // SHAPE.num_kv_heads
    out = np.empty((5, SHAPE.num_heads, SHAPE.head_dim))
    for row, seen in enumerate(([0], [0, 1], [0, 1, 2], [3], [0, 1, 2, 4])):
        seen_keys, seen_values = (each[seen].repeat(group, 1) for each in (keys, values))
        matches = np.exp((seen_keys * queries[row]).sum(-1) / math.sqrt(SHAPE.head_dim))
        rest = 0 if sinks is None else np.exp(sinks)
        out[row] = (seen_values * (matches / (matches.sum(0) + rest))[..., None]).sum(0)
    return out.reshape(5, -1)
