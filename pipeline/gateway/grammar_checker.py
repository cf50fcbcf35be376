"""Tries a grammar, in a process of its own: what a client writes may take a compiler's whole stack.

Run as a script (hence only `llguidance` and the standard library): a line on stdin brings how the
grammar is written, its text, and the options of its JSON; one on stdout gives it back as
llguidance's own, or says what is wrong with it. The kernel ends the process if it takes too much.
It has less stack than the thread that compiles the same grammar afterwards.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

from llguidance import LLMatcher, LLParserLimits, grammar_from

# Of processor time; ordinary grammars take milliseconds.
MAX_SECONDS = 3
MAX_MEMORY_BYTES = 1 << 30
MAX_STACK_BYTES = 3 << 19


def translated(kind: str, text: str, json_options: dict[str, Any]) -> str:
    """As llguidance has it. Raises ValueError."""
    if kind == "llguidance":
        return text
    if kind != "json_schema":
        return grammar_from(kind, text)  # type: ignore[arg-type]  # it is one of its own names
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("a schema has to be an object")
    # In the place of what a client says there.
    schema["x-guidance"] = json_options
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


def _answer(kind: str, text: str, json_options: dict[str, Any]) -> dict[str, str]:
    try:
        source = translated(kind, text, json_options)
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    limits = LLParserLimits(verbose_errors=False)
    error_text = LLMatcher.validate_grammar(source, None, limits=limits)
    return {"error": error_text} if error_text else {"source": source}


def main() -> None:
    """Serve whoever started this process until it closes stdin: a line of JSON for each."""
    for what, most in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_STACK, MAX_STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    os.nice(19)  # others' tokens come first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the gateway decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        answer = json.dumps(_answer(**json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
