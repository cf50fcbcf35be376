"""Which kernels compute here: decided once, by what the processor has and a self-test.

Never by a stopwatch: two workers on two equal machines must not differ in rounding.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from pipeline.errors import InputError
from pipeline.kernels.base import Kernels
from pipeline.kernels.self_test import first_difference

LEVELS = ("avx512", "avxvnni", "avx2", "neon")  # instructions native kernels are compiled for
CHOICES = ("auto", "native", "torch", *(f"native-{level}" for level in LEVELS))
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
    level = choice.partition("-")[2] or None
    problem = why_not_native(level) or _why_not_heads(head_dim)
    if problem is None:
        return _native_kernels(level)
    if choice != "auto":
        raise InputError(f"--kernels {choice}: {problem}; leave the flag out for what can compute")
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


def _native_kernels(level: str | None) -> Kernels:
    """From now on this process computes at that level, or at the best that works."""
    from pipeline.kernels import _native  # noqa: PLC0415 (may be absent)
    from pipeline.kernels.native_kernels import NativeKernels  # noqa: PLC0415

    _native.use_level(level or _best_of(_native.levels()))
    return NativeKernels()


def _best_of(levels: Sequence[str]) -> str:
    """The first that computes rightly, else the first."""
    return next((level for level in levels if why_not_native(level) is None), levels[0])


@cache
def why_not_native(level: str | None = None) -> str | None:
    """What keeps the native kernels from being used here, at a level or at any; None: nothing.

    A process that computes at one that does not work is moved to one that does.
    """
    try:
        from pipeline.kernels import _native  # noqa: PLC0415
    except ImportError:
        return NOT_BUILT
    if not _native.features():
        return "this processor lacks the instructions they are written for (AVX-512, AVX2, NEON)"
    try:
        return _first_problem(_native, level)
    except (AttributeError, TypeError):  # a function missing, or taking other arguments
        return "they were built from other sources than these: run scripts/setup.sh"


def _first_problem(native: ModuleType, level: str | None) -> str | None:
    from pipeline.kernels.native_kernels import NativeKernels  # noqa: PLC0415 (may be absent)

    levels, current = native.levels(), native.features()[0]
    if level is None:
        if why_not_native(current) is not None:
            native.use_level(current := _best_of(levels))
        return why_not_native(current)
    if level not in levels:
        return f"this processor lacks {level}, it has {', '.join(levels)}"
    native.use_level(level)
    try:
        return first_difference(NativeKernels())
    finally:
        native.use_level(current)
