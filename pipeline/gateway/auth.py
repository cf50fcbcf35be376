"""Who may use the gateway."""

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import InputError
from pipeline.gateway.errors import ApiError
from transport.errors import MisuseError
from transport.private_files import require_unwritable

MAX_KEY_FILE_BYTES = 1 << 16


def load_api_keys(path: Path) -> frozenset[str]:
    """The keys in a file, one a line. Raises InputError, where others may write it too."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if stat.S_ISREG(info.st_mode):  # Attack: another user adds a key of his own.
                require_unwritable(path, info)
            text = file.read(MAX_KEY_FILE_BYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError, MisuseError) as error:
        raise InputError(f"cannot read API keys from {path}: {error}") from error
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not keys or len(text) > MAX_KEY_FILE_BYTES:
        raise InputError(f"{path} holds no API keys; write one a line")
    return keys


class Access:
    """Admits requests that carry one of the keys; without keys, those of this machine's programs.

    Attack: with keys, guessing one byte by byte from answer times, hence digests of equal length,
    compared in constant time, all of them. Without, a web page that makes the user's browser call
    the server, hence only names of this machine as Host (DNS rebinding) and Origin.
    """

    def __init__(self, api_keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise ApiError unless a request with these headers (lower-case names) may pass."""
        if self._digests:
            self._check_key(headers.get(b"authorization", b""))
            return
        origin = headers.get(b"origin", b"")
        if not is_local_name(_host(headers.get(b"host", b""))):
            raise ApiError(403, "Without an API key, this server answers to loopback names only.")
        if origin and not is_local_name(_host(origin.partition(b"://")[2])):
            raise ApiError(403, "Without an API key, this server answers no other site's pages.")

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == b"bearer" and any(matches):
            return
        given = "Incorrect API key provided." if authorization else "You provided no API key."
        raise ApiError(
            401,
            f"{given} Send it as the header `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def is_local_name(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _host(authority: bytes) -> str:
    try:
        return urlsplit(f"//{authority.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""
