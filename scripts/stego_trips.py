"""Round trips of messages through text: how many are exact, and what they take.

    python scripts/stego_trips.py --model-dir models/smollm2 --trips 200

Texts are written over stages in this process, several side by side, and read over another number
of stages, with another number of threads and in other batches. Rates by fixed accounting: the bits
of header and message over the entropy of ALL tokens, tail included. The last line says how many
trips were exact; the exit code is 1 unless all were.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.limits import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import PipelineError
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.step_executor import StageCore
from pipeline.stego.fingerprint import Fingerprint, Settings
from pipeline.stego.keys import Secret
from pipeline.stego.message import HEADER_BYTES
from pipeline.stego.retokenise import CoverTokenizer
from pipeline.stego.service import StegoService, Task
from pipeline.tasks import open_tasks

PROMPTS = (
    "The history of the old harbour town begins",
    "My favourite season is",
    "Dear Anna,\n\nthank you for your letter.",
    "The recipe is simple. First,",
    "Scientists have long wondered why",
)


class Yielding(LocalPipeline):
    """Lets others run at every step, as a remote pipeline does."""

    async def receive(self):
        await trio.lowlevel.checkpoint()
        return await super().receive()


class Trip:
    def __init__(self, message, settings, prompt, secret):
        self.message, self.settings, self.prompt, self.secret = message, settings, prompt, secret
        self.text = self.statistics = self.error = self.found = None

    def task(self, tokenizer):
        return Task(
            prompt_ids=tokenizer.encode(self.prompt), secret=self.secret, settings=self.settings
        )


class Model:
    def __init__(self, arguments):
        self.directory, self.dtype = arguments.model_dir, arguments.dtype
        self.config = load_config(self.directory)
        self.tokenizer = Tokenizer(self.directory / "tokenizer.json")
        self.context = arguments.context

    def service(self, num_stages, num_slots, chunk_tokens):
        """An engine over stages of about equal size, and the service before it."""
        limits = Limits(num_slots, self.context, chunk_tokens, num_stages)
        session = limits.for_session(make_codec("F32", self.config.hidden_dim))
        num_layers = self.config.num_layers
        bounds = [num_layers * i // num_stages for i in range(num_stages + 1)]
        cores = []
        for start, end in pairwise(bounds):
            shard = load_shard(
                self.directory, self.config, start, end, dtype=self.dtype, expected_hashes=None
            )
            log = ActivationLog(num_slots, self.context, self.config.hidden_dim)
            cores.append(StageCore(shard, session, log if end < num_layers else None))
        engine = PipelineEngine(limits)
        fingerprint = Fingerprint(precision=self.dtype, kernels=shard.kernels.name)
        service = StegoService(
            engine, CoverTokenizer(self.tokenizer), fingerprint, is_row_exact=shard.is_row_exact
        )
        return engine, Yielding(cores), service


async def side_by_side(model, trips, num_stages, num_slots, chunk_tokens, step):
    """Do `step` for every trip, as many at once as there are slots; a line now and then."""
    engine, pipeline, service = model.service(num_stages, num_slots, chunk_tokens)
    waiting, num_done = iter(trips), 0

    async def work():
        nonlocal num_done
        for trip in waiting:
            try:
                await step(service, trip)
            except PipelineError as error:
                trip.error = str(error)
            num_done += 1
            if num_done % 20 == 0:
                print(f"  {num_done}/{len(trips)}", file=sys.stderr)

    async with open_tasks() as tasks:
        tasks.start_soon(engine.run, pipeline)
        async with trio.open_nursery() as workers:
            for _ in range(num_slots):
                workers.start_soon(work)
        tasks.cancel_scope.cancel()


async def run(arguments):
    rng = random.Random(arguments.seed)
    model = Model(arguments)
    secret = Secret(os.urandom(32))
    kinds = [(codec, top_k) for codec in arguments.codec for top_k in arguments.top_k]
    trips = []
    for i in range(arguments.trips):
        codec, top_k = kinds[i % len(kinds)]
        size = arguments.bytes or rng.randint(1, 64)
        settings = Settings(codec=codec, top_k=top_k)
        trips.append(Trip(os.urandom(size), settings, PROMPTS[i % len(PROMPTS)], secret))

    async def hide(service, trip):
        hidden = await service.hide(trip.message, trip.task(model.tokenizer), compresses=False)
        trip.text, trip.statistics = hidden.text, hidden.statistics

    async def find(service, trip):
        trip.found = (await service.find(trip.text, trip.task(model.tokenizer))).message

    started = time.perf_counter()
    set_num_threads(1)
    await side_by_side(model, trips, 1, arguments.batch, 128, hide)
    print(f"written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    started = time.perf_counter()
    set_num_threads(2)
    written = [trip for trip in trips if trip.text is not None]
    rng.shuffle(written)
    await side_by_side(model, written, 3, max(1, arguments.batch // 2 - 1), 32, find)
    print(f"read in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return trips


def body_share(statistics):
    """The share of the body's tokens' entropy that carries it: header and tail left out.

    The token that ends the header is the header's, the one that ends the body is the body's.
    """
    carried = entropy = 0.0
    header_bits, all_bits = 8 * HEADER_BYTES, statistics.num_bits
    for step in statistics.steps:
        if header_bits - 1e-6 <= carried < all_bits - 1e-6:
            entropy += step.entropy
        carried += step.carried
    return (all_bits - header_bits), entropy


def report(trips):
    groups = defaultdict(list)
    for trip in trips:
        groups[trip.settings.codec, trip.settings.top_k].append(trip)
    rows = []
    for (codec, top_k), group in sorted(groups.items()):
        done = [trip for trip in group if trip.statistics is not None]
        bits = sum(trip.statistics.num_bits for trip in done)
        entropy = sum(trip.statistics.entropy for trip in done)
        bodies = [body_share(trip.statistics) for trip in done]
        num_tokens = sum(len(trip.statistics.steps) for trip in done)
        rows.append({
            "codec": codec,
            "top_k": top_k,
            "trips": len(group),
            "exact": sum(trip.found == trip.message for trip in group),
            "rate_all": round(bits / entropy, 4),
            "rate_body": round(sum(b for b, _ in bodies) / sum(e for _, e in bodies), 4),
            "bits_per_token": round(bits / num_tokens, 3),
            "entropy_per_token": round(entropy / num_tokens, 3),
            "tokens_per_byte": round(num_tokens / sum(len(t.message) for t in done), 2),
            "retries": sum(trip.statistics.num_retries for trip in done),
        })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--trips", type=int, default=200)
    parser.add_argument("--bytes", type=int, help="of every message [1 to 64]")
    parser.add_argument("--batch", type=int, default=16, help="texts written side by side")
    parser.add_argument("--codec", nargs="+", default=["range", "fimec"])
    parser.add_argument("--top-k", nargs="+", type=int, default=[50, 0])
    parser.add_argument("--dtype", default="int8", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0, help="of sizes and order")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    trips = trio.run(run, arguments)
    rows = report(trips)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    for trip in trips:
        if trip.error:
            print(
                f"{trip.settings.codec} k={trip.settings.top_k} {len(trip.message)} bytes: {trip.error}"
            )
    num_exact = sum(trip.found == trip.message for trip in trips)
    print(f"{num_exact} of {len(trips)} exact")
    return 0 if num_exact == len(trips) else 1


if __name__ == "__main__":
    sys.exit(main())
