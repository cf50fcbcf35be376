"""How a contender and the referee talk, one line each way.

A contender says `{"ready": true, "about": "..."}` once it has loaded. For each line
`generate ROWS STEPS ID ID ...` it feeds the prompt to ROWS sequences, generates STEPS tokens of
each greedily, and answers `{"ms": [...], "token_ids": [...]}`: the first time covers the prompt
and the first token, every other one a step; the tokens are the first sequence's. Between requests
it waits on standard input and computes nothing. It ends when its input does.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns


@dataclass
class Result:
    ms: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Clock:
    """Milliseconds since it was last asked."""

    def __init__(self) -> None:
        self._last = perf_counter_ns()

    def lap_ms(self) -> float:
        now = perf_counter_ns()
        elapsed, self._last = now - self._last, now
        return elapsed / 1e6


@dataclass(frozen=True)
class Ask:
    rows: int
    steps: int
    prompt: list[int]


def parse(line: str) -> Ask:
    verb, rows, steps, *prompt = line.split()
    if verb != "generate":
        raise SystemExit(f"unknown request {verb!r}")
    return Ask(int(rows), int(steps), [int(word) for word in prompt])


def say_ready(about: str) -> None:
    print(json.dumps({"ready": True, "about": about}), flush=True)


def say(result: Result) -> None:
    print(json.dumps({"ms": result.ms, "token_ids": result.token_ids}), flush=True)


def serve(generate: Callable[[Ask], Result], about: str) -> None:
    say_ready(about)
    for line in sys.stdin:
        say(generate(parse(line)))
