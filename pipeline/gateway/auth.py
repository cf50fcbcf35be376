"""Who may use the gateway."""

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import InputError
from pipeline.gateway.errors import ApiError, Kind
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


class KeyRing:
    """Admits whoever has one of the keys; everybody, if there are none.

    Attack: guessing a key byte by byte from answer times, hence digests of equal length, compared
    in constant time, all of them.
    """

    def __init__(self, api_keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def check(self, key: bytes | None) -> bytes:
        """Whose key this is, as its digest. Raises ApiError unless it, or none, may pass."""
        digest = hashlib.sha256(key or b"").digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if any(matches) or not self._digests:
            return digest
        given = "You provided no API key." if key is None else "Incorrect API key provided."
        raise ApiError(
            Kind.NO_KEY,
            f"{given} Send it as the header `Authorization: Bearer KEY` or `X-Api-Key: KEY`.",
            code="invalid_api_key",
        )


def prefix_salt(caller: bytes, cache_salt: str | None) -> bytes:
    """Whose texts go on from each other: those of one caller, and of them those of one salt.

    Attack: who is answered sooner learns that somebody has asked what begins alike.
    """
    own = b"" if cache_salt is None else b"/" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(caller + own).digest()


def is_local_name(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
