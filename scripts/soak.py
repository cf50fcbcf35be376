"""Kill and stop stages under load, again and again; every text must be the undisturbed one.

    python scripts/soak.py --model-dir models/smollm2 --losses 100
    python scripts/soak.py --model-dir TINY --losses 0 --requests 10000

Serves with `pipeline-orch serve --supervise`, keeps --clients requests going, and at random tokens
kills a random stage, or stops it until it is taken for hung; at times two of them. With --minutes or
--requests it goes on for so long or so many, and compares every process's memory, descriptors and threads
after the first tenth with those at the end. Exit status 1 if anything is lost, wrong, stuck or leaks.
"""

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio
from command_line import Parser, not_negative, run_main, unwind_on_sigterm, whole
from openai_stream import RequestFailed, Server, ask, find_model, stream

from pipeline.agreement.manifest import dump_manifest, load_manifest
from pipeline.errors import PipelineError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan

HANG_SECONDS = 3.0
PRECISION = "float32"
CONTEXT = 512  # tokens of a request; prompts are short
# Nothing may take longer: a client without a token, a recovery, the end of everything.
STUCK_SECONDS = 60.0
# What a loss leaves behind may not add up. Caches and allocators settle in the first tenth.
MAX_GROWTH_BYTES = 64 << 20
MAX_GROWTH_FDS = 8
MAX_GROWTH_THREADS = 4
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by"]


@dataclass
class Tally:
    """What clients have seen."""

    finished: int = 0
    wrong: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Loss:
    """One disturbance."""

    kind: str
    stages: tuple[int, ...]
    seconds: float


class ServerEnded(PipelineError):
    """The server is gone; its last line says why."""


class Serving:
    """The server's process, its log, its workers."""

    def __init__(self, args, directory: Path) -> None:
        self.manifest = directory / "manifest.json"
        options = PlanOptions(args.stages, base_port=args.base_port)
        self.manifest.write_text(dump_manifest(plan(args.model_dir, options)))
        self._log = directory / "serve.log"
        command = [
            Path(sys.executable).with_name("pipeline-orch"), "serve", "--manifest", self.manifest,
            "--model-dir", args.model_dir, "--supervise", "--dev", "--port", "0",
            "--max-batch", str(args.clients), "--context", str(CONTEXT), "--threads", str(args.threads),
            "--hang-timeout", str(HANG_SECONDS),
        ]  # fmt: skip
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def log(self) -> str:
        return self._log.read_text()

    def last_words(self) -> str:
        """The first line of the log that names an error, else the last."""
        lines = self.log().splitlines() or [f"exit status {self.process.returncode}"]
        return next((line for line in lines if "error:" in line), lines[-1])

    async def wait_for(self, condition):
        with trio.fail_after(STUCK_SECONDS):
            while not (found := condition()):
                if self.process.poll() is not None:
                    raise ServerEnded(f"the server ended: {self.last_words()}")
                await trio.sleep(0.01)
        return found

    def workers(self) -> dict[int, int]:
        found = re.findall(r"event=worker_started stage=(\d+) pid=(\d+)", self.log())
        return {int(idx): int(pid) for idx, pid in found}

    @property
    def num_recoveries(self) -> int:
        return self.log().count("event=failover_complete")

    def recovery_seconds(self) -> float:
        return float(re.findall(r"event=failover_complete seconds=([\d.]+)", self.log())[-1])

    def footprints(self) -> dict[str, "Footprint"]:
        """Of the server itself and every stage's process of now."""
        pids = {"orchestrator": self.process.pid}
        pids |= {f"stage {idx}": pid for idx, pid in sorted(self.workers().items())}
        return {name: Footprint.of(pid) for name, pid in pids.items()}

    def descendants(self) -> list[int]:
        found = [self.process.pid]
        for pid in found:
            tasks = Path(f"/proc/{pid}/task").glob("*/children")  # of each thread
            found += [int(child) for task in tasks for child in task.read_text().split()]
        return found[1:]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@dataclass(frozen=True)
class Footprint:
    """What a process holds: resident bytes, descriptors, threads."""

    rss: int
    fds: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        proc = Path(f"/proc/{pid}")
        pages = int((proc / "statm").read_text().split()[1])
        fds, threads = (sum(1 for _ in (proc / name).iterdir()) for name in ("fd", "task"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), fds, threads)

    def __str__(self) -> str:
        return f"{self.rss / 2**20:.1f} MB, {self.fds} fds, {self.threads} threads"

    def has_outgrown(self, before: "Footprint") -> bool:
        return (
            self.rss - before.rss > MAX_GROWTH_BYTES
            or self.fds - before.fds > MAX_GROWTH_FDS
            or self.threads - before.threads > MAX_GROWTH_THREADS
        )


