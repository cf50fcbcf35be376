"""Which kernels compute here: decided once, by what the processor has and a self-test.

Never by a stopwatch: two workers on two equal machines must not differ in rounding.
"""

from functools import cache
from importlib.util import find_spec

from pipeline.errors import InputError
from pipeline.kernels.base import Kernels
from pipeline.kernels.self_test import first_difference

CHOICES = ("auto", "native", "torch")
NOT_BUILT = "the native kernels were not built with this installation"
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 512  # what the native attention takes


def choose_kernels(choice: str, head_dim: int, device: str = "cpu") -> Kernels:
    """The kernels for a model with such heads; `auto`: native where they work, else torch.

    Another device than the CPU has its own. Raises InputError when native kernels or a device are
    demanded and cannot be had, or when what computes instead is not installed.
    """
    check_choice(choice)
    if device != "cpu":
        return _gpu(choice, device)
    if choice == "torch":
        return _torch("--kernels torch")
    problem = why_not_native() or _why_not_heads(head_dim)
    if problem is None:
        from pipeline.kernels.native_kernels import NativeKernels  # noqa: PLC0415 (may be absent)

        return NativeKernels()
    if choice == "native":
        raise InputError(f"--kernels native: {problem}; leave the flag out to compute with torch")
    return _torch(problem)


def check_choice(choice: str) -> None:
    """Raises InputError for kernels that there are nowhere."""
    if choice not in CHOICES:
        raise InputError(f"--kernels {choice}: use {', '.join(CHOICES)}")


# Only what computes is imported: torch takes as long as all else together, and a worker's memory.
def _torch(reason: str) -> Kernels:
    _check_torch(reason, "torch")
    from pipeline.kernels.torch_kernels import TorchKernels  # noqa: PLC0415

    return TorchKernels()


def _check_torch(reason: str, extra: str) -> None:
    """Raises InputError, which says what to install, where there is no torch."""
    if find_spec("torch") is None:
        install = f"pip install 'veilpipe[{extra}]'"
        if reason == NOT_BUILT:
            install += ", or a C compiler and Python's headers, then veilpipe once more"
        raise InputError(f"nothing here can compute this ({reason}): {install}")


def _gpu(choice: str, device: str) -> Kernels:
    _check_torch(f"--device {device}", "cuda")
    from pipeline.kernels.cuda_kernels import CudaKernels, find_gpu  # noqa: PLC0415

    found = find_gpu(device)
    if choice != "auto":
        raise InputError(f"--kernels {choice}: for cpu only, leave it out on {found}")
    kernels = CudaKernels(found)
    problem = first_difference(kernels, ("float32", "bfloat16"))
    if problem is not None:
        raise InputError(f"--device {device}: {problem}")
    return kernels


def import_kernels() -> None:
    """Import and test what `auto` computes most models with here, ahead of the first."""
    if why_not_native() is not None and find_spec("torch") is not None:
        import pipeline.kernels.torch_kernels  # noqa: F401, PLC0415


def _why_not_heads(head_dim: int) -> str | None:
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        return (
            f"heads of {head_dim} dimensions are not a multiple of {HEAD_DIM_STEP} "
            f"up to {MAX_HEAD_DIM}"
        )
    return None


@cache
def why_not_native() -> str | None:
    """What keeps the native kernels from being used here; None when nothing does."""
    try:
        from pipeline.kernels import _native  # noqa: PLC0415
    except ImportError:
        return NOT_BUILT
    if not _native.features():
        return "this processor lacks the instructions they are written for (AVX-512)"
    try:
        from pipeline.kernels.native_kernels import NativeKernels  # noqa: PLC0415

        return first_difference(NativeKernels())
    except (AttributeError, TypeError):  # a function missing, or taking other arguments
        return "they were built from other sources than these: run scripts/setup.sh"
