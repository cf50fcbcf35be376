"""What smaller activations between stages cost: in quality, in bytes and in time.

Real text is read by a model in three stages, once per wire format, and every position's prediction
is compared with the float32 wire's. `I8 plain` is what int8 would be without the rotation.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import numpy as np
import torch
from command_line import Parser, run_main, whole
from rich.console import Console
from rich.table import Table

from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.registry import CODECS, make_codec
from pipeline.codecs.rotated_int8 import RotatedInt8
from pipeline.engine.tokenizer import Tokenizer
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.models.registry import ModelShard, load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.batch import Segment

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (ROOT / "README.md", ROOT / "SECURITY.md")
WINDOW, NUM_STAGES = 256, 3


class Unrotated:
    """The rotation that does nothing."""

    def apply(self, rows: np.ndarray) -> np.ndarray:
        return rows.copy()

    undo = apply


class PlainInt8(RotatedInt8):
    """Int8 as it would be without the rotation."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim)
        self._rotation = Unrotated()


@dataclass(frozen=True)
class Figures:
    kl: float
    agreement: float
    perplexity: float
    bytes_per_token: int
    one_row_us: float
    per_row_us: float


def codecs(hidden_dim: int) -> dict[str, ActivationCodec]:
    found = {name: make_codec(name, hidden_dim) for name in CODECS}
    return {**found, "I8 plain": PlainInt8(hidden_dim)}


def log_probabilities(shards: list[ModelShard], codec: ActivationCodec, ids: torch.Tensor):
    """[positions, vocab] of one window, activations through `codec` between the shards."""
    segments, rows = (Segment(0, 0, len(ids)),), ids.numpy()
    for shard in shards:
        hidden = shard.forward(rows, segments, shard.new_cache(1, len(ids)))
        if not shard.is_last:
            rows = codec.decode(codec.encode(*shard.kernels.to_host(hidden)))
    (logits,) = shards[-1].kernels.to_host(shards[-1].logits(hidden))
    return torch.from_numpy(logits).log_softmax(dim=-1)


def lap_us(work: Callable[[], object], repeats: int) -> float:
    laps = []
    for _ in range(repeats):
        started = perf_counter_ns()
        work()
        laps.append(perf_counter_ns() - started)
    return median(laps) / 1e3


def measure(shards, codec, windows, references) -> Figures:
    kl, same, loss, count = 0.0, 0, 0.0, 0
    for ids, reference in zip(windows, references, strict=True):
        found = log_probabilities(shards, codec, ids)
        kl += float((reference.exp() * (reference - found)).sum())
        same += int((reference.argmax(dim=-1) == found.argmax(dim=-1)).sum())
        loss -= float(found[:-1].gather(1, ids[1:, None]).sum())
        count += len(ids)
    hidden_dim = shards[0].config.hidden_dim
    normal = np.random.default_rng(0).standard_normal
    one, many = (normal((count, hidden_dim), np.float32) for count in (1, 512))
    hop = lambda rows: codec.decode(codec.encode(rows))  # noqa: E731
    return Figures(
        kl=kl / count,
        agreement=same / count,
        perplexity=float(np.exp(loss / (count - len(windows)))),
        bytes_per_token=sum(tensor.spec.nbytes for tensor in codec.encode(one)),
        one_row_us=lap_us(lambda: hop(one), 1000),
        per_row_us=lap_us(lambda: hop(many), 20) / 512,
    )


def compare(args: argparse.Namespace) -> dict[str, Figures]:
    config = load_config(args.model_dir)
    manifest = plan(args.model_dir, PlanOptions(NUM_STAGES))
    shards = [
        load_shard(args.model_dir, config, s.layer_start, s.layer_end, expected_hashes=None)
        for s in manifest.stages
    ]
    tokenizer = Tokenizer(args.model_dir / "tokenizer.json")
    text = "\n".join(path.read_text() for path in args.text)
    ids = torch.tensor(tokenizer.encode(text))
    windows = list(ids[: args.windows * WINDOW].split(WINDOW))
    found = codecs(config.hidden_dim)
    references = [log_probabilities(shards, found["F32"], window) for window in windows]
    return {name: measure(shards, codec, windows, references) for name, codec in found.items()}


def table(figures: dict[str, Figures]) -> Table:
    found = Table()
    for heading in (
        "wire", "bytes/token", "KL to F32", "same greedy token", "perplexity",
        "one row, us", "us a row of 512",
    ):  # fmt: skip
        found.add_column(heading, justify="right")
    for name, each in figures.items():
        found.add_row(
            name,
            str(each.bytes_per_token),
            f"{each.kl:.2e}",
            f"{100 * each.agreement:.1f} %",
            f"{each.perplexity:.2f}",
            f"{each.one_row_us:.0f}",
            f"{each.per_row_us:.2f}",
        )
    return found


def main() -> None:
    parser = Parser(prog="bench_wire", description=__doc__)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--windows", type=whole(1), default=12, help=f"of {WINDOW} tokens")
    args = parser.parse_args()
    set_num_threads(1)
    Console(width=None if sys.stdout.isatty() else 120).print(table(compare(args)))


if __name__ == "__main__":
    run_main("bench_wire", main)
