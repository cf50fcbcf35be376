"""What holding texts to a form costs a server, beside the same sampling without one.

    pipeline-orch serve ... & python scripts/bench_structured.py --pid $!

Rounds alternate, free and held, so that both meet the same machine; a token's cost is the wall time of a
round by its tokens, and with --pid the processor time of that process and its children, which a busy
machine bears better. --hostile instead alternates rounds beside a client who sends forms that are made to
be costly, one after another, with rounds beside one whose forms are not, and measures what the others get.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import trio
from command_line import Parser, run_main, whole, wholes
from openai_stream import BenchError, RequestFailed, Server, ask, find_model, one_line

from pipeline.tasks import first_leaf

_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "kind": {"enum": ["small", "large", "none"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
# Texts of this form do not end before they have all their tokens.
FORM = {"type": "array", "minItems": 1000, "items": _ITEM}


def _hostile(number: int) -> dict:
    """A form that is costly in one of several ways; never the same, since what is compiled is kept."""
    name = f"x{number}"
    deep: dict = {"type": "string", "const": name}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    forms = [
        deep,
        {"enum": [f"{name}{i}{'y' * 40}" for i in range(4000)]},
        {"type": "string", "pattern": f"^({name}|(a?){{60}}a{{60}}|(x+x+)+y)*$"},
        {"type": "string", "pattern": f"{name}.*[ab].{{200}}c.{{200}}d"},
        {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [
            {"const": name}, {"type": "array", "items": {"$ref": "#/$defs/t"}},
            {"type": "object", "additionalProperties": {"$ref": "#/$defs/t"}},
        ]}}},
    ]  # fmt: skip
    return forms[number % len(forms)]


def cpu_seconds(pid: int | None) -> float:
    """Of a process and all below it, those that have ended included."""
    if pid is None:
        return 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    spent = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return spent + sum(cpu_seconds(int(child)) for child in children)


class Bench:
    def __init__(self, args: argparse.Namespace, server: Server, model: str) -> None:
        self._args = args
        self._server = server
        self._model = model
        self._numbers = count()

    async def _post(self, **fields: object) -> dict | None:
        """The answer, or None where it is a refusal."""
        body = {"model": self._model, "prompt": "A list:", "temperature": 1, **fields}
        async with ask(self._server, "POST", "/completions", json.dumps(body).encode()) as answer:
            said = json.loads(await answer.body())
            if answer.status >= 500:
                raise RequestFailed(f"HTTP {answer.status}: {said}")
            return said if answer.status == 200 else None

    async def round(self, clients: int, *, is_held: bool) -> tuple[float, float]:
        """Milliseconds a token: of wall time, of processor time."""
        tokens = 0

        async def client() -> None:
            nonlocal tokens
            more = {"structured_outputs": {"json": FORM}} if is_held else {"ignore_eos": True}
            seed = next(self._numbers)
            answer = await self._post(max_tokens=self._args.max_tokens, seed=seed, **more)
            if answer is None:
                raise BenchError("the server refuses what is measured")
            tokens += answer["usage"]["completion_tokens"]

        began, spent = time.perf_counter(), cpu_seconds(self._args.pid)
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(client)
        wall, cpu = time.perf_counter() - began, cpu_seconds(self._args.pid) - spent
        return wall / tokens * 1e3, cpu / tokens * 1e3

    @asynccontextmanager
    async def beside(self, form_of: Callable[[int], dict]) -> AsyncIterator[None]:
        """Somebody sends forms, one after another."""

        async def send() -> None:
            while True:
                form = form_of(next(self._numbers))
                await self._post(max_tokens=64, structured_outputs={"json": form})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            yield
            nursery.cancel_scope.cancel()

    async def measure(self, clients: int) -> None:
        plain: list[tuple[float, float]] = []
        other: list[tuple[float, float]] = []
        for _ in range(self._args.rounds):
            if self._args.hostile:
                for form_of, rounds in ((lambda _: FORM, plain), (_hostile, other)):
                    async with self.beside(form_of):
                        rounds.append(await self.round(clients, is_held=False))
            else:
                plain.append(await self.round(clients, is_held=False))
                other.append(await self.round(clients, is_held=True))
        what = "attacked" if self._args.hostile else "held"
        for at, kind in enumerate(("wall", "processor")):
            if plain[0][at]:
                ratios = [b[at] / a[at] for a, b in zip(plain, other, strict=True)]
                free, held = (statistics.median(e[at] for e in each) for each in (plain, other))
                print(
                    f"{clients:3} clients, {kind:9} ms/token: free {free:.3f}, {what} {held:.3f}, "
                    f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
                )


async def run(args: argparse.Namespace) -> None:
    server = Server.parse(args.url, args.api_key_file)
    bench = Bench(args, server, await find_model(server))
    try:
        await bench.round(1, is_held=not args.hostile)  # compiles the form
        for clients in args.clients:
            await bench.measure(clients)
    except* RequestFailed as group:
        raise BenchError(one_line(first_leaf(group))) from None


def parse_arguments() -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = Parser(
        prog="bench_structured", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server [%(default)s]")
    add("--api-key-file", type=Path, metavar="FILE", help="file with the bearer key")
    add("--clients", type=wholes(1), default=[1, 16], metavar="N,N", help="at once [1,16]")
    add("--max-tokens", type=whole(1), default=96, metavar="N", help="of each [%(default)s]")
    add("--rounds", type=whole(1), default=7, metavar="N", help="of each kind [%(default)s]")
    add("--pid", type=whole(1), metavar="PID", help="the server's, for its processor time")
    add("--hostile", action="store_true", help="what costly forms cost others")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    run_main("bench_structured", lambda: trio.run(run, arguments))
