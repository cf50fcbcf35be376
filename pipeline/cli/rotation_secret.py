"""The file that a secret rotation is made from."""

from pathlib import Path

from pipeline.cli.secret_file import load_secret
from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.errors import InputError


def load_rotation(path: Path, width: int, *, may_create: bool) -> SecretRotation:
    """The rotation of that file, which is written first if it may be and there is none.

    Raises PolicyError for a file that others may read, InputError for what is no secret and for a
    width that has no rotation.
    """
    secret = load_secret(path, "--rotate-secret", may_create=may_create)
    try:
        return SecretRotation(secret, width)
    except ValueError as error:
        raise InputError(f"--rotate-secret {path}: {error}") from error
