"""Compare veilpipe with what one would use instead, on the same weights, prompt and threads.

Contenders are processes that wait while another computes. Each round runs every one of them, so
that the machine's mood is shared; medians over rounds are printed, and ratios are medians of the
ratios within a round. Without --model-dir the model is GPT-2's shape (124M) with random weights.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from command_line import Parser, run_main, whole, wholes
from contenders.lineup import LINEUP, Field, assemble, default_cache, floor, matching, random_model
from contenders.quiet import DISTURBED
from contenders.referee import Task, compete, step_ms
from contenders.report import Heat, draw, row, table
from rich.console import Console

from pipeline.models.config import load_config

PROMPT_TOKENS, PREFILL_TOKENS, BATCH_ROWS, BATCH_STEPS = 16, 512, 16, 8
MEASURES = ("decode", "prefill", "batch")
say = partial(print, file=sys.stderr, flush=True)


def prompt(length: int) -> tuple[int, ...]:
    """Token ids every vocabulary has."""
    return tuple(1000 + (7919 * i) % 20000 for i in range(length))


def tasks(args: argparse.Namespace) -> list[Task]:
    found = {
        "decode": Task("decode", 1, args.tokens, prompt(PROMPT_TOKENS), step_ms),
        "prefill": Task("prefill", 1, 1, prompt(PREFILL_TOKENS), lambda times: times[0]),
        "batch": Task("batch", BATCH_ROWS, BATCH_STEPS, prompt(PROMPT_TOKENS), step_ms),
    }
    return [found[name] for name in args.measure]


def cpus_for(threads: int) -> tuple[int, ...]:
    """The same for every contender; none where there are too few, or none can be chosen."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return tuple(usable[:threads]) if threads <= len(usable) and shutil.which("taskset") else ()


def hold(args: argparse.Namespace, threads: int, model_dir: Path) -> Heat:
    field = Field(model_dir, threads, args.cache, cpus_for(threads) if args.pin else ())
    contenders, missing = [floor(field)], {}
    for name, made in assemble(matching(args.contenders), field):
        if isinstance(made, str):
            missing[name] = made
        else:
            contenders.append(made)
    outcome = compete(contenders, tasks(args), args.rounds, args.lock, say)
    outcome.skipped = missing | outcome.skipped
    return Heat(threads, contenders, outcome)


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}, commit {commit or '?'}"


def disturbance(heat: Heat) -> str:
    """How far the figures can be trusted."""
    shares = sorted(heat.outcome.disturbance) or [0.0]
    disturbed = sum(share > DISTURBED for share in shares)
    return (
        f"others used {statistics.median(shares):.2f} cores in the median run, "
        f"more than {DISTURBED} in {disturbed} of {len(shares)}"
    )


def as_json(heats: list[Heat], args: argparse.Namespace, model: str) -> str:
    fields = {
        "machine": machine(),
        "model": model,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "heats": [
            {
                "threads": heat.threads,
                "floor_float32_ms": heat.floor_ms(heat.contenders[0]),
                "rows": [row(heat, each) for each in heat.finished()],
                "outcome": vars(heat.outcome),
            }
            for heat in heats
        ],
    }
    return json.dumps(fields, indent=2) + "\n"


def parse() -> argparse.Namespace:
    parser = Parser(prog="bench.sh --compare", description=__doc__)
    words = str.split
    parser.add_argument("--model-dir", type=Path, help="a GPT-2 or Llama-family model instead")
    parser.add_argument(
        "--contenders", type=lambda text: words(text, ","), default=list(LINEUP),
        help=f"parts of names, with commas between; the names: {' '.join(LINEUP)}; "
        "and veilpipe-KIND-STAGES-WIRE for F16, BF16 or I8 between stages",
    )  # fmt: skip
    parser.add_argument(
        "--measure", type=lambda text: words(text, ","), default=list(MEASURES),
        help="which of decode,prefill,batch",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=wholes(1), default=[1, 2],
        help="of every process that computes; a comparison for each (default 1,2)",
    )  # fmt: skip
    parser.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, default=True,
        help="keep whatever computes on the same CPUs, as many as threads (default); who only "
        "drives others may use all",
    )  # fmt: skip
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--tokens", type=whole(4), default=24, help="generated per round")
    parser.add_argument("--json", type=Path, help="write every figure of every round")
    parser.add_argument("--png", type=Path, help="draw the decode times")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="derived files")
    parser.add_argument("--lock", type=Path, help="take turns with others who lock this file")
    args = parser.parse_args()
    if unknown := set(args.measure) - set(MEASURES):
        parser.error(f"--measure knows {', '.join(MEASURES)}, not {', '.join(unknown)}")
    if not matching(args.contenders):
        parser.error(f"no contender is called {', '.join(args.contenders)}")
    return args


def main() -> None:
    args = parse()
    if args.model_dir:
        load_config(args.model_dir)
    model_dir = args.model_dir or random_model(args.cache)
    model = model_dir.name if args.model_dir else "GPT-2's shape (124M), random weights"
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{machine()}; {model}; medians of {args.rounds} interleaved rounds", style="dim")
    heats = []
    for threads in args.threads:
        heat = hold(args, threads, model_dir)
        heats.append(heat)
        console.print(table(heat, f"{threads} thread{'s' * (threads > 1)} a process"))
        console.print(disturbance(heat), style="dim")
        for name, reason in heat.outcome.skipped.items():
            console.print(f"skipped {name}: {reason}", style="yellow", markup=False)
    if args.json:
        args.json.write_text(as_json(heats, args, model))
    if args.png:
        draw(heats, f"{model} on {os.cpu_count()} cores", args.png)


if __name__ == "__main__":
    run_main("bench.sh --compare", main)
