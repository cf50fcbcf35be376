"""What arithmetic may take of the machine: how many threads, and how much memory it may keep.

torch's pool gets as many as asked for. numpy's BLAS, which multiplies single rows, stays at one:
its idle threads spin for milliseconds and steal the core of torch's pool and of the stage next door
(two threads on two busy cores: a token took 4.5 times as long as through torch alone; on two idle
ones the products were 1.3 times faster than with one), and one core nearly saturates the memory
anyway. It also makes a single row's product the same for any count.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from pipeline.errors import InputError

# OpenBLAS exports its names with the prefix and suffix it was built with.
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)
# What glibc's mallopt calls its parameters, and from how many bytes on a block is given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_PERTURB = -1, -3, -6
_LARGE_BLOCK = 1 << 20

# Threads and CPUs for torch, for when it is imported.
_asked: tuple[int, Sequence[int]] | None = None
# How many while weights are read, if they are.
_while_reading: int | None = None


def set_num_threads(num_threads: int, cpus: Sequence[int] = ()) -> None:
    """Let this process compute with at most `num_threads` threads at a time.

    `cpus`: none, or one for each; native kernels' threads stay on theirs, the first of them this
    one. torch's share them. Raises InputError for more threads than the native kernels make, where
    there are those, and for CPUs that this process may not use; ValueError for less than one.
    """
    global _asked  # noqa: PLW0603 - as global as what it governs
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads}: at least one thread computes")
    native = _native_threads()
    if native is not None and num_threads > native.MAX_THREADS:
        raise InputError(
            f"{num_threads} threads are more than the {native.MAX_THREADS} that compute here"
        )
    if cpus:
        _check_cpus(cpus)
    if native is not None and max(cpus, default=0) >= native.MAX_CPUS:
        raise InputError(
            f"CPU {max(cpus)} is beyond those that threads are pinned to here: "
            f"they are numbered below {native.MAX_CPUS}"
        )
    _asked = num_threads, cpus
    limit_torch()
    pin_blas()
    if native is not None:
        native.set_num_threads(num_threads, *cpus)
        if cpus:
            os.sched_setaffinity(0, cpus[:1])


def _native_threads() -> ModuleType | None:
    """The native kernels' module, where there is one that offers threads on this processor."""
    try:
        from pipeline.kernels import _native  # noqa: PLC0415 (may be absent)
    except ImportError:
        return None
    # without the last it is built from older sources, which nobody then computes with
    return _native if _native.features() and hasattr(_native, "MAX_THREADS") else None


def _check_cpus(cpus: Sequence[int]) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system does not let a process choose its CPUs")
    usable = os.sched_getaffinity(0)
    for cpu in cpus:
        if cpu not in usable:
            names = ", ".join(map(str, sorted(usable)))
            raise InputError(f"CPU {cpu} is not one that this process may use ({names})")


def limit_torch() -> None:
    """Hold torch to what was asked for, if it was imported, which only some kernels do."""
    if "torch" in sys.modules and _asked is not None:
        num_threads, cpus = _asked
        sys.modules["torch"].set_num_threads(num_threads)
        if cpus:  # before it makes its threads, which inherit that
            os.sched_setaffinity(0, cpus)


def reading_threads() -> int:
    """How many threads may read, hash and pack weights at a time."""
    return _while_reading or (1 if _asked is None else _asked[0])


@contextmanager
def beside_a_reader(*, others_wait: bool = False) -> Iterator[None]:
    """Leave one of several threads meanwhile to whoever reads and hashes what is packed.

    Else one that packs would wait for another, whose core the reader has. And let this thread, and
    those that it makes, run on each CPU that was asked for: on the first alone they take turns.
    `others_wait`: what this does they need too, so unless CPUs were asked for it takes all.
    """
    global _while_reading  # noqa: PLW0603 - as `_asked` is
    native = _native_threads()
    asked, cpus = (1, ()) if _asked is None else _asked
    usable = 1 if native is None else min(_num_cpus(), native.MAX_THREADS)
    num_threads = max(asked, usable) if others_wait and not cpus else asked
    _while_reading = num_threads
    if native is not None and num_threads > 1:
        native.set_num_threads(num_threads - 1, *cpus[:-1])
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        _while_reading = None
        if native is not None and num_threads > 1:
            native.set_num_threads(asked, *cpus)
        if cpus and "torch" not in sys.modules:  # whose threads are yet to inherit this one's
            os.sched_setaffinity(0, cpus[:1])


@contextmanager
def all_cpus() -> Iterator[None]:
    """Compute with a thread for each CPU meanwhile: for when nobody else of this machine can.

    Not where CPUs were asked for, which are all that there are to this process.
    """
    native = _native_threads()
    num_threads, cpus = (1, ()) if _asked is None else _asked
    usable = min(_num_cpus(), 1 if native is None else native.MAX_THREADS)
    if native is None or cpus or usable <= num_threads:
        yield
        return
    native.set_num_threads(usable)
    try:
        yield
    finally:
        native.set_num_threads(num_threads)


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def return_large_blocks() -> None:
    """Have the system get large blocks back when they are freed, where this C library is glibc.

    By default it keeps all below a size that grows with the largest block that was ever freed, up
    to 32 MiB; a stage frees such while it loads. For kernels that keep what they compute in.
    """
    _tune_malloc(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    _tune_malloc(_M_TRIM_THRESHOLD, _LARGE_BLOCK)


def return_freed_blocks() -> None:
    """Have the system get what small blocks have left free, where this C library is glibc.

    By default it gets only what lies behind the last that is in use.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def overwrite_freed_blocks() -> None:
    """Have blocks overwritten when they are freed, where this C library is glibc.

    What a step computes in for a moment would otherwise lie in this process's memory after its
    session, until somebody else is handed it. glibc leaves out what is smaller than about 1 KiB.
    """
    _tune_malloc(_M_PERTURB, 0xFF)  # what is handed out then starts as zeros


def _tune_malloc(parameter: int, value: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(parameter, value)


def free_mkl_buffers() -> None:
    """Have torch's MKL free what it copies a product's rows to, where that is its BLAS."""
    library = Path(sys.modules["torch"].__file__ or "").parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        free = getattr(ctypes.CDLL(str(library)), "mkl_serv_free_buffers", None)
        if free is not None:
            free()


def pin_blas() -> bool:
    """Hold numpy's BLAS to one thread; False where it is one we cannot govern."""
    set_blas_threads = _find_blas_setter()
    if set_blas_threads is None:
        return False
    set_blas_threads(1)
    return True


def _find_blas_setter() -> Callable[[int], None] | None:
    """Sets the threads of the OpenBLAS that numpy has loaded; None if it is another BLAS."""
    assert np.__version__  # importing numpy is what maps the library
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "openblas" in line}
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        for name in _SETTERS:
            setter = getattr(library, name, None)
            if setter is not None:
                setter.argtypes, setter.restype = [ctypes.c_int], None
                return lambda num_threads, call=setter: call(num_threads)  # type: ignore[misc]
    return None
