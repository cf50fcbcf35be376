import subprocess
import sys

import pytest

FORKS = """
import os, signal, time
from array import array
from pipeline.kernels import _native

ROWS, SIZE = 2000, 512
x, weight = array("f", [1.5]) * (ROWS * SIZE), array("f", [1]) * SIZE
y = array("f", [0]) * (ROWS * SIZE)

def compute(times):
    for _ in range(times):
        _native.rms_norm(
            x.buffer_info()[0], weight.buffer_info()[0], y.buffer_info()[0], ROWS, SIZE, 1e-6
        )

_native.set_num_threads(2)
compute(3)
time.sleep(0.1)  # the worker waits for more
child = os.fork()
signal.alarm(30)
_native.set_num_threads(3)
for _ in range(5):
    compute(3)
    time.sleep(0.02)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""

PINNED = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own threads are not meant
from array import array
from pathlib import Path
from pipeline.kernels import _native
from pipeline.kernels.runtime import set_num_threads

cpus = sorted(os.sched_getaffinity(0))[:2]
set_num_threads(len(cpus), cpus[::-1])
ROWS, SIZE = 2000, 512
x, weight = array("f", [1.5]) * (ROWS * SIZE), array("f", [1]) * SIZE
_native.rms_norm(
    x.buffer_info()[0], weight.buffer_info()[0], x.buffer_info()[0], ROWS, SIZE, 1e-6
)
threads = sorted(int(task.name) for task in Path("/proc/self/task").iterdir())
print([sorted(os.sched_getaffinity(thread)) for thread in threads] == [[cpu] for cpu in cpus[::-1]])
"""


def test_each_thread_stays_on_a_cpu_of_its_own(native):
    done = subprocess.run(
        [sys.executable, "-c", PINNED], capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize(
    ("cpus", "what"), [((0,), "CPUs: 1"), ((0, 1024), "CPU: 1024"), ((0, -1), "negative")]
)
def test_cpus_that_do_not_fit_the_threads_are_refused(native, cpus, what):
    with pytest.raises(ValueError, match=what):
        native.set_num_threads(2, *cpus)


def test_a_forked_child_computes_with_threads_of_its_own(native):
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
