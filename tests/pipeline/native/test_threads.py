import subprocess
import sys

FORKS = """
import os, signal, time
from array import array
from pipeline import _native

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


def test_a_forked_child_computes_with_threads_of_its_own(native):
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
