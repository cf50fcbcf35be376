"""A file of random bytes that are their owner's alone."""

import secrets
from pathlib import Path

from pipeline.errors import InputError, PolicyError
from transport.errors import MisuseError
from transport.private_files import create_private, read_private

SECRET_BYTES = 32


def load_secret(path: Path, flag: str, *, may_create: bool) -> bytes:
    """What that file holds, which is written first if it may be and there is none.

    Raises PolicyError for a file that others may read, InputError for one that cannot be used.
    """
    try:
        if may_create and not path.exists():
            create_private(path, secrets.token_bytes(SECRET_BYTES))
        return read_private(path)
    except MisuseError as error:
        raise PolicyError(f"{flag}: {error}") from error
    except OSError as error:
        raise InputError(f"{flag}: cannot use {path}: {error.strerror}") from error
