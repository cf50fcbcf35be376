"""What smaller activations between stages cost: in quality, in bytes and in time.

Real text is read by a model in three stages, once per wire format, and every position's prediction
is compared with the float32 wire's. `I8 plain` is what int8 would be without the rotation.
With --rotated the weights have a secret rotation in them and the ends are held outside of the
stages, so that rows travel twice more, from the embedding and to the head; the float32 wire of
plain stages is still what counts. Predictions are compared as the leakage cards compare them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter_ns

import numpy as np
from command_line import Parser, run_main, whole
from rich.console import Console
from rich.table import Table

from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.registry import CODECS, make_codec
from pipeline.codecs.rotated_int8 import RotatedInt8
from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.engine.tokenizer import Tokenizer
from pipeline.kernels.runtime import set_num_threads
from pipeline.leakage.next_tokens import log_softmax
from pipeline.leakage.utility import compare_logits
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import ModelShard, load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.protocol.batch import Segment

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (ROOT / "README.md", ROOT / "SECURITY.md")
WINDOW, NUM_STAGES = 256, 3
SECRET = bytes(32)  # any is as good, and the figures are the same again
# What --check allows of int8.
MAX_KL, MIN_AGREEMENT = 0.002, 0.98


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


@dataclass(frozen=True)
class Model:
    """A model in stages; `ends` hold embedding and head where those do not."""

    stages: Sequence[ModelShard]
    ends: ModelShard | None = None


def logits_of(model: Model, codec: ActivationCodec, ids: Sequence[int]) -> np.ndarray:
    """[positions, vocab] of one window, activations through `codec` wherever they travel."""
    segments, rows = (Segment(0, 0, len(ids)),), np.array(ids)
    head = model.ends or model.stages[-1]
    to_host = head.kernels.to_host

    def travel(hidden):
        return np.array(codec.decode(codec.encode(*to_host(hidden))))

    if model.ends is not None:
        rows = travel(model.ends.embed(rows, segments))
    for shard in model.stages:
        hidden = shard.forward(rows, segments, shard.new_cache(1, len(ids)))
        if shard is not head:
            rows = travel(hidden)
    (logits,) = to_host(head.logits(hidden if model.ends is None else head.kernels.to_device(rows)))
    return logits


def lap_us(work: Callable[[], object], repeats: int) -> float:
    laps = []
    for _ in range(repeats):
        started = perf_counter_ns()
        work()
        laps.append(perf_counter_ns() - started)
    return median(laps) / 1e3


def measure(model: Model, codec: ActivationCodec, windows, references) -> Figures:
    losses: list[float] = []

    def pairs():
        for ids, reference in zip(windows, references, strict=True):
            found = logits_of(model, codec, ids)
            logs = log_softmax(found.astype(np.float64))
            losses.extend(-logs[np.arange(len(ids) - 1), ids[1:]])
            yield reference, found

    utility = compare_logits(pairs())
    hidden_dim = model.stages[0].config.hidden_dim
    normal = np.random.default_rng(0).standard_normal
    one, many = (normal((count, hidden_dim), np.float32) for count in (1, 512))
    hop = lambda rows: codec.decode(codec.encode(rows))  # noqa: E731
    return Figures(
        kl=utility.kl,
        agreement=utility.greedy_agreement,
        perplexity=float(np.exp(np.mean(losses))),
        bytes_per_token=sum(tensor.spec.nbytes for tensor in codec.encode(one)),
        one_row_us=lap_us(lambda: hop(one), 1000),
        per_row_us=lap_us(lambda: hop(many), 20) / 512,
    )


def load_plain(model_dir: Path) -> Model:
    config = load_config(model_dir)
    stages = plan(model_dir, PlanOptions(NUM_STAGES)).stages
    return Model(
        [
            load_shard(model_dir, config, s.layer_start, s.layer_end, expected_hashes=None)
            for s in stages
        ]
    )


@contextmanager
def rotated(model_dir: Path) -> Iterator[Model]:
    """The model in rotated shards, which take its size in float32 of disk meanwhile."""
    manifest = plan(model_dir, PlanOptions(NUM_STAGES, split="client"))
    rotation = SecretRotation(SECRET, manifest.activation_spec.hidden_dim)
    with TemporaryDirectory() as directory:
        root = Path(directory) / "shards"
        stages = cut_model(manifest, model_dir, root, rotation=rotation).stages
        config = load_config(root / "client")
        yield Model(
            [
                load_shard(
                    root / f"stage{s.stage_idx}", config, s.layer_start, s.layer_end,
                    ends=NO_ENDS, expected_hashes=None,
                )
                for s in stages
            ],
            load_shard(root / "client", config, 0, 0, ends=BOTH_ENDS, expected_hashes=None),
        )  # fmt: skip


def compare(args: argparse.Namespace) -> dict[str, Figures]:
    plain = load_plain(args.model_dir)
    tokenizer = Tokenizer(args.model_dir / "tokenizer.json")
    text = "\n".join(path.read_text() for path in args.text)
    ids = tokenizer.encode(text)[: args.windows * WINDOW]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    found = codecs(plain.stages[0].config.hidden_dim)
    references = [logits_of(plain, found["F32"], window) for window in windows]
    with rotated(args.model_dir) if args.rotated else nullcontext(plain) as model:
        return {name: measure(model, codec, windows, references) for name, codec in found.items()}


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
    parser.add_argument("--rotated", action="store_true", help="of rotated shards")
    parser.add_argument("--check", action="store_true", help="exit 1 where int8 loses too much")
    args = parser.parse_args()
    set_num_threads(1)
    figures = compare(args)
    Console(width=None if sys.stdout.isatty() else 120).print(table(figures))
    int8 = figures["I8"]
    if args.check and (int8.kl > MAX_KL or int8.agreement < MIN_AGREEMENT):
        raise SystemExit(f"bench_wire: int8 loses too much: KL {int8.kl}, {int8.agreement}")


if __name__ == "__main__":
    run_main("bench_wire", main)
