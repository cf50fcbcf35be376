"""The prompt: from the command line, or from where no list of processes shows it."""

import os
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, PromptError

# Far more than any context holds.
MAX_PROMPT_BYTES = 64 << 20


def with_prompt(values: dict[str, Any], name: str) -> dict[str, Any]:
    """What flags say, with the content of the file instead of a prompt that is in one.

    Raises InputError.
    """
    file = values.get(f"{name}_file")
    text = read_prompt(values.get(name), None if file is None else Path(file), f"--{name}")
    return values if text is None else values | {name: text}


def read_prompt(text: str | None, file: Path | None, flag: str = "--text") -> str | None:
    """The prompt that was given, if any: `--text`, or the content of `--text-file` (`-`: stdin).

    `flag`: what the former is called, if not that. One line break at a file's end is the editor's
    and no part of it. Raises InputError.
    """
    if file is None:
        return text
    if text is not None:
        raise InputError(f"{flag} and {flag}-file exclude each other")
    raw = read_bytes(file, f"{flag}-file", MAX_PROMPT_BYTES)
    try:
        prompt = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{flag}-file: {_name(file)} is not UTF-8 text") from error
    return prompt.removesuffix("\n").removesuffix("\r")


def read_bytes(file: Path, flag: str, max_bytes: int) -> bytes:
    """All that a file holds, or stdin (`-`). Raises InputError that names the flag."""
    try:
        raw = _read(file, max_bytes)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{flag}: cannot read {_name(file)}: {reason}") from error
    if len(raw) > max_bytes:
        raise PromptError(f"{flag}: {_name(file)} is larger than {max_bytes} bytes")
    return raw


def _name(file: Path) -> str:
    return "stdin" if file == Path("-") else str(file)


def _read(file: Path, max_bytes: int) -> bytes:
    if file != Path("-"):
        with file.open("rb") as opened:
            return opened.read(max_bytes + 1)
    if sys.stdin is None:
        raise OSError(0, "it is closed")
    with os.fdopen(sys.stdin.fileno(), "rb", closefd=False) as opened:
        return opened.read(max_bytes + 1)
