"""Once a session is over, nothing that it computed is left in a stage's memory."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.step_executor import StageCore
from tests.pipeline.memory import BYTES, process

# Two stages of one process, told by lines what to do; it holds nothing of its own that is computed.
PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.pipeline.stage.test_wipe import make_cores, run_session
cores = make_cores(Path(sys.argv[2]), *sys.argv[3:6])
print("loaded", flush=True)
for line in sys.stdin:
    if line == "run\\n":
        run_session(cores)
    elif line == "release\\n":
        while cores:
            cores.pop().release()
    print("done", flush=True)
"""
PROMPT = 70


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose every row takes more than 1 KiB: below, glibc does not overwrite."""
    # Not at once: what the process imports is looked through as well.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=320,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_cores(model_dir, kernels, dtype, wire):
    config = load_config(model_dir)
    limits = SessionLimits(4, 128, 100, make_codec(wire, config.hidden_dim))
    cores = []
    for start, end in ((0, 2), (2, 4)):
        shard = load_shard(
            model_dir, config, start, end, kernels=kernels, dtype=dtype, expected_hashes=None
        )
        log = None if shard.is_last else ActivationLog(4, 128, config.hidden_dim)
        cores.append(StageCore(shard, limits, log))
    return cores


def run_session(cores):
    """A prompt, steps of one and of three requests, of which one wants its logits."""
    steps = [((Segment(0, 0, PROMPT),), Want.TOKEN)]
    steps += [((Segment(0, PROMPT + at, 1),), Want.TOKEN) for at in range(3)]
    steps += [((Segment(1, 0, 9), Segment(2, 0, 5)), Want.LOGITS)]
    steps += [
        (
            (Segment(0, PROMPT + 3 + at, 1), Segment(2, 5 + at, 1), Segment(1, 9 + at, 1)),
            Want.LOGITS,
        )
        for at in range(3)
    ]
    for number, (segments, want) in enumerate(steps):
        header = StepHeader(StepKind.STEP, number, segments, (want,) * len(segments), ())
        ids = np.arange(header.num_tokens) * 7 % 250 + number
        tensors = (token_ids_to_wire(ids.astype(np.uint32)),)
        for core in cores:
            tensors = core.step(header, tensors)
            core.keep()


def patterns(cores):
    """Pieces of all that a session leaves where it computes: of each array some, by its name."""
    found = {}
    for index, core in enumerate(cores):
        shard = core.shard
        arrays = {f"room {at}": each for at, each in enumerate(shard._room._buffers)}
        arrays["logits"] = shard._logits
        arrays |= {f"keys {at}": each[0] for at, each in enumerate(core.cache.keys)}
        arrays |= {f"values {at}": each[0] for at, each in enumerate(core.cache.values)}
        if core.log is not None:
            arrays["log"] = core.log._rows[0, :PROMPT]
        for name, array in arrays.items():
            flat = np.ascontiguousarray(array).view(np.uint8).reshape(-1, BYTES)
            used = flat[flat.reshape(-1, BYTES // 4, 4).any(axis=2).all(axis=1)]
            for at in np.linspace(0, len(used) - 1, 25).astype(int) if len(used) else ():
                found[used[at].tobytes()] = f"stage {index}: {name}"
    return found


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("kernels", "dtype", "wire"),
    [
        ("native", "float32", "F32"),
        ("native", "bfloat16", "BF16"),
        ("native", "int8", "I8"),
        ("torch", "float32", "F32"),
    ],
)
def test_nothing_of_a_session_is_left_in_memory(model, kernels, dtype, wire):
    if kernels == "native" and (why := why_not_native()):
        pytest.skip(f"no native kernels: {why}")
    arguments = (model, kernels, dtype, wire)
    cores = make_cores(*arguments)
    run_session(cores)
    wanted = patterns(cores)
    with process(PROCESS, Path(__file__).parents[3], *arguments) as stages:
        for pattern in stages.search(wanted):  # of what was in memory before any step
            del wanted[pattern]
        stages.tell("run")
        assert len(set(stages.search(wanted).values())) > 10
        stages.tell("release")
        assert set(stages.search(wanted).values()) == set()
