"""What fewer bits cost: perplexity and agreement with float32 on a real text, per precision.

The text is Python's language reference as every Python carries it for `help()` (pydoc_data.topics):
prose and code, the same for everybody with this version of Python.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from command_line import Parser, run_main, whole

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.models.registry import ModelShard, load_shard
from pipeline.protocol.batch import Segment

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
WINDOW = 512  # tokens with a context of their own
# What --check allows of a checkpoint in 16 bits; int8's own figures are about a third of it.
MAX_LOSS = {"bfloat16": 0.01, "int8": 0.03, "int4": 0.1}
MIN_AGREEMENT = {"bfloat16": 0.97, "int8": 0.93, "int4": 0.85}


@dataclass
class Score:
    """Sums over the text's predictions; the reference is float32."""

    count: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0


def windows(model_dir: Path, num_tokens: int) -> list[torch.Tensor]:
    tokenizer = Tokenizer(model_dir / "tokenizer.json")
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer.encode(text[: 8 * num_tokens])[:num_tokens])
    if len(ids) < num_tokens:
        raise InputError(f"--tokens {num_tokens}: the text has {len(ids)}")
    return [each for each in ids.split(WINDOW) if len(each) > 1]


def log_probabilities(shard: ModelShard, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token after each but the last: [n - 1, vocab]."""
    cache = shard.new_cache(1, WINDOW)
    hidden = shard.forward(ids.numpy(), [Segment(0, 0, len(ids))], cache)
    (logits,) = shard.kernels.to_host(shard.logits(hidden[:-1]))
    return torch.from_numpy(logits).log_softmax(-1)


def add(score: Score, found: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> None:
    score.count += len(found)
    score.loss -= float(found.gather(1, ids[1:].unsqueeze(1)).double().sum())
    score.divergence += float((expected.exp() * (expected - found)).sum(-1).double().sum())
    score.agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Score], dict[str, int], str]:
    config = load_config(arguments.model_dir)
    shards = {
        dtype: load_shard(
            arguments.model_dir,
            config,
            0,
            config.num_layers,
            dtype=dtype,
            kernels=arguments.kernels,
            expected_hashes=None,
        )
        for dtype in PRECISIONS
    }
    scores = {dtype: Score() for dtype in PRECISIONS}
    for ids in windows(arguments.model_dir, arguments.tokens):
        expected = log_probabilities(shards["float32"], ids)
        add(scores["float32"], expected, expected, ids)
        for dtype in PRECISIONS[1:]:
            add(scores[dtype], log_probabilities(shards[dtype], ids), expected, ids)
    sizes = {dtype: shard.num_weight_bytes for dtype, shard in shards.items()}
    return scores, sizes, shards["float32"].kernels.name


def main() -> None:
    parser = Parser(prog="quality", description=__doc__)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--tokens", type=whole(2), default=8192)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=whole(1), default=1)
    parser.add_argument("--check", action="store_true", help="exit 1 where the loss is too great")
    arguments = parser.parse_args()
    set_num_threads(arguments.threads)
    scores, sizes, kernels = measure(arguments)
    count = scores["float32"].count
    python = ".".join(map(str, sys.version_info[:3]))
    print(
        f"{arguments.model_dir.resolve().name}, {kernels} kernels, {count} predictions in windows "
        f"of {WINDOW} tokens of the Python {python} language reference\n"
    )
    print("| precision | weights | perplexity | loss added | same first choice | KL |")
    print("|---|---|---|---|---|---|")
    failures = []
    for dtype, score in scores.items():
        added = (score.loss - scores["float32"].loss) / count
        agreement = score.agreed / count
        print(
            f"| {dtype} | {sizes[dtype] / 1e6:.0f} MB "
            f"| {torch.tensor(score.loss / count).exp():.3f} | {added:+.4f} "
            f"| {agreement:.2%} | {score.divergence / count:.5f} |"
        )
        if dtype in MAX_LOSS and (added > MAX_LOSS[dtype] or agreement < MIN_AGREEMENT[dtype]):
            failures.append(dtype)
    if arguments.check and failures:
        raise SystemExit(f"quality: too much is lost in {', '.join(failures)}")


if __name__ == "__main__":
    run_main("quality", main)
