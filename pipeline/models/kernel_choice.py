"""Which kernels compute here: decided once, by what the processor has and a self-test.

Never by a stopwatch: two workers on two equal machines must not differ in rounding.
"""

from collections.abc import Iterable
from functools import cache

import torch

from pipeline.dtypes import dtype_name
from pipeline.errors import InputError
from pipeline.models.batch import Segment
from pipeline.models.config import ModelConfig
from pipeline.models.kernels import HeadShape, Kernels, Linear
from pipeline.models.kernels_cuda import CudaKernels, find_gpu
from pipeline.models.kernels_torch import TorchKernels

CHOICES = ("auto", "native", "torch")
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 512  # what the native attention takes
# Of the largest value. A wrong kernel is wrong by far more; int8 kernels round activations as well.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 3e-2}


def choose_kernels(choice: str, config: ModelConfig, device: str = "cpu") -> Kernels:
    """The kernels to compute a model with; `auto`: native where they work, else torch.

    Another device than the CPU has its own. Raises InputError when native kernels or a device are
    demanded and cannot be had.
    """
    if choice not in CHOICES:
        raise InputError(f"--kernels {choice}: use {', '.join(CHOICES)}")
    if device != "cpu":
        found = find_gpu(device)
        if choice != "auto":
            raise InputError(f"--kernels {choice}: for cpu only, leave it out on {found}")
        kernels = CudaKernels(found)
        problem = first_difference(kernels, TorchKernels(), (torch.float32, torch.bfloat16))
        if problem is not None:
            raise InputError(f"--device {device}: {problem}")
        return kernels
    if choice == "torch":
        return TorchKernels()
    problem = why_not_native() or _why_not_model(config)
    if problem is None:
        from pipeline.models.kernels_native import NativeKernels  # noqa: PLC0415 (may be absent)

        return NativeKernels()
    if choice == "native":
        raise InputError(f"--kernels native: {problem}; leave the flag out to compute with torch")
    return TorchKernels()


def _why_not_model(config: ModelConfig) -> str | None:
    if config.head_dim % HEAD_DIM_STEP or config.head_dim > MAX_HEAD_DIM:
        return (
            f"heads of {config.head_dim} dimensions are not a multiple of {HEAD_DIM_STEP} "
            f"up to {MAX_HEAD_DIM}"
        )
    return None


@cache
def why_not_native() -> str | None:
    """What keeps the native kernels from being used here; None when nothing does."""
    try:
        from pipeline import _native  # noqa: PLC0415
    except ImportError:
        return "they were not built with this installation"
    if not _native.features():
        return "this processor lacks the instructions they are written for (AVX-512)"
    from pipeline.models.kernels_native import NativeKernels  # noqa: PLC0415

    try:
        return first_difference(NativeKernels(), TorchKernels())
    except (AttributeError, TypeError):  # a function missing, or taking other arguments
        return "they were built from other sources than these: run scripts/setup.sh"


@torch.no_grad()
def first_difference(
    kernels: Kernels, reference: Kernels, precisions: Iterable[torch.dtype] = TOLERANCES
) -> str | None:
    """The first operation in which two sets of kernels disagree, if there is one."""
    for precision in precisions:
        with kernels.device:
            products = _products(kernels, precision)
        if not _agree(products, _products(reference, precision), TOLERANCES[precision]):
            return f"their {dtype_name(precision)} products are wrong on this machine"
    with kernels.device:
        found = _rest(kernels)
    for name, expected in _rest(reference).items():
        if not _agree(found[name], expected, TOLERANCES[torch.float32]):
            return f"their {name} is wrong on this machine"
    return None


def _agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    error = (found.cpu() - expected).abs().max()
    return bool(error <= tolerance * expected.abs().max())  # False for NaN


def _wave(*shape: int) -> torch.Tensor:
    """Numbers without a pattern that an indexing mistake could hide in, the same every time."""
    count = torch.Size(shape).numel()
    return torch.linspace(-1.0, 7.0 * count, count).sin().view(shape)


def _products(kernels: Kernels, precision: torch.dtype) -> torch.Tensor:
    """One row and several through a layer with everything: [4, out]."""
    num_in, num_out = 80, 56
    linear: Linear = kernels.linear(
        num_in, num_out, bias=True, precision=precision, activation="gelu_tanh"
    )
    for name, sink in linear.sinks("").items():
        if not sink.is_optional:
            sink.write(0, _wave(*sink.shape) if name == ".bias" else _wave(*sink.shape) / 4)
    x, residual = _wave(3, num_in), _wave(3, num_out)
    several = linear(x, torch.empty(3, num_out), residual=residual)
    return torch.cat((several, linear(x[1:2].clone(), torch.empty(1, num_out))))


def _rest(kernels: Kernels) -> dict[str, torch.Tensor]:
    """What lies between the products, on small rows."""
    shape = HeadShape(num_heads=4, num_kv_heads=2, head_dim=32, window=0)
    x = _wave(5, 64)
    found = {"silu": kernels.silu_mul(x, torch.empty(5, 32))}
    for name, norm in (
        ("LayerNorm", kernels.layer_norm(64, 1e-5)),
        ("RMSNorm", kernels.rms_norm(64, 1e-5)),
    ):
        norm.weight.copy_(_wave(64))
        if norm.bias is not None:
            norm.bias.copy_(_wave(64))
        found[name] = norm(x, torch.empty(5, 64))
    qkv = _wave(5, shape.qkv_width)
    angles = _wave(5, shape.head_dim)
    kernels.rope(qkv, shape, angles.cos(), angles.sin())
    found["rotation"] = qkv
    found["attention"] = _attended(kernels, shape, qkv)
    return found


def _attended(kernels: Kernels, shape: HeadShape, qkv: torch.Tensor) -> torch.Tensor:
    """Two requests side by side, the second one token further."""
    block, capacity = kernels.key_block, 32
    values = torch.zeros(2, shape.num_kv_heads, capacity, shape.head_dim)
    keys = torch.zeros_like(values)
    if block > 1:
        keys = keys.view(2, shape.num_kv_heads, capacity // block, shape.head_dim, block)
    rows = []
    for batch, first in (([Segment(1, 0, 3)], 0), ([Segment(0, 0, 1), Segment(1, 3, 1)], 3)):
        count = sum(segment.num_tokens for segment in batch)
        out = torch.empty(count, shape.num_heads * shape.head_dim)
        attention = kernels.attention(batch, shape, capacity)
        rows.append(attention(qkv[first : first + count].contiguous(), keys, values, out))
    return torch.cat(rows)
