"""The X25519 keys that machines and orchestrators are known by; they never leave their machine."""

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.errors import InputError, PolicyError
from transport.errors import MisuseError
from transport.private_files import create_private, read_private

# Two keys, since a machine may be home and run a stage as well, and no peer may show one's own key.
MACHINE_KEY = "machine.pem"
ORCHESTRATOR_KEY = "orchestrator.pem"


def create_identity(path: Path) -> str:
    """Write a new X25519 key, readable by its owner alone; returns the public key as hex.

    Raises InputError.
    """
    key = X25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        create_private(path, pem)
    except MisuseError as error:
        raise PolicyError(f"cannot create key file {path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot create key file {path}: {error.strerror}") from error
    return key.public_key().public_bytes_raw().hex()


def load_identity(path: Path) -> X25519PrivateKey:
    """Read a key written by `create_identity`. Raises InputError."""
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except MisuseError as error:
        raise PolicyError(f"key file {error}") from error
    except OSError as error:
        raise InputError(f"cannot read key file {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not a key file; `pipeline-orch keygen` makes one") from error
    if not isinstance(key, X25519PrivateKey):
        raise InputError(f"{path} holds another kind of key; `pipeline-orch keygen` makes X25519")
    return key


def state_directory(environment: Mapping[str, str]) -> Path:
    """Where this user's machine keeps what makes it itself. Raises PolicyError."""
    if directory := environment.get("VEILPIPE_STATE_DIR"):
        return Path(directory)
    if state := environment.get("XDG_STATE_HOME"):
        return Path(state) / "veilpipe"
    try:
        return Path.home() / ".local" / "state" / "veilpipe"
    except RuntimeError as error:  # a container's user without HOME and without an account
        raise PolicyError(
            "this user has no home directory for the machine's key; "
            "set VEILPIPE_STATE_DIR to a directory of yours"
        ) from error


def own_identity(directory: Path, name: str) -> X25519PrivateKey:
    """The key of that name, made on first use. Raises InputError."""
    path = directory / name
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_there = path.exists() or path.is_symlink()
    except OSError as error:
        raise InputError(f"cannot make directory {directory}: {error.strerror}") from error
    if not is_there:
        try:
            create_identity(path)
        except InputError as error:
            # Another process may have had its first use at the same time.
            if not isinstance(error.__cause__, FileExistsError):
                raise
    return load_identity(path)


def machine_key(given: Path | None) -> X25519PrivateKey:
    """The key in that file, or this user's machine's, made on first use. Raises InputError."""
    if given is not None:
        return load_identity(given)
    return own_identity(state_directory(os.environ), MACHINE_KEY)


def public_hex(key: X25519PrivateKey) -> str:
    """The public key as manifests have it."""
    return key.public_key().public_bytes_raw().hex()


def fingerprint(public_key: bytes) -> str:
    """A key's name for people to compare, in the form in which SSH shows its own."""
    digest = hashlib.sha256(public_key).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
