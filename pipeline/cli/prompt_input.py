"""The prompt: from the command line, or from where no list of processes shows it."""

import os
import sys
from pathlib import Path

from pipeline.errors import InputError, PromptError

# Far more than any context holds.
MAX_PROMPT_BYTES = 64 << 20


def read_prompt(text: str | None, file: Path | None) -> str | None:
    """The prompt that was given, if any: `--text`, or the content of `--text-file` (`-`: stdin).

    One line break at a file's end is the editor's and no part of it. Raises InputError.
    """
    if file is None:
        return text
    if text is not None:
        raise InputError("--text and --text-file exclude each other")
    name = "stdin" if file == Path("-") else str(file)
    try:
        raw = _read(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--text-file: cannot read {name}: {reason}") from error
    if len(raw) > MAX_PROMPT_BYTES:
        raise PromptError(f"--text-file: {name} is larger than {MAX_PROMPT_BYTES} bytes")
    try:
        prompt = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"--text-file: {name} is not UTF-8 text") from error
    return prompt.removesuffix("\n").removesuffix("\r")


def _read(file: Path) -> bytes:
    if file != Path("-"):
        with file.open("rb") as opened:
            return opened.read(MAX_PROMPT_BYTES + 1)
    if sys.stdin is None:
        raise OSError(0, "it is closed")
    with os.fdopen(sys.stdin.fileno(), "rb", closefd=False) as opened:
        return opened.read(MAX_PROMPT_BYTES + 1)
