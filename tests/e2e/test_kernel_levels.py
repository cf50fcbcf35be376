"""Instructions that are forced on workers compute, and the text is the same whichever they are."""

import json
import subprocess
import sys

import pytest

from pipeline.kernels.kernel_selection import why_not_native

# A worker that says, when it ends, at which level it has computed.
WORKER = """
import atexit, sys
from pipeline.cli import entry
from pipeline.kernels import _native

atexit.register(lambda: print("level:", _native.features()[0], file=sys.stderr))
entry.stage_worker()
"""


def levels():
    if why_not_native() is not None:
        return []
    from pipeline.kernels import _native

    return [level for level in _native.levels() if why_not_native(level) is None]


@pytest.fixture
def generate(cluster):
    """Tokens of two stages at a level, and the levels at which their workers say they computed."""

    def generate(level):
        cluster.plan(2, precision="int4")
        for idx in range(2):
            cluster.workers[idx] = subprocess.Popen(
                [
                    sys.executable, "-c", WORKER, "--manifest", cluster.manifest, "--stage-idx",
                    str(idx), "--model-dir", cluster.model_dir, "--dev", "--once",
                    "--kernels", f"native-{level}",
                ],
                stderr=subprocess.PIPE, text=True, env=cluster.environment,
            )  # fmt: skip
        out = cluster.directory / "latency.json"
        text = ("Hello there", "--max-tokens", "20", "--ignore-eos", "--latency-out", out)
        result = cluster.orch(*text)
        assert result.returncode == 0, result.stderr
        logs = [worker.communicate(timeout=300)[1] for worker in cluster.workers.values()]
        return json.loads(out.read_text())["token_ids"], [
            log.rpartition("level:")[2].strip() for log in logs
        ]

    return generate


@pytest.mark.skipif(len(levels()) < 2, reason="this processor has one level of native kernels")
def test_a_level_that_is_forced_computes_and_gives_the_same_tokens(generate):
    best, *_, least = levels()
    tokens, at = generate(best)
    assert at == [best] * 2
    assert generate(least) == (tokens, [least] * 2)
