"""Who may use the gateway over HTTP: what its headers say of that."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from pipeline.gateway.auth import KeyRing, is_local_name
from pipeline.gateway.errors import ApiError, Kind


class Access:
    """Admits requests that carry one of the keys; without keys, those of this machine's programs.

    Attack: without keys, a web page that makes the user's browser call the server, hence only
    names of this machine as Host (DNS rebinding) and Origin.
    """

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def check(self, headers: Mapping[bytes, bytes]) -> bytes:
        """Who sends a request with these headers (lower-case names). Raises ApiError.

        A key comes as OpenAI's clients send it, or as Anthropic's do.
        """
        bearer = _bearer_key(headers.get(b"authorization", b""))
        caller = self._keys.check(headers.get(b"x-api-key") if bearer is None else bearer)
        if self._keys:
            return caller
        origin = headers.get(b"origin", b"")
        if not is_local_name(_host(headers.get(b"host", b""))):
            raise _forbidden("Without an API key, this server answers to loopback names only.")
        if origin and not is_local_name(_host(origin.partition(b"://")[2])):
            raise _forbidden("Without an API key, this server answers no other site's pages.")
        return caller


def _forbidden(message: str) -> ApiError:
    return ApiError(Kind.FORBIDDEN, message)


def _bearer_key(authorization: bytes) -> bytes | None:
    """The key sent; None if there is no such header, no key at all if it is of another scheme."""
    if not authorization:
        return None
    scheme, _, key = authorization.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _host(authority: bytes) -> str:
    try:
        return urlsplit(f"//{authority.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""
