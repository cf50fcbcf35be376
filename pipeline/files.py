"""Writing files so that nobody ever sees half of one."""

import os
from pathlib import Path

from pipeline.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write `text` whole or not at all. Raises InputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error
