"""Whether hidden messages can be told from sampling, and what they cost.

Every token that a codec chooses becomes a number between 0 and 1 by the randomised probability
integral transform: uniform if, and only if, the token fell by its probability. Kolmogorov and
Smirnov's test compares all of them with uniform. A sampler that is off by 1 % in total variation
must fail the same test. Half of the messages are zeros under keys of their own, half are random
bytes under a key that everybody knows.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from command_line import Parser, positive, run_main, whole
from quality import windows

from pipeline.errors import InputError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.protocol.batch import Segment
from pipeline.sampling.draw import final
from pipeline.sampling.params import SamplingParams
from pipeline.stego.codec import StegoCodec
from pipeline.stego.codecs import parse_codec
from pipeline.stego.token_weights import TokenWeights, token_weights

ROOT = Path(__file__).resolve().parent.parent
NUM_BYTES = 48
NUM_READ = 200  # messages
KNOWN_KEY = bytes(32)
REJECTED = 1e-3  # p values below are no accident: one run of a thousand fails by chance
ERROR = 0.01  # total variation of the sampler that has to fail
POWER_STEPS, POWER_RUNS, POWER_LEVEL = 40_000, 100, 0.05


@dataclass
class Context:
    """A recorded distribution; `ends` are sums of the shares with those of about a half in front."""

    weights: TokenWeights
    order: np.ndarray = field(init=False)
    shares: np.ndarray = field(init=False)
    ends: np.ndarray = field(init=False)
    num_ahead: int = field(init=False)
    entropy: float = field(init=False)

    def __post_init__(self) -> None:
        weights = self.weights.weights
        self.order = np.argsort(-weights.astype(np.float64), kind="stable")
        self.shares = weights[self.order] / self.weights.total
        self.ends = np.cumsum(self.shares)
        self.num_ahead = max(int(np.searchsorted(self.ends, 0.5, side="right")), 1)
        self.entropy = float(-(self.shares * np.log2(self.shares)).sum())

    def transformed(self, places: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """The tokens at these places of `order`, each as a point of its part of 0 to 1."""
        return self.ends[places] - self.shares[places] * uniforms

    def sampled(self, uniforms: np.ndarray, error: float) -> np.ndarray:
        """Places drawn with so much probability moved to the likely half from the others."""
        half = self.ends[self.num_ahead - 1]
        moved = min(error, max(1 - half, 0.0))
        bound = half + moved
        stretched = np.where(
            uniforms < bound,
            uniforms * half / bound,
            half + (uniforms - bound) * (1 - half) / max(1 - bound, 1e-300),
        )
        places = np.searchsorted(self.ends, stretched, side="right")
        return np.minimum(places, self.ends.size - 1)


@dataclass
class Record:
    """What a codec did: which token at which context, and what the messages took."""

    contexts: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    seconds_to_choose: list[float] = field(default_factory=list)
    seconds_to_observe: list[float] = field(default_factory=list)


def p_value(points: np.ndarray) -> float:
    """Kolmogorov and Smirnov's, of points against uniform (Numerical Recipes, 14.3)."""
    ordered, count = np.sort(points), points.size
    ranks = np.arange(count + 1) / count
    distance = max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max())
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    if scaled < 0.2:
        return 1.0
    signs = ((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(2 * sum(signs), 1.0)


def write_messages(
    codec: StegoCodec, contexts: list[Context], steps: int, random: Random
) -> Record:
    """So many tokens of message after message, and one beyond each; the first are read as well."""
    record = Record()
    while len(record.indices) < steps:
        is_keyed = len(record.rates) % 2 == 0
        payload = bytes(NUM_BYTES) if is_keyed else random.randbytes(NUM_BYTES)
        key = random.randbytes(32) if is_keyed else KNOWN_KEY
        writer = codec.writer(payload, key)
        reader = codec.reader(NUM_BYTES, key) if len(record.rates) < NUM_READ else None
        entropy, length = 0.0, 0
        while not writer.is_certain:
            entropy += _step(writer, reader, contexts, random, record)
            length += 1
        if reader and reader.payload() != payload:
            raise SystemExit(f"stego_statistics: {codec.name} lost a message")
        record.rates.append(8 * NUM_BYTES / entropy)
        record.lengths.append(length)
        _step(writer, None, contexts, random, record)
    return record


def _step(writer, reader, contexts, random, record) -> float:
    which = random.randrange(len(contexts))
    weights = contexts[which].weights
    started = time.thread_time()
    index = writer.choose(weights)
    chosen = time.thread_time()
    if reader:
        reader.observe(weights, index)
        record.seconds_to_choose.append(chosen - started)
        record.seconds_to_observe.append(time.thread_time() - chosen)
    record.contexts.append(which)
    record.indices.append(index)
    return contexts[which].entropy


def _by_context(which: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    order = np.argsort(which, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
        yield int(which[part[0]]), part


def points_of(record: Record, contexts: list[Context], random: np.random.Generator) -> np.ndarray:
    """The transform of all tokens of a codec."""
    indices = np.array(record.indices)
    points = np.empty(indices.size)
    for which, part in _by_context(np.array(record.contexts)):
        context = contexts[which]
        places = np.empty_like(context.order)
        places[context.order] = np.arange(places.size)
        points[part] = context.transformed(places[indices[part]], random.random(part.size))
    return points


def sampled_points(
    contexts: list[Context], steps: int, random: np.random.Generator, error: float
) -> np.ndarray:
    """The transform of tokens of an ordinary sampler that is off by `error`."""
    points = np.empty(steps)
    for which, part in _by_context(random.integers(len(contexts), size=steps)):
        places = contexts[which].sampled(random.random(part.size), error)
        points[part] = contexts[which].transformed(places, random.random(part.size))
    return points


def power(contexts: list[Context], random: np.random.Generator) -> float:
    """How often POWER_STEPS tokens of a sampler that is off tell, at level POWER_LEVEL."""
    found = (sampled_points(contexts, POWER_STEPS, random, ERROR) for _ in range(POWER_RUNS))
    return sum(p_value(points) < POWER_LEVEL for points in found) / POWER_RUNS


def contexts_of(logits: np.ndarray, params: SamplingParams) -> list[Context]:
    return [Context(token_weights(final(row, params))) for row in logits]


def synthetic_logits(count: int, vocab_size: int, seed: int) -> np.ndarray:
    """Rows of all entropies, as models have them: one sharp word, another anything."""
    random = np.random.default_rng(seed)
    spreads = random.uniform(1, 6, (count, 1))
    return (random.standard_normal((count, vocab_size)) * spreads).astype(np.float32)


def record_logits(model_dir: Path, count: int, path: Path) -> None:
    """A model's logits at places spread evenly over a real text."""
    config = load_config(model_dir)
    shard = load_shard(model_dir, config, 0, config.num_layers, expected_hashes=None)
    rows = []
    for ids in windows(model_dir, 8 * count):
        cache = shard.new_cache(1, len(ids))
        hidden = shard.forward(ids.numpy(), [Segment(0, 0, len(ids))], cache)
        (logits,) = shard.kernels.to_host(shard.logits(hidden[list(range(7, len(ids), 8))]))
        rows.append(np.asarray(logits, np.float32))
    np.savez(path, logits=np.concatenate(rows)[:count])


def load_logits(path: Path) -> np.ndarray:
    try:
        with np.load(path) as arrays:
            logits = arrays["logits"]
    except (KeyError, ValueError):
        raise InputError(f"{path}: not a file of --record") from None
    return logits


def report(name: str, record: Record, p: float) -> None:
    choose, observe = (
        1e6 * float(np.median(seconds))
        for seconds in (record.seconds_to_choose, record.seconds_to_observe)
    )
    print(
        f"| {name} | {len(record.indices)} | {p:.3g} | {np.mean(record.rates):.1%} "
        f"| {np.mean(record.lengths) / NUM_BYTES:.2f} | {choose:.0f} | {observe:.0f} |",
        flush=True,
    )


def main() -> int:
    parser = Parser(prog="stego_statistics", description=__doc__)
    parser.add_argument("--record", type=Path, help="write a model's logits to this file, and end")
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument(
        "--contexts", type=whole(1), default=2000, help="how many to record or test"
    )
    parser.add_argument("--logits", type=Path, help="a file of --record; without, made-up ones")
    parser.add_argument("--steps", type=whole(1000), default=1_000_000)
    parser.add_argument("--top-k", type=whole(0), default=50, help="0 for the full vocabulary")
    parser.add_argument("--temperature", type=positive, default=1.0)
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("codecs", nargs="*", default=["range", "fimec"], metavar="CODEC")
    arguments = parser.parse_args()
    if arguments.record:
        record_logits(arguments.model_dir, arguments.contexts, arguments.record)
        return 0
    return test(arguments)


def test(arguments: argparse.Namespace) -> int:
    codecs = {name: parse_codec(name) for name in arguments.codecs}
    params = SamplingParams(temperature=arguments.temperature, top_k=arguments.top_k)
    found = load_logits(arguments.logits) if arguments.logits else synthetic_logits(500, 5000, 1)
    contexts = contexts_of(found[: arguments.contexts], params)
    random = np.random.default_rng(arguments.seed)
    mean = np.mean([context.entropy for context in contexts])
    print(f"{len(contexts)} distributions, top-k {arguments.top_k}, {mean:.2f} bits on average\n")
    print("| codec | steps | p | rate | tokens/byte | us to choose | us to observe |")
    print("|---|---|---|---|---|---|---|")
    failed = []
    for name, codec in codecs.items():
        record = write_messages(codec, contexts, arguments.steps, Random(arguments.seed))
        p = p_value(points_of(record, contexts, random))
        report(name, record, p)
        if p < REJECTED:
            failed.append(f"{name} is told from sampling")
    for name, error in (("sampling", 0.0), ("sampling, 1 % off", ERROR)):
        p = p_value(sampled_points(contexts, arguments.steps, random, error))
        print(f"| {name} | {arguments.steps} | {p:.3g} | | | | |")
        if (p < REJECTED) != (error > 0):
            failed.append(f"{name} is judged wrongly")
    share = power(contexts, random)
    print(f"\n{share:.0%} of {POWER_STEPS} steps that are 1 % off are told, p < {POWER_LEVEL}")
    for failure in failed:
        print(f"FAILED: {failure}")
    return bool(failed)


if __name__ == "__main__":
    run_main("stego_statistics", main)
