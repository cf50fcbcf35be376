"""The file that a secret rotation is made from: random bytes that are their owner's alone."""

import secrets
from pathlib import Path

from pipeline.codecs.secret_rotation import MIN_SECRET_BYTES, SecretRotation
from pipeline.errors import InputError, PolicyError
from transport.errors import MisuseError
from transport.private_files import create_private, read_private


def load_rotation(path: Path, width: int, *, may_create: bool) -> SecretRotation:
    """The rotation of that file, which is written first if it may be and there is none.

    Raises PolicyError for a file that others may read, InputError for what is no secret and for a
    width that has no rotation.
    """
    try:
        if may_create and not path.exists():
            create_private(path, secrets.token_bytes(MIN_SECRET_BYTES))
        secret = read_private(path)
    except MisuseError as error:
        raise PolicyError(f"--rotate-secret: {error}") from error
    except OSError as error:
        raise InputError(f"--rotate-secret: cannot use {path}: {error.strerror}") from error
    try:
        return SecretRotation(secret, width)
    except ValueError as error:
        raise InputError(f"--rotate-secret {path}: {error}") from error
