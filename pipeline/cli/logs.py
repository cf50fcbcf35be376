"""Logs on stderr: key=value lines for people, or one JSON object a line for machines.

Every message is `event=NAME key=value ...`, so the same call gives both. None holds content.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from logging.handlers import MemoryHandler
from types import TracebackType

from pipeline.cli.terminal import harmless

MAX_SHOWN = 2000
MAX_HELD = 1000
# A conversion of a format string, and a word of a message.
_SPEC = re.compile(r"%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]")
_WORD = re.compile(r"(?:([a-z_]+)=)?(\S+)")

_NONE: Mapping[str, str] = {}
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

logger = logging.getLogger(__name__)


class LogFormat(StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


def printable(text: str) -> str:
    """`text` on one line of bounded length, with control characters escaped.

    Text from a peer or a file could otherwise forge lines of output, or drive the terminal.
    """
    line = " ".join(text[: 2 * MAX_SHOWN].split())
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in line
    )
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "…"


class TextFormatter(logging.Formatter):
    """Lines of key=value words."""

    def __init__(self, marks: Mapping[str, str] = _NONE) -> None:
        super().__init__(
            f"time=%(asctime)s level=%(levelname)s logger=%(name)s {_words(marks)}%(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )
        self.marks = marks

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """One line, whatever the message holds."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's own name
        """A traceback's lines; the error's own text may come from a peer."""
        return harmless(super().formatException(ei))


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time, level, logger, event, and the message's own keys."""

    def __init__(self, marks: Mapping[str, str] = _NONE) -> None:
        super().__init__()
        self.marks = marks

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self.marks,
        }
        line |= {key: value for key, value in _fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """The keys and values of a record; words without a key are its `message`.

    Read from the format string and not from the text, where a value with spaces would end early
    and one that came from a peer could pretend to be another key.
    """
    args = record.args
    if not isinstance(record.msg, str) or not isinstance(args, tuple):
        return {"message": printable(record.getMessage())}
    fields: dict[str, object] = {}
    words: list[str] = []
    num_used = 0
    for key, word in _WORD.findall(record.msg):
        num_specs = len(_SPEC.findall(word.replace("%%", "")))
        value = _value(word, args[num_used : num_used + num_specs])
        num_used += num_specs
        if key:
            fields[key] = value
        else:
            words.append(str(value))
    if words:
        fields["message"] = " ".join(words)
    return fields


def _value(word: str, args: tuple[object, ...]) -> object:
    if not args:
        return word.replace("%%", "%")
    text, first = word % args, args[0]
    if _SPEC.fullmatch(word):
        if word[-1] in "sdi" and (first is None or isinstance(first, int)):
            return first
        if word[-1] in "sefg" and isinstance(first, float) and math.isfinite(first):
            return float(text)
    return printable(text)


def configure_logging(
    *,
    verbose: bool,
    quiet: bool = False,
    log_format: LogFormat = LogFormat.TEXT,
    marks: Mapping[str, str] = _NONE,
) -> None:
    """Log to stderr in the format asked for, `marks` in every line."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler = logging.StreamHandler()
    formatter = JsonFormatter if log_format is LogFormat.JSON else TextFormatter
    handler.setFormatter(formatter(marks))
    logging.basicConfig(handlers=[handler], level=level)


@contextmanager
def held_back() -> Iterator[None]:
    """What is logged in the body is written when it ends well, and lost when it does not.

    For whoever fails again and again in the same way, and says why by other means.
    """
    root = logging.getLogger()
    before = root.handlers
    held = [MemoryHandler(MAX_HELD, logging.CRITICAL + 1, handler) for handler in before]
    root.handlers = [*held]
    try:
        yield
        for handler in held:
            handler.flush()
    finally:
        root.handlers = before


def tell(command: str, text: str) -> None:
    """A line on stderr for the user: plain, or a log line where all lines are JSON."""
    if logs_json():
        logger.info("event=progress command=%s detail=%s", command, text)
    else:
        _print(f"{command}: {_words(_marks())}{printable(text)}")


def tell_error(command: str, text: str, code: int) -> None:
    """The one line on stderr that says why a command exits with `code`."""
    if logs_json():
        logger.error("event=failed command=%s code=%d error=%s", command, code, text)
    else:
        _print(f"{command}: error: {printable(text)}")


def _print(line: str) -> None:
    """As loggers do: where stderr is a file on a disk that is full, or closed, work goes on."""
    with suppress(OSError):
        print(line, file=sys.stderr)


def logs_json() -> bool:
    """Whether lines on stderr are JSON objects, every one."""
    return any(isinstance(formatter, JsonFormatter) for formatter in _formatters())


def _marks() -> Mapping[str, str]:
    """What every line of this process says."""
    ours = (each.marks for each in _formatters() if isinstance(each, JsonFormatter | TextFormatter))
    return next(ours, _NONE)


def _formatters() -> Iterator[logging.Formatter | None]:
    return (handler.formatter for handler in logging.getLogger().handlers)


def _words(marks: Mapping[str, str]) -> str:
    return "".join(f"{key}={value} " for key, value in marks.items())
