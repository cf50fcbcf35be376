"""Renders a chat template, in a process of its own: a template is a program, and not ours.

It comes with a model from strangers. Jinja's sandbox keeps it off the host's files, but not from
computing or allocating without end; the kernel does, for a process. Run as a script (hence only
`jinja2` and the standard library): stdin brings the template and its special tokens, then the
variables of one rendering after another, in Python's own form, from the gateway, which is trusted;
stdout gives back text, which is not. Each answer is its length, a mark and UTF-8.
"""

import json
import marshal
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SIZE = struct.Struct("<I")
ANSWER = struct.Struct("<I1s")
TEXT, REFUSAL = b"+", b"!"
# Far beyond any context, far below what would hurt: a template may loop over its own input.
MAX_RENDERED_CHARS = 8 << 20
MAX_ANSWER_BYTES = 4 * MAX_RENDERED_CHARS
MAX_MEMORY_BYTES = 768 << 20
# Of processor time, so that a busy machine makes no difference. Long conversations take
# milliseconds.
COMPILE_SECONDS = 5.0
RENDER_SECONDS = 1.0
# A refusal is one line for a client; a template may put anything in it.
_MAX_REASON_CHARS = 500


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; rendering shows it as it is."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> tuple[Template, frozenset[str]]:
    """The template, and the variables that it reads. Raises whatever Jinja does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    variables = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(variables - environment.globals.keys())


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """The text. Raises whatever the template does, ValueError if it is too long."""
    parts: list[str] = []
    num_chars = 0
    for part in template.generate(**variables):
        parts.append(part)
        num_chars += len(part)
        if num_chars > MAX_RENDERED_CHARS:
            raise _TooLongError
    return "".join(parts)


class _TooLongError(TemplateError):
    def __init__(self) -> None:
        super().__init__(f"the text exceeds {MAX_RENDERED_CHARS} characters")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def read_exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    """So many bytes. Raises EOFError if the other side has gone."""
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError
    return data


def write_value(stream: BinaryIO, value: Any) -> None:  # noqa: ANN401  (of plain types)
    """Send a value of plain types to this process. Raises OSError if it has gone."""
    data = marshal.dumps(value)
    stream.write(SIZE.pack(len(data)) + data)
    stream.flush()


def _read_value(stream: BinaryIO) -> Any:  # noqa: ANN401  (whatever the gateway sent)
    (size,) = SIZE.unpack(read_exactly(stream, SIZE.size))
    return marshal.loads(read_exactly(stream, size))  # noqa: S302  (from the gateway)


def _answer(stream: BinaryIO, mark: bytes, text: str) -> None:
    data = text.encode("utf-8", "replace")
    stream.write(ANSWER.pack(len(data), mark) + data)
    stream.flush()


def _reason(error: BaseException) -> str:
    known = error.message if isinstance(error, TemplateError) else None
    return str(known or type(error).__name__)[:_MAX_REASON_CHARS]


def _limit(seconds: float) -> None:
    """From now on, the kernel ends this process after so much computing, whatever it is at."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    source, special_tokens = _read_value(requests)
    _limit(COMPILE_SECONDS)
    try:
        template, variables = compile_template(source)
    except Exception as error:  # deep nesting and large constants end in errors of any kind
        _answer(answers, REFUSAL, _reason(error))
        return
    _answer(answers, TEXT, json.dumps(sorted(variables)))
    while True:
        _limit(0)
        values = _read_value(requests)
        _limit(RENDER_SECONDS)
        try:
            text = render(template, special_tokens | values)
        except Exception as error:  # on input that a template forgot, anything happens
            _answer(answers, REFUSAL, _reason(error))
        else:
            _answer(answers, TEXT, text)


def main() -> None:
    """Serve whoever started this process until it closes stdin."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it holds a conversation
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the gateway decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(EOFError, BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
