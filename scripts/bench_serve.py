"""Load an OpenAI-compatible server with concurrent streaming clients and report latency and throughput.

    python scripts/bench_serve.py --clients 16 --requests 64 --prompt-tokens 16-256 --max-tokens 64

Closed loop: each of --clients asks again as soon as it has its answer. Open loop, with --rate: requests
arrive at random (Poisson), however busy the server is. Every request has a connection of its own.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import trio
from command_line import Parser, not_negative, positive, run_main, whole
from openai_stream import (
    BenchError,
    EventStream,
    RequestFailed,
    Server,
    find_model,
    one_line,
    stream,
)
from rich.console import Console
from rich.progress import Progress
from serve_report import Result, plot, show, summarize

# Words that are one token in nearly every vocabulary; what a server counted is what is reported.
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by"]


def _has_text(event: dict) -> bool:
    choices = event.get("choices") or [{}]
    return bool(choices[0].get("text") or (choices[0].get("delta") or {}).get("content"))


async def measure(server: Server, args: argparse.Namespace, body: dict, began: float) -> Result:
    """Run one request. What goes wrong is part of the result."""
    start = time.perf_counter()
    result = Result(started=start - began)
    path = "/chat/completions" if args.chat else "/completions"
    try:
        with trio.fail_after(args.patience):
            async with stream(server, path, body) as events:
                await _follow(events, start, result)
    except RequestFailed as error:
        result.error = str(error)
    except trio.TooSlowError:
        result.error = f"not whole after {args.patience:g} s"
    except (LookupError, TypeError, ValueError, AttributeError):
        result.error = "an event of another shape"
    result.total = time.perf_counter() - start
    return result


async def _follow(events: EventStream, start: float, result: Result) -> None:
    """Take the times of the pieces of text; tokens as the server counted them, else pieces."""
    last, num_pieces = start, 0
    while (event := await events.next()) is not None:
        if _has_text(event):
            now = time.perf_counter()
            if result.ttft is None:
                result.ttft = now - start
            else:
                result.inter_token.append(now - last)
            last, num_pieces = now, num_pieces + 1
        if usage := event.get("usage"):
            result.prompt_tokens = int(usage["prompt_tokens"])
            result.output_tokens = int(usage["completion_tokens"])
    result.output_tokens = result.output_tokens or num_pieces


def make_bodies(args: argparse.Namespace, model: str) -> list[dict]:
    """All requests of a run; the seed alone decides their lengths and words."""
    rng = random.Random(args.seed)
    bodies = []
    for _ in range(args.warmup + args.requests):
        prompt = " ".join(rng.choice(WORDS) for _ in range(args.prompt_tokens.draw(rng)))
        body = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        body |= {"max_tokens": args.max_tokens.draw(rng), "temperature": args.temperature}
        body |= (
            {"messages": [{"role": "user", "content": prompt}]} if args.chat else {"prompt": prompt}
        )
        bodies.append(body | ({"ignore_eos": True} if args.ignore_eos else {}))
    return bodies


async def run(server: Server, args: argparse.Namespace, bodies: list[dict]) -> list[Result]:
    """Send every request as the arrivals say."""
    results: list[Result] = []
    for body in bodies[: args.warmup]:
        await measure(server, args, body, time.perf_counter())
    measured = iter(bodies[args.warmup :])
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=args.requests)
        began = time.perf_counter()

        async def one(body: dict) -> None:
            results.append(await measure(server, args, body, began))
            progress.advance(task)

        async def client() -> None:
            for body in measured:
                await one(body)

        async with trio.open_nursery() as nursery:
            if args.rate is None:
                for _ in range(args.clients):
                    nursery.start_soon(client)
            else:
                rng = random.Random(args.seed + 1)
                at = trio.current_time()
                for body in measured:
                    nursery.start_soon(one, body)
                    at += rng.expovariate(args.rate)
                    await trio.sleep_until(at)
    return results


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens: 64, one of 16,64,256, or any of 16-256."""

    choices: tuple[int, ...]
    is_range: bool

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        parts = text.split("-") if "-" in text else text.split(",")
        numbers = tuple(int(part) for part in parts)
        is_range = "-" in text
        if min(numbers) < 1 or (is_range and (len(numbers) != 2 or numbers[0] > numbers[1])):
            raise ValueError(text)
        return cls(numbers, is_range)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(*self.choices) if self.is_range else rng.choice(self.choices)


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give 64, or 16,64,256, or 16-256") from None


def parse_arguments() -> argparse.Namespace:
    summary, _, example = __doc__.partition("\n\n")
    parser = Parser(
        prog="bench_serve", description=summary, epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server [%(default)s]")
    add("--api-key-file", type=Path, metavar="FILE", help="file with the bearer key")
    add("--model", metavar="NAME", help="[the first the server has]")
    add("--chat", action="store_true", help="ask /chat/completions instead of /completions")
    arrivals = parser.add_mutually_exclusive_group()
    arrivals.add_argument(
        "--clients", type=whole(1), default=4, metavar="N", help="at once [%(default)s]"
    )
    arrivals.add_argument("--rate", type=positive, metavar="R", help="arrivals a second, at random")
    add("--requests", type=whole(1), default=32, metavar="N", help="in all [%(default)s]")
    add(
        "--warmup",
        type=whole(0),
        default=1,
        metavar="N",
        help="requests before, not counted [%(default)s]",
    )
    add(
        "--prompt-tokens",
        type=_lengths,
        default="64",
        metavar="N",
        help="64, 16,64,256 or 16-256 [64]",
    )
    add("--max-tokens", type=_lengths, default="64", metavar="N", help="likewise [64]")
    add("--temperature", type=not_negative, default=0.0, metavar="T", help="[%(default)s]")
    add("--ignore-eos", action="store_true", help="full length; an extension of OpenAI's API")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of lengths, words and arrivals [%(default)s]",
    )
    add(
        "--patience",
        type=positive,
        default=300.0,
        metavar="S",
        help="with one request [%(default)s]",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures and samples")
    add("--plot", type=Path, metavar="FILE", help="write a picture (.png)")
    return parser.parse_args()


def bench(args: argparse.Namespace) -> int:
    if args.plot is not None:
        try:
            import matplotlib  # noqa: F401, PLC0415
        except ImportError:
            raise BenchError("--plot needs matplotlib: pip install 'veilpipe[bench]'") from None
    server = Server.parse(args.url, args.api_key_file)

    async def main() -> tuple[str, list[Result]]:
        model = args.model or await find_model(server)
        return model, await run(server, args, make_bodies(args, model))

    model, results = trio.run(main)
    results.sort(key=lambda each: each.started)
    summary = summarize(results)
    arrivals = f"{args.clients} clients" if args.rate is None else f"{args.rate:g} requests/s"
    title = f"{model}: {arrivals}"
    show(summary, title)
    if args.json is not None:
        options = {name: str(value) for name, value in vars(args).items()}
        samples = [asdict(each) for each in results]
        _write(args.json, lambda: args.json.write_text(
            json.dumps({"options": options, "summary": summary, "requests": samples}, indent=1)
        ))  # fmt: skip
    if args.plot is not None:
        _write(args.plot, lambda: plot(results, summary, args.plot, title))
    return 1 if summary["failed"] else 0


def _write(path: Path, write) -> None:
    try:
        write()
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write {path}: {one_line(error)}") from error


def main() -> NoReturn:
    run_main("bench_serve", lambda: bench(parse_arguments()))


if __name__ == "__main__":
    main()
