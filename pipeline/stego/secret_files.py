"""Secrets in files: made, read, and what lies beside them."""

import secrets
from pathlib import Path

from pipeline.files import is_file, write_atomically
from pipeline.stego.errors import StegoError
from pipeline.stego.fingerprint import MAX_FILE_BYTES, Fingerprint, parse_fingerprint
from pipeline.stego.keys import SECRET_BYTES, Secret
from transport.errors import MisuseError
from transport.private_files import create_private, read_private

MAX_PASSPHRASE_BYTES = 1024


def create_secret(path: Path, fingerprint: Fingerprint) -> Path:
    """Write a new secret, its owner's alone to read, and the fingerprint's file, which it returns.

    Raises InputError, where there is a file already too.
    """
    try:
        create_private(path, secrets.token_bytes(SECRET_BYTES))
    except MisuseError as error:
        raise StegoError(f"cannot create secret file {path}: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StegoError(f"cannot create secret file {path}: {reason}") from error
    beside = fingerprint_path(path)
    write_atomically(beside, fingerprint.to_json())
    return beside


def fingerprint_path(secret_file: Path) -> Path:
    """Where the fingerprint of a secret lies."""
    return secret_file.with_name(secret_file.name + ".fingerprint.json")


def read_secret(secret_file: Path | None, passphrase_file: Path | None) -> Secret:
    """What the files hold, which others may not read. Raises StegoError.

    One line break at the end of a passphrase's file is the editor's and no part of it.
    """
    key = _read(secret_file, "secret") if secret_file is not None else b""
    passphrase = b""
    if passphrase_file is not None:
        passphrase = _read(passphrase_file, "passphrase")
        passphrase = passphrase.removesuffix(b"\n").removesuffix(b"\r")
        check_passphrase(passphrase)
    if secret_file is not None and len(key) != SECRET_BYTES:
        raise StegoError(
            f"{secret_file} is no secret: it has {len(key)} bytes, not {SECRET_BYTES}; "
            "`pipeline-orch stego keygen` makes one, and a passphrase goes by --passphrase-file"
        )
    return Secret(key, passphrase)


def check_passphrase(passphrase: bytes) -> None:
    """Raise StegoError for one that is empty or too long."""
    if not 0 < len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise StegoError(f"a passphrase has 1 to {MAX_PASSPHRASE_BYTES} bytes")


def read_fingerprint(secret_file: Path | None) -> Fingerprint | None:
    """The fingerprint beside a secret, if it is there. Raises InputError."""
    path = None if secret_file is None else fingerprint_path(secret_file)
    if path is None or not is_file(path):
        return None
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise StegoError(f"cannot read {path}: {error.strerror}") from error
    return parse_fingerprint(text, str(path))


def _read(path: Path, what: str) -> bytes:
    try:
        return read_private(path)
    except MisuseError as error:
        raise StegoError(f"cannot use {what} file: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StegoError(
            f"cannot read {what} file {path}: {'it is a directory' if path.is_dir() else reason}"
        ) from error
