"""Whatever is changed of a GGUF file or of packed weights gives promised errors only."""

import contextlib
import random
import sys
from pathlib import Path

import pytest

from pipeline.gguf.header import CorruptGguf
from pipeline.weights.checkpoint_header import CorruptHeader
from pipeline.weights.packings.base import CorruptPacking

SCRIPTS = Path(__file__).parents[3] / "scripts"
PROMISED = (CorruptGguf, CorruptHeader, CorruptPacking)
WORDS = [value.to_bytes(8, "little") for value in (0, 1, 8, 1 << 31, 1 << 62, (1 << 64) - 1)]


@pytest.fixture
def decoders(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import fuzz_checkpoints

    yield {
        "gguf": (fuzz_checkpoints.decode_gguf, fuzz_checkpoints.gguf_seeds()),
        **{
            name: (fuzz_checkpoints.decode_packed, fuzz_checkpoints.packed_seeds(name))
            for name in fuzz_checkpoints.PACKED
        },
    }
    del sys.modules["fuzz_checkpoints"]


def changed(seed: bytes, draw: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        match draw.randrange(5):
            case 0:
                data[at : at + 1] = draw.randbytes(1)
            case 1:
                data[at : at + 8] = draw.choice(WORDS)
            case 2:
                data[at : at + draw.randint(1, 16)] = b"?"
            case 3:
                data[at:at] = data[draw.randrange(len(data)) :][: draw.randint(1, 40)]
            case _:
                data[at : at + 1] = draw.choice(b'0123456789[]{}",-e').to_bytes(1, "little")
    return bytes(data)


@pytest.mark.parametrize("name", ["gguf", "awq", "gptq", "compressed-tensors", "mxfp4", "blocks"])
def test_only_promised_errors_come_of_any_bytes(decoders, name):
    decode, seeds = decoders[name]
    for seed in seeds:
        decode(seed)  # genuine: raises nothing
    draw = random.Random(11)
    for _ in range(1000):
        with contextlib.suppress(*PROMISED):
            decode(changed(draw.choice(seeds), draw))
