"""A door far away, by its URL."""

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from pipeline.doors.grpc_client import open_grpc_door
from pipeline.doors.http_app import MAX_BODY_BYTES
from pipeline.doors.http_client import RUNPOD_BODY_BYTES, open_http_door
from pipeline.doors.messages import Door
from pipeline.errors import InputError, PolicyError
from transport.errors import MisuseError
from transport.private_files import read_private

RUNPOD_API = "https://api.runpod.ai/v2"
KEY_VARIABLE = "RUNPOD_API_KEY"
_EXAMPLES = "grpcs://HOST:PORT, https://HOST/PATH or runpod://ENDPOINT"
_PLAIN = {"grpc", "http"}


class DistantDoor(Door, Protocol):
    """A door, and how many bytes of `cloaked_embedding` a request to it can carry.

    A prompt that does not fit goes in chunks. Its calls raise DoorError, with the fault that the
    door names, and SessionError where it is not reached; to try again is the caller's decision.
    """

    @property
    def max_body_bytes(self) -> int:
        """The largest sealed body, `cloaked_embedding`, of one request."""


@asynccontextmanager
async def connect(
    url: str,
    *,
    is_dev: bool = False,
    ca_file: Path | None = None,
    bearer_key: str | None = None,
    runpod_api: str = RUNPOD_API,
) -> AsyncIterator[DistantDoor]:
    """The door at `url`; nothing is sent before its first call.

    `is_dev` allows grpc:// and http://, where all but the sealed bodies can be read and changed
    on the way. `ca_file`: who signs certificates, instead of the system's authorities.
    `bearer_key`: what HTTP doors ask for. Raises InputError, PolicyError.
    """
    parts = _split(url)
    scheme = parts.scheme
    if scheme in _PLAIN and not is_dev:
        raise PolicyError(f"{scheme}:// is for development; use {scheme}s://, or give --dev")
    tls = _trusting(ca_file)
    if scheme in {"grpc", "grpcs"}:
        port = parts.port
        if port is None or parts.path.strip("/"):
            raise InputError(f"{url} is no door; it should be {scheme}://HOST:PORT")
        secure = tls if scheme == "grpcs" else None
        async with open_grpc_door(str(parts.hostname), port, secure) as grpc_door:
            yield grpc_door
        return
    limit = MAX_BODY_BYTES
    if scheme == "runpod":
        if bearer_key is None:
            raise InputError(f"runpod:// needs the account's key: a file of it, or {KEY_VARIABLE}")
        url, limit = f"{runpod_api}/{parts.netloc}", RUNPOD_BODY_BYTES
    async with open_http_door(url, tls, bearer_key, limit) as http_door:
        yield http_door


def load_bearer_key(path: Path | None, environ: Mapping[str, str]) -> str | None:
    """The key in a file of its owner's alone, else in the variable RUNPOD_API_KEY, if anywhere.

    Raises InputError, PolicyError where others may read the file.
    """
    if path is None:
        return environ.get(KEY_VARIABLE, "").strip() or None
    try:
        key = read_private(path).decode("ascii").strip()
    except MisuseError as error:
        raise PolicyError(str(error)) from error
    except OSError as error:
        raise InputError(f"cannot read the door's key from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} holds no key: it is not ASCII") from error
    if not key:
        raise InputError(f"{path} holds no key")
    return key


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError as error:  # a port or address that cannot be
        raise InputError(f"{url} is no door: {error}") from error
    if parts.scheme not in {"grpcs", "https", "runpod", *_PLAIN} or not is_whole:
        raise InputError(f"{url} is no door; it should be {_EXAMPLES}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(f"{parts.scheme}:// takes a host and a path, and nothing more")
    is_name = parts.netloc.replace("-", "").replace("_", "").isalnum() and not parts.path
    if parts.scheme == "runpod" and not is_name:
        raise InputError(f"{url} is no endpoint; it should be runpod://ENDPOINT")
    return parts


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot use the authority in {ca_file}: {reason}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
