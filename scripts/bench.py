"""Measure decode latency of split pipelines beside one process, round by round.

Every round runs each arrangement once, so that the machine's mood is shared; ratios are taken
within a round and the medians over rounds are printed.
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter_ns

import trio
from command_line import Parser, run_main, unwind_on_sigterm, whole, wholes

from pipeline.agreement.manifest import Manifest, dump_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.latency import LatencyLog, percentile
from pipeline.engine.limits import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import SessionError
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from transport.attestation.dev_authority import default_directory

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The history of the printing press begins in the workshops of Mainz, where"
LOCAL = "one process"


def free_base_port(count: int, start: int) -> int:
    for base in range(start, start + 5000, 100):
        try:
            sockets = [socket.create_server(("127.0.0.1", base + i)) for i in range(count)]
        except OSError:
            continue
        for sock in sockets:
            sock.close()
        return base
    raise SessionError("no free loopback ports")


def local_pipeline(model_dir: Path, manifest: Manifest, limits: Limits) -> LocalPipeline:
    config = load_config(model_dir)
    shard = load_shard(model_dir, config, 0, config.num_layers, expected_hashes=None)
    session = limits.for_session(manifest.activation_spec.codec)
    return LocalPipeline([StageCore(shard, session)])


@asynccontextmanager
async def workers(nursery, directory: Path, model_dir: Path, num_stages: int, threads: int):
    # Far apart: another arrangement's workers have not bound theirs yet.
    base_port = free_base_port(10 * num_stages + 2, 20000 + 5000 * (num_stages % 6))
    manifest = plan(model_dir, PlanOptions(num_stages, base_port=base_port))
    path = directory / f"{num_stages}.json"
    path.write_text(dump_manifest(manifest))
    processes = []
    for idx in range(num_stages):
        command = [
            Path(sys.executable).with_name("stage-worker"),
            "--manifest", path, "--stage-idx", str(idx), "--model-dir", model_dir,
            "--threads", str(threads), "--dev",
        ]  # fmt: skip
        log = (directory / f"{num_stages}-{idx}.log").open("wb")
        processes.append(
            await nursery.start(
                lambda command=command, log=log, **kwargs: trio.run_process(
                    command, stdout=log, stderr=log, check=False, **kwargs
                )
            )
        )
    try:
        yield manifest
    finally:
        for process in processes:
            process.terminate()


async def measure(pipeline, prompt_ids, num_tokens: int, limits: Limits) -> LatencyLog:
    engine, log = PipelineEngine(limits), LatencyLog()
    last = perf_counter_ns()

    def hear(output):
        nonlocal last
        now = perf_counter_ns()
        log.add(output.token_id, now - last, output.timings)
        last = now

    engine.submit(Generation(prompt_ids, num_tokens, frozenset(), SamplingParams()), hear)
    await engine.drain(pipeline)
    return log


async def compare(args: argparse.Namespace) -> dict[str, list[LatencyLog]]:
    tokenizer = Tokenizer(args.model_dir / "tokenizer.json")
    prompt_ids = tokenizer.encode(PROMPT)
    limits = Limits(num_slots=1, max_seq_len=len(prompt_ids) + args.tokens)
    logs: dict[str, list[LatencyLog]] = {LOCAL: []}
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nursery = await stack.enter_async_context(trio.open_nursery())
        manifests = {
            count: await stack.enter_async_context(
                workers(nursery, directory, args.model_dir, count, args.threads)
            )
            for count in args.stages
        }
        local = local_pipeline(args.model_dir, next(iter(manifests.values())), limits)
        for round_idx in range(args.rounds + 1):
            results = {LOCAL: await measure(local, prompt_ids, args.tokens, limits)}
            for count, manifest in manifests.items():
                trust = DevTrust.create(default_directory(os.environ))
                options = PipelineOptions(
                    limits, TimeLimits(connect_seconds=60), patience_ms=PATIENCE_MS
                )
                async with open_pipeline(manifest, trust, options, lambda line: None) as pipeline:
                    name = f"{count} stage{'s' if count > 1 else ''}, encrypted"
                    results[name] = await measure(pipeline, prompt_ids, args.tokens, limits)
            expected = results[LOCAL].token_ids
            if any(log.token_ids != expected for log in results.values()):
                raise SessionError("the arrangements do not agree on the tokens")
            print(f"round {round_idx} of {args.rounds}", file=sys.stderr)
            if round_idx:  # the first one warms up
                for name, log in results.items():
                    logs.setdefault(name, []).append(log)
    return logs


def table(logs: dict[str, list[LatencyLog]]) -> str:
    lines = [
        "| arrangement | TTFT ms | avg ms/token | p50 | p95 | tokens/s | ms/token over one process |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    medians = {
        name: [statistics.median(log.latencies_ms) for log in rounds]
        for name, rounds in logs.items()
    }
    for name, rounds in logs.items():
        pooled = [latency for log in rounds for latency in log.latencies_ms]
        mean = statistics.fmean(pooled)
        ratios = [mine / base for mine, base in zip(medians[name], medians[LOCAL], strict=True)]
        ttft = statistics.median(log.prompt_ms for log in rounds)
        lines.append(
            f"| {name} | {ttft:.1f} | {mean:.2f} | {percentile(pooled, 0.5):.2f} "
            f"| {percentile(pooled, 0.95):.2f} | {1e3 / mean:.1f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return "\n".join(lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}, commit {commit or '?'}"


def main() -> None:
    parser = Parser(prog="bench.sh", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--tokens", type=whole(2), default=48)
    parser.add_argument("--threads", type=whole(1, 1024), default=1)
    parser.add_argument("--stages", type=wholes(1), default=[1, 2, 3])
    args = parser.parse_args()
    if max(args.stages) > (num_layers := load_config(args.model_dir).num_layers):
        parser.error(f"argument --stages: {max(args.stages)}: the model has {num_layers} layers")
    unwind_on_sigterm()
    set_num_threads(args.threads)
    logs = trio.run(compare, args)
    print(f"{machine()}; {args.model_dir.name}, float32, {args.threads} threads a step;")
    print(f"medians of {args.rounds} interleaved rounds of {args.tokens} tokens\n")
    print(table(logs))


if __name__ == "__main__":
    run_main("bench.sh", main)
