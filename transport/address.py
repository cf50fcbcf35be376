"""How a listening place is named: TCP, UNIX sockets, AF_VSOCK and vsock bridged over UNIX.

A bridged ("hybrid") vsock is a UNIX socket of the virtual machine monitor: see `endpoint`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from transport.errors import EndpointError
from transport.frozen import frozen

MAX_TCP_PORT: Final = 0xFFFF
MAX_VSOCK_NUMBER: Final = 0xFFFF_FFFF  # CIDs and ports are 32 bits; all ones means "any"
VSOCK_ANY: Final = 0xFFFF_FFFF
VSOCK_UNDECIDED: Final = 0  # nobody's CID: a template says it where launching decides
PARENT_CID: Final = 3  # of a Nitro enclave's parent instance
MAX_UNIX_PATH_BYTES: Final = 107  # sun_path holds 108 with the closing zero

_FORMS: Final = (
    'write "HOST:PORT", "tcp:HOST:PORT", "[IPV6]:PORT", "unix:/PATH", "unix:/PATH:PORT" '
    'or "vsock:CID:PORT"'
)


@frozen
class TcpEndpoint:
    """A TCP host and port; port 0 lets the system choose one when listening.

    Raises: EndpointError.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not self.host or any(c.isspace() or c in "[]/" for c in self.host):
            raise EndpointError(f"{self.host!r} is not a host name or address; {_FORMS}")
        _require_number(self.port, "TCP port", MAX_TCP_PORT)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@frozen
class UnixEndpoint:
    """A UNIX socket; with a port, a vsock bridged over it (see the module's text).

    Raises: EndpointError.
    """

    path: Path
    port: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a str is taken too
        text = str(self.path)
        if text == "." or "\0" in text:
            raise EndpointError(f"{text!r} is not a socket path; {_FORMS}")
        if self.port is None:
            if text.rpartition(":")[2].isdecimal() and ":" in text:
                raise EndpointError(
                    f"socket path {text!r} ends like a port, which its text form cannot tell "
                    "apart; choose another name"
                )
        else:
            _require_number(self.port, "vsock port", MAX_VSOCK_NUMBER)
        longest = self.listen_path
        if len(os.fsencode(longest)) > MAX_UNIX_PATH_BYTES:
            raise EndpointError(
                f"socket path {str(longest)!r} has {len(os.fsencode(longest))} bytes, the system "
                f"allows {MAX_UNIX_PATH_BYTES}; choose a shorter directory"
            )

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.port is None else f"unix:{self.path}:{self.port}"

    @property
    def listen_path(self) -> Path:
        """Where a listener binds: `<path>_<port>` when bridged, where a guest's dials arrive."""
        return self.path if self.port is None else Path(f"{self.path}_{self.port}")


@frozen
class VsockEndpoint:
    """An AF_VSOCK context id and port.

    VSOCK_ANY as the context id listens on every one, and so does VSOCK_UNDECIDED.

    Raises: EndpointError.
    """

    cid: int
    port: int

    def __post_init__(self) -> None:
        _require_number(self.cid, "vsock CID", MAX_VSOCK_NUMBER)
        _require_number(self.port, "vsock port", MAX_VSOCK_NUMBER)

    def __str__(self) -> str:
        return f"vsock:{'any' if self.cid == VSOCK_ANY else self.cid}:{self.port}"


Endpoint = TcpEndpoint | UnixEndpoint | VsockEndpoint


def parse_endpoint(text: str) -> Endpoint:
    """The endpoint a text names; `str` of the result parses to it again. Raises: EndpointError."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "unix":
        return _parse_unix(text, rest)
    if colon and scheme == "vsock":
        cid, colon, port = rest.partition(":")
        if not colon:
            raise EndpointError(f"address {text!r} is not valid; {_FORMS}")
        return VsockEndpoint(
            VSOCK_ANY if cid == "any" else _parse_number(text, cid), _parse_number(text, port)
        )
    return _parse_tcp(text, rest if colon and scheme == "tcp" else text)


def parse_cids(texts: Iterable[str]) -> dict[int, int]:
    """The CIDs of started enclaves by stage, of texts like `1=17`. Raises: EndpointError."""
    cids: dict[int, int] = {}
    for text in texts:
        stage, _, cid = text.partition("=")
        if not stage.isdecimal() or not cid.isdecimal() or not 0 < int(cid) < VSOCK_ANY:
            raise EndpointError(f"--cid {text}: write STAGE=CID, such as 1=17")
        if cids.setdefault(int(stage), int(cid)) != int(cid):
            raise EndpointError(f"--cid {text}: stage {stage} has another CID already")
    return cids


def _parse_tcp(text: str, rest: str) -> TcpEndpoint:
    host, colon, port = rest.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    # An IPv6 address without brackets would leave open where the port begins.
    if not colon or not host or (":" in host) != is_bracketed:
        raise EndpointError(f"address {text!r} is not valid; {_FORMS}")
    return TcpEndpoint(host, _parse_number(text, port))


def _parse_unix(text: str, rest: str) -> UnixEndpoint:
    path, colon, port = rest.rpartition(":")
    if colon and port.isdecimal():
        endpoint = UnixEndpoint(Path(path), _parse_number(text, port))
    else:
        endpoint = UnixEndpoint(Path(rest))
    return endpoint


def _parse_number(text: str, digits: str) -> int:
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 10):
        raise EndpointError(f"{digits!r} in address {text!r} is not a number; {_FORMS}")
    return int(digits)


def _require_number(value: int, what: str, maximum: int) -> None:
    if not 0 <= value <= maximum:
        raise EndpointError(f"{what} {value} is out of range; choose 0 to {maximum}")