def requests(model: str, count: int, max_tokens: int, rng: random.Random) -> list[dict]:
    return [
        {
            "model": model, "prompt": " ".join(rng.choices(WORDS, k=rng.randint(2, 60))),
            "max_tokens": rng.randint(max_tokens // 2, max_tokens), "ignore_eos": True,
            "temperature": rng.choice([0, 0, 0.8]), "seed": index, "stream": True,
        }
        for index in range(count)
    ]  # fmt: skip


async def complete(server: Server, body: dict, tally: Tally) -> str:
    """The whole text of one streamed completion. Raises RequestFailed, trio.TooSlowError."""
    parts = []
    async with stream(server, "/completions", body) as events:
        while True:
            with trio.fail_after(STUCK_SECONDS):
                event = await events.next()
            if event is None:
                return "".join(parts)
            parts += [choice["text"] for choice in event.get("choices", ())]
            tally.tokens += 1


async def client(server, bodies, expected, rng, tally, is_over) -> None:
    while not is_over.is_set():
        index = rng.randrange(len(bodies))
        try:
            text = await complete(server, bodies[index], tally)
        except (RequestFailed, trio.TooSlowError) as error:
            what = "stuck" if isinstance(error, trio.TooSlowError) else str(error)
            tally.lost[what] = tally.lost.get(what, 0) + 1
            await trio.sleep(0.1)
            continue
        tally.finished += 1
        if text != expected[index]:
            tally.wrong += 1
            print(f"soak: request {index} came out wrong", file=sys.stderr)


class Progress:
    """How far a soak is, and what its processes held after the first tenth."""

    def __init__(self, args, tally: Tally) -> None:
        self.losses: list[Loss] = []
        self.settled: dict[str, Footprint] | None = None
        self._args = args
        self._tally = tally
        self._started = time.monotonic()

    def is_past(self, share: float) -> bool:
        args = self._args
        return (
            len(self.losses) >= share * args.losses
            and self._tally.finished >= share * args.requests
            and time.monotonic() - self._started >= share * 60 * args.minutes
        )

    async def watch(self, serving: Serving) -> None:
        """Until the end; says every tenth."""
        for tenth in range(1, 11):
            while not self.is_past(tenth / 10):  # noqa: ASYNC110
                await trio.sleep(0.1)
            held = await self._footprints(serving)
            self.settled = self.settled or held
            print(
                f"{time.monotonic() - self._started:6.0f} s  {self._tally.finished} requests, "
                f"{len(self.losses)} losses;  "
                + ";  ".join(f"{name} {each}" for name, each in held.items()),
                flush=True,
            )

    async def _footprints(self, serving: Serving) -> dict[str, Footprint]:
        while True:
            try:
                return serving.footprints()
            except OSError:  # one is dead at this moment
                await trio.sleep(1)


async def disturb(serving: Serving, args, rng: random.Random, tally: Tally, progress) -> None:
    while not progress.is_past(1):
        await trio.sleep(args.pause)
        if not args.losses:
            continue
        at = tally.tokens + rng.randint(1, 100)
        await serving.wait_for(lambda at=at: tally.tokens >= at)
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        victims = rng.sample(range(args.stages), 2 if rng.random() < 0.1 and args.stages > 1 else 1)
        workers, before = serving.workers(), serving.num_recoveries
        began = time.monotonic()
        for victim in victims:
            os.kill(workers[victim], number)
        await serving.wait_for(
            lambda n=before, pids={workers[v] for v in victims}: (
                serving.num_recoveries > n and not pids & set(serving.workers().values())
            )
        )
        loss = Loss(number.name, tuple(sorted(victims)), serving.recovery_seconds())
        progress.losses.append(loss)
        print(
            f"loss {len(progress.losses):3}  {loss.kind} of stage {loss.stages}  "
            f"recovered in {loss.seconds:.2f} s (all told {time.monotonic() - began:.2f} s)  "
            f"{tally.finished} requests",
            flush=True,
        )


async def pipeline_view(server: Server) -> dict:
    async with ask(replace(server, path=""), "GET", "/pipeline") as answer:
        return json.loads(await answer.body())


def model_load_seconds(manifest_path: Path, model_dir: Path) -> float:
    """Median over the stages: reading, hashing and laying out the weights, with a warm page cache."""
    manifest, config = load_manifest(manifest_path), load_config(model_dir)
    seconds = []
    for stage in manifest.stages:
        started = time.monotonic()
        load_shard(
            model_dir, config, stage.layer_start, stage.layer_end,
            dtype=stage.precision or PRECISION, expected_hashes=stage.weight_hashes or None,
            pieces=manifest.weight_pieces,
        )  # fmt: skip
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def show_recoveries(losses: list[Loss]) -> None:
    for kind in ("SIGKILL", "SIGSTOP"):
        seconds = sorted(loss.seconds for loss in losses if loss.kind == kind)
        if seconds:
            p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
            print(
                f"{kind}: {len(seconds)} losses, recovery median {statistics.median(seconds):.2f} s, "
                f"p95 {p95:.2f} s, longest {seconds[-1]:.2f} s (from noticing to the next token)"
            )


async def check_end(serving: Serving, server: Server, args, settled) -> list[str]:
    """What is left behind, once all requests have ended."""
    problems = []
    await trio.sleep(4)  # two health answers
    view = await pipeline_view(server)
    used = [stage["figures"]["slots_in_use"] for stage in view["stages"] if stage["figures"]]
    engine = view["engine"]
    print(
        f"at rest: running {engine['num_running']}, waiting {engine['num_waiting']}, "
        f"idle {engine['num_idle_prefixes']}, slots {used}"
    )
    is_left = any(each != engine["num_idle_prefixes"] for each in used)
    if engine["num_running"] or engine["num_waiting"] or is_left:
        problems.append("slots or requests are left")
    for name, now in serving.footprints().items():
        print(f"{name}: {settled[name]} after the first tenth, {now} at the end")
        if now.has_outgrown(settled[name]):
            problems.append(f"{name} has grown")
    descendants = serving.descendants()
    print(f"{len(descendants)} processes of {args.stages} stages and what they are forks of")
    if len(descendants) != args.stages + 1:
        problems.append("worker processes are missing, or left")
    return problems


async def soak(args, directory: Path) -> int:
    rng, tally = random.Random(args.seed), Tally()
    serving = Serving(args, directory)
    try:
        url = (await serving.wait_for(lambda: re.search(r"url=(http://\S+)", serving.log())))[1]
        server = Server.parse(url, None)
        await serving.wait_for(lambda: len(serving.workers()) == args.stages)
        bodies = requests(await find_model(server), args.clients + 2, args.max_tokens, rng)
        try:
            expected = [await complete(server, body, tally) for body in bodies]
        except RequestFailed as error:
            raise ServerEnded(f"{error}: {serving.last_words()}") from error
        print(f"{len(bodies)} texts generated one at a time, {tally.tokens} tokens", flush=True)
        is_over = trio.Event()
        async with trio.open_nursery() as nursery:
            for index in range(args.clients):
                own = random.Random(args.seed + index)
                nursery.start_soon(client, server, bodies, expected, own, tally, is_over)
            progress = Progress(args, tally)
            nursery.start_soon(progress.watch, serving)
            await disturb(serving, args, rng, tally, progress)
            is_over.set()
        losses = progress.losses
        problems = await check_end(serving, server, args, progress.settled)
    finally:
        code = serving.stop()
    show_recoveries(losses)
    print(f"model load of a stage: {model_load_seconds(serving.manifest, args.model_dir):.2f} s")
    stuck = tally.lost.pop("stuck", 0)
    print(
        f"{len(losses)} losses, {tally.finished} requests, {tally.tokens} tokens: "
        f"{tally.wrong} wrong, {sum(tally.lost.values())} lost {tally.lost or ''}, {stuck} stuck"
    )
    if code:
        problems.append(f"the server ended with {code}")
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems or tally.wrong or tally.lost or stuck else 0


def main() -> int:
    parser = Parser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--stages", type=whole(1), default=3)
    parser.add_argument("--clients", type=whole(1), default=8)
    parser.add_argument("--losses", type=whole(0), default=100)
    parser.add_argument(
        "--minutes", type=not_negative, default=0.0, help="go on for at least so long"
    )
    parser.add_argument("--requests", type=whole(0), default=0, help="go on for at least so many")
    parser.add_argument(
        "--pause", type=not_negative, default=3.0, help="seconds between losses, at least"
    )
    parser.add_argument("--max-tokens", type=whole(2, CONTEXT // 2), default=80)
    parser.add_argument("--threads", type=whole(1, 1024), default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base-port", type=whole(1, 65000), default=23000)
    args = parser.parse_args()
    if not (args.losses or args.minutes or args.requests):
        parser.error("there is nothing to do: give --losses, --minutes or --requests")
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory() as directory:
        return trio.run(soak, args, Path(directory))


if __name__ == "__main__":
    run_main("soak", main)
