"""Measure modes with an untrusted worker or stages beside two plain stages, round by round.

Every round has each mode say as many tokens behind a context; ratios to plain two stages are taken
within a round, and medians over rounds are printed. For `scx` also what as many round trips alone
would take between two processes that compute nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from bare_trips import median_trip_ms
from bench import free_base_port, machine, measure
from command_line import Parser, run_main, unwind_on_sigterm, whole, wholes

from pipeline.agreement.manifest import Manifest, dump_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.engine.latency import LatencyLog
from pipeline.engine.limits import Limits
from pipeline.errors import SessionError
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.protocol.time_limits import TimeLimits
from transport.attestation.dev_authority import default_directory
from transport.dial_and_listen import TcpEndpoint

PLAIN = "plain, two stages"
# Stages, layers at home at each end, what another worker is asked for.
MODES: dict[str, tuple[int, tuple[int, int] | None, str | None]] = {
    PLAIN: (2, None, None),
    "scx": (1, None, "attention"),
    "scx-paper": (3, (1, 1), None),
    "offload": (1, None, "linear"),
}
BIN = Path(sys.executable).parent
Latencies = dict[tuple[str, int], list[float]]


def planned(directory: Path, model_dir: Path, name: str) -> tuple[Path, Manifest]:
    num_stages, home_layers, kind = MODES[name]
    start = 20000 + 2500 * list(MODES).index(name)  # others have not bound theirs yet
    base = free_base_port(10 * num_stages + 3, start)
    part = kind and (kind, TcpEndpoint("127.0.0.1", base + 10 * num_stages + 2), None)
    options = PlanOptions(num_stages, base_port=base, home_layers=home_layers, part=part or None)
    path = directory / f"{name.partition(',')[0]}.json"
    manifest = plan(model_dir, options)
    path.write_text(dump_manifest(manifest))
    return path, manifest


def commands(args: argparse.Namespace, path: Path, name: str, num_masks: int) -> list[list[str]]:
    """What the mode's processes are started by; masks are made first."""
    num_stages, _, kind = MODES[name]
    common = ["--manifest", str(path), "--dev"]
    own = [*common, "--model-dir", str(args.model_dir), "--threads", str(args.threads)]
    masks = []
    if kind == "linear":
        masks = ["--masks", str(path.with_suffix(".masks"))]
        subprocess.run(
            [BIN / "pipeline-orch", "masks", "make", *common[:2], *own[3:5],
             "--tokens", str(num_masks), "-o", masks[1]], check=True,
        )  # fmt: skip
    worker = str(BIN / "stage-worker")
    found = [[worker, *own, "--stage-idx", str(idx), *masks] for idx in range(num_stages)]
    if kind is not None:
        found.append([worker, kind, *(own if kind == "linear" else common)])
    return found


async def compare(args: argparse.Namespace) -> Latencies:
    trust = DevTrust.create(default_directory(os.environ))
    latencies: Latencies = {}
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nursery = await stack.enter_async_context(trio.open_nursery())
        manifests = {}
        for name in [PLAIN, *args.modes]:
            path, manifests[name] = planned(directory, args.model_dir, name)
            num_masks = (args.rounds + 1) * sum(each + args.tokens for each in contexts(args, name))
            for count, command in enumerate(commands(args, path, name, num_masks)):
                log = (path.with_suffix(f".{count}.log")).open("wb")
                process = await nursery.start(
                    lambda command=command, log=log, **kwargs: trio.run_process(
                        command, stdout=log, stderr=log, check=False, **kwargs
                    )
                )
                stack.callback(process.terminate)
        for round_idx in range(args.rounds + 1):
            for context in args.contexts:
                found = await one_round(args, manifests, trust, context)
                for name, log in found.items():
                    if round_idx:  # the first one warms up
                        median = statistics.median(log.latencies_ms)
                        latencies.setdefault((name, context), []).append(median)
            print(f"round {round_idx} of {args.rounds}", file=sys.stderr)
    return latencies


async def one_round(
    args: argparse.Namespace, manifests: dict[str, Manifest], trust: DevTrust, context: int
) -> dict[str, LatencyLog]:
    limits = Limits(num_slots=1, max_seq_len=context + args.tokens)
    vocab_size = load_config(args.model_dir).vocab_size
    prompt_ids = [100 + at % (vocab_size - 100) for at in range(context)]
    results = {}
    for name, manifest in manifests.items():
        if context in contexts(args, name):
            options = PipelineOptions(
                limits, TimeLimits(connect_seconds=120), patience_ms=PATIENCE_MS
            )
            async with open_pipeline(manifest, trust, options, lambda line: None) as pipeline:
                results[name] = await measure(pipeline, prompt_ids, args.tokens, limits)
    if any(log.token_ids != results[PLAIN].token_ids for log in results.values()):
        raise SessionError("the modes do not agree on the tokens")
    return results


def contexts(args: argparse.Namespace, name: str) -> list[int]:
    """A mask for each token of a long one would fill a disk, and cost as much at each."""
    return args.contexts[:1] if MODES[name][2] == "linear" else args.contexts


def table(latencies: Latencies) -> str:
    lines = [
        "| mode | context | ms/token | tokens/s | over plain two stages |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (name, context), rounds in latencies.items():
        ratios = [mine / base for mine, base in zip(rounds, latencies[PLAIN, context], strict=True)]
        middle = statistics.median(rounds)
        lines.append(
            f"| {name} | {context} | {middle:.2f} | {1e3 / middle:.1f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return "\n".join(lines)


async def trips(args: argparse.Namespace, latencies: Latencies) -> str:
    """What a token would take at least with a question a layer, beside what it takes."""
    config = load_config(args.model_dir)
    with tempfile.TemporaryDirectory() as directory:
        _, manifest = planned(Path(directory), args.model_dir, "scx")
        trip_ms = await median_trip_ms(manifest, config)
    lines = [f"a round trip of a question's bytes alone takes {trip_ms:.3f} ms (median)"]
    for context in args.contexts:
        least = [1 + config.num_layers * trip_ms / base for base in latencies[PLAIN, context]]
        lines.append(
            f"context {context}: plain two stages and {config.num_layers} of these take "
            f"{statistics.median(least):.3f} times plain; plus 10 %: "
            f"{1.1 * statistics.median(least):.3f}"
        )
    return "\n".join(lines)


def modes(text: str) -> list[str]:
    known = [name for name in MODES if name != PLAIN]
    found = text.split(",")
    if unknown := [name for name in found if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: use {', '.join(known)}")
    return found


def main() -> None:
    parser = Parser(prog="bench.sh --modes", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--modes", type=modes, default=[name for name in MODES if name != PLAIN])
    parser.add_argument("--contexts", type=wholes(1), default=[8, 1000])
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--tokens", type=whole(2), default=32)
    parser.add_argument("--threads", type=whole(1, 1024), default=1)
    args = parser.parse_args()
    longest, config = max(args.contexts) + args.tokens, load_config(args.model_dir)
    if longest > config.max_positions:
        parser.error(f"argument --contexts: the model has {config.max_positions} positions")
    unwind_on_sigterm()
    set_num_threads(args.threads)
    latencies = trio.run(compare, args)
    print(f"{machine()}; {args.model_dir.name}, float32, {args.threads} threads a process;")
    print(f"medians of {args.rounds} interleaved rounds of {args.tokens} tokens\n")
    print(table(latencies))
    if "scx" in args.modes:
        print(f"\n{trio.run(trips, args, latencies)}")


if __name__ == "__main__":
    run_main("bench.sh --modes", main)
