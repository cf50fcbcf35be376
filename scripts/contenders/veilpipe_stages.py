"""veilpipe: veilpipe_stages.py MODEL_DIR DTYPE THREADS STAGES WIRE [CPU ...].

Threads that compute are pinned to the CPUs, if any are given: each process's first to the first.
STAGES 0 is everything in this process, nothing encrypted; otherwise this process is the
orchestrator of that many stage-worker processes, connected over loopback as they always are.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from protocol import Ask, Clock, Result, parse, say, say_ready

from pipeline.agreement.manifest import Manifest, dump_manifest, parse_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.engine.step import FollowUp, Notice, Step
from pipeline.engine.step_runner import RunnerStats, StepRunner
from pipeline.kernels.runtime import set_num_threads
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.peer_connections import PATIENCE_MS
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_results import StepResult
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage.step_executor import StageCore
from transport.attestation.dev_authority import default_directory

ROWS, POSITIONS = 16, 1024


class Stopwatch:
    """A pipeline that notes when the results of whole steps arrive."""

    def __init__(self, pipeline: StepRunner, rows: int) -> None:
        self._pipeline = pipeline
        self._rows = rows
        self._clock = Clock()
        self.ms: list[float] = []

    @property
    def stats(self) -> RunnerStats:
        return self._pipeline.stats

    async def notify(self, notices: Sequence[Notice]) -> None:
        await self._pipeline.notify(notices)

    async def send(self, step: Step) -> None:
        await self._pipeline.send(step)

    def prepare(self, follow_up: FollowUp | None) -> None:
        self._pipeline.prepare(follow_up)

    async def receive(self) -> StepResult:
        result = await self._pipeline.receive()
        if result.header.kind is StepKind.STEP and len(result.token_ids) == self._rows:
            self.ms.append(self._clock.lap_ms())
        return result


async def generate(pipeline: StepRunner, limits: Limits, ask: Ask) -> Result:
    engine = PipelineEngine(limits)
    watch, result = Stopwatch(pipeline, ask.rows), Result()
    generation = Generation(tuple(ask.prompt), ask.steps, frozenset(), SamplingParams())
    engine.submit(generation, lambda output: result.token_ids.append(output.token_id))
    for _ in range(ask.rows - 1):
        engine.submit(generation, lambda output: None)
    await engine.drain(watch)
    result.ms = watch.ms
    return result


def make_manifest(model_dir: Path, dtype: str, num_stages: int, wire: str) -> Manifest:
    # Every contender has its own hundred ports, by its process id.
    base_port = 20000 + os.getpid() % 200 * 100
    options = PlanOptions(max(num_stages, 1), base_port=base_port, wire_dtype=wire)
    manifest = plan(model_dir, options)
    fields = json.loads(dump_manifest(manifest))
    for stage in fields["stages"]:
        stage["precision"] = dtype
    return parse_manifest(json.dumps(fields))


@asynccontextmanager
async def one_process(manifest: Manifest, model_dir: Path, dtype: str, limits: Limits):
    config = load_config(model_dir)
    shard = load_shard(model_dir, config, 0, config.num_layers, dtype=dtype, expected_hashes=None)
    session = limits.for_session(manifest.activation_spec.codec)
    yield LocalPipeline([StageCore(shard, session)])


@asynccontextmanager
async def processes(
    manifest: Manifest,
    model_dir: Path,
    dtype: str,
    threads: int,
    cpus: tuple[int, ...],
    limits: Limits,
):
    pinning = ["--cpus", ",".join(map(str, cpus))] if cpus else []
    async with trio.open_nursery() as nursery:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "manifest.json"
            path.write_text(dump_manifest(manifest))
            for stage in manifest.stages:
                command = [
                    Path(sys.executable).with_name("stage-worker"),
                    "--manifest", path, "--stage-idx", str(stage.stage_idx),
                    "--model-dir", model_dir, "--threads", str(threads), *pinning, "--dev",
                    *(["--dtype", dtype] if dtype != "float32" else []),
                ]  # fmt: skip
                log = (Path(directory) / f"{stage.stage_idx}.log").open("wb")
                await nursery.start(
                    lambda command=command, log=log, **kwargs: trio.run_process(
                        command, stdin=None, stdout=log, stderr=log, check=False, **kwargs
                    )
                )
            trust = DevTrust.create(default_directory(os.environ))
            options = PipelineOptions(
                limits, TimeLimits(connect_seconds=120), patience_ms=PATIENCE_MS
            )
            async with open_pipeline(manifest, trust, options, lambda line: None) as pipeline:
                yield pipeline
            nursery.cancel_scope.cancel()


async def run(
    model_dir: Path, dtype: str, threads: int, num_stages: int, wire: str, cpus: tuple[int, ...]
) -> None:
    limits = Limits(ROWS, POSITIONS, num_stages=num_stages or 1)
    manifest = make_manifest(model_dir, dtype, num_stages, wire)
    if num_stages:
        arrangement = processes(manifest, model_dir, dtype, threads, cpus, limits)
    else:
        set_num_threads(threads, cpus)
        arrangement = one_process(manifest, model_dir, dtype, limits)
    async with arrangement as pipeline:
        say_ready(f"{dtype}, wire {manifest.activation_spec.dtype}")
        # Not a blocking read: the pipeline's health checks go on while others are measured.
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            say(await generate(pipeline, limits, parse(line)))


def main() -> None:
    model_dir, dtype, threads, stages, wire, *cpus = sys.argv[1:]
    pinned = tuple(map(int, cpus))
    trio.run(run, Path(model_dir), dtype, int(threads), int(stages), wire, pinned)


if __name__ == "__main__":
    main()
