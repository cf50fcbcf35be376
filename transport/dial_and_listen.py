"""Dialing and listening over TCP, UNIX sockets, AF_VSOCK and vsock bridged over UNIX.

A bridged ("hybrid") vsock is a UNIX socket of the virtual machine monitor. A host reaches port P of
the guest by connecting to the socket and writing the line `CONNECT P`, answered `OK <port>`; what
the guest dials on the host's port P arrives at the socket named `<path>_<P>`.
Source: Firecracker's vsock documentation; vhost-device-vsock does the same.
"""

import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import trio

from transport.address import (
    PARENT_CID,
    VSOCK_ANY,
    VSOCK_UNDECIDED,
    Endpoint,
    TcpEndpoint,
    UnixEndpoint,
    VsockEndpoint,
    parse_cids,
    parse_endpoint,
)
from transport.dial_errors import failed, unresolvable, vsock_family
from transport.errors import DialRefused, EndpointError
from transport.retries import Retries, RetryPolicy

__all__ = [
    "PARENT_CID",
    "VSOCK_ANY",
    "VSOCK_UNDECIDED",
    "Endpoint",
    "Listener",
    "Permit",
    "TcpEndpoint",
    "UnixEndpoint",
    "VsockEndpoint",
    "dial",
    "dial_retrying",
    "listen",
    "parse_cids",
    "parse_endpoint",
]

MAX_BRIDGE_REPLY_BYTES: Final = 32  # b"OK 4294967295" and a newline are 14; some slack
# Between two sessions nobody accepts on a stage's data port: strangers who wait there must be very
# many before the right peer's dial is not taken; the next session then meets all of them at once.
LISTEN_BACKLOG: Final = 1024
# A packet without an answer is sent again after 1, 3, 7, 15 s and so on: a network that comes back
# meanwhile would be noticed a minute late by an attempt that is not begun anew.
ATTEMPT_S: Final = 5.0
NO_DESCRIPTORS_PAUSE_S: Final = 0.1  # accept fails at once while descriptors are out: do not spin

# What `accept` tells of the connection, not of the listener: the peer left before it was accepted,
# or the network that it came by did (accept(2)).
_OF_THE_PEER: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("ECONNABORTED", "ENETDOWN", "EPROTO", "ENOPROTOOPT", "EHOSTDOWN", "ENONET"),
        *("EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT"),
    )
    if hasattr(errno, name)  # not everywhere
)
_NO_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_Address = tuple[Any, ...] | str  # as the socket module takes it for the family
Permit = Callable[[IPv4Address | IPv6Address], bool]  # whether an address may be dialed

_log = logging.getLogger(__name__)


async def dial(endpoint: Endpoint, permit: Permit | None = None) -> socket.socket:
    """One attempt to connect: a non-blocking socket, with TCP_NODELAY where it is TCP.

    `permit` judges the very addresses that a TCP host stands for now, and only those it lets pass
    are dialed: a name that stands for another one the next time it is asked for gains nothing.

    Raises: EndpointError naming the endpoint, the cause and a remedy; DialRefused where `permit`
    lets none of the addresses pass.
    """
    _require_dialable(endpoint)
    match endpoint:
        case TcpEndpoint():
            return await _dial_tcp(endpoint, permit)
        case UnixEndpoint(path=path, port=port):
            sock = await _connect(endpoint, socket.AF_UNIX, str(path))
            if port is None:
                return sock
            return await _bridge(sock, endpoint, port)
        case VsockEndpoint(cid=cid, port=port):
            return await _connect(endpoint, vsock_family(endpoint), (cid, port))


async def dial_retrying(
    where: Callable[[], Endpoint],
    on_wait: Callable[[EndpointError], None],
    permit: Permit | None = None,
    retries: Retries | None = None,
) -> socket.socket:
    """Dials until it succeeds or the caller's cancel scope ends; `on_wait` sees each failure.

    `where` is asked before each attempt: whoever is awaited may come back elsewhere.

    Raises: EndpointError where no attempt could ever succeed, DialRefused among them; AttemptsSpent
    where `retries` have an end.
    """
    retries = retries or Retries(RetryPolicy())
    while True:
        endpoint = where()
        _require_dialable(endpoint)
        try:
            return await dial(endpoint, permit)
        except DialRefused:
            raise
        except EndpointError as error:
            on_wait(error)
            await retries.pause(error)


def _require_dialable(endpoint: Endpoint) -> None:
    """Port 0 and the "any" numbers mean "choose for me", which only a listener can."""
    match endpoint:
        case TcpEndpoint(port=0):
            problem = "port 0 cannot be dialed; name the port the listener printed"
        case VsockEndpoint(cid=cid) if cid == VSOCK_UNDECIDED:
            problem = "CID 0 stands for one that launching decides; name it with --cid STAGE=CID"
        case VsockEndpoint(cid=cid, port=port) if VSOCK_ANY in (cid, port):
            problem = "vsock 'any' cannot be dialed; name the enclave's CID and port"
        case _:
            return
    raise EndpointError(f"cannot dial {endpoint}: {problem}")


async def _dial_tcp(endpoint: TcpEndpoint, permit: Permit | None) -> socket.socket:
    try:
        infos = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise unresolvable(endpoint, error) from error
    failure: EndpointError | None = None
    for family, _, _, _, address in infos:
        if permit is not None and not permit(_plain_address(address)):
            failure = failure or DialRefused(f"{endpoint} stands for {address[0]}")
            continue
        try:
            sock = await _connect(endpoint, family, address)
        except EndpointError as error:
            # The first address that may be dialed is the preferred one: report it.
            failure = error if isinstance(failure, DialRefused | None) else failure
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    raise failure or unresolvable(endpoint, OSError("no address"))


def _plain_address(address: _Address) -> IPv4Address | IPv6Address:
    """An IPv4 address in IPv6's clothes is dialed as IPv4, and so it is judged as that."""
    plain = ip_address(address[0])
    return getattr(plain, "ipv4_mapped", None) or plain


async def _connect(endpoint: Endpoint, family: int, address: _Address) -> socket.socket:
    try:
        sock = _new_socket(family)
    except OSError as error:
        raise failed("dial", endpoint, error) from error
    try:
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            with trio.move_on_after(ATTEMPT_S) as attempt:
                await trio.lowlevel.wait_writable(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if attempt.cancelled_caught:
                code = errno.ETIMEDOUT
        if code:
            raise failed("dial", endpoint, OSError(code, os.strerror(code)))
    except BaseException:
        sock.close()
        raise
    return sock


def _new_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


async def _bridge(sock: socket.socket, endpoint: UnixEndpoint, port: int) -> socket.socket:
    """Asks the monitor behind the socket for the guest's port; closes the socket on failure."""
    try:
        sock.send(b"CONNECT %d\n" % port)  # 19 bytes into an empty socket buffer: never partial
        reply = await _read_line(sock)
    except OSError as error:
        sock.close()
        raise failed("dial", endpoint, error) from error
    except BaseException:
        sock.close()
        raise
    verdict, _, number = reply.partition(b" ")
    if verdict == b"OK" and number.endswith(b"\n") and number[:-1].isdigit():
        return sock
    sock.close()
    if not reply:
        raise EndpointError(
            f"cannot dial {endpoint}: nothing listens on port {port} behind {endpoint.path}; "
            "start the enclave's service first"
        )
    raise EndpointError(
        f"cannot dial {endpoint}: {endpoint.path} answered {reply!r} instead of OK; "
        "is it the socket of a vsock bridge?"
    )


async def _read_line(sock: socket.socket) -> bytes:
    """One bounded line, byte by byte: what follows the newline belongs to the connection."""
    line = bytearray()
    while len(line) < MAX_BRIDGE_REPLY_BYTES and not line.endswith(b"\n"):
        try:
            byte = sock.recv(1)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if not byte:
            break
        line += byte
    return bytes(line)


# --- listening -------------------------------------------------------------------------------


class Listener:
    """A bound, listening socket; `endpoint` is its actual address (the port chosen for port 0).

    Takes one accepting task at a time. Closing it ends a pending `accept` with
    trio.ClosedResourceError and removes the socket file it made.
    """

    def __init__(self, sock: socket.socket, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._sock = sock
        self._file_id = _file_id(endpoint)

    async def accept(self) -> socket.socket:
        """The next connection, non-blocking, with TCP_NODELAY where it is TCP.

        Raises: EndpointError, trio.ClosedResourceError.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self._sock.fileno() < 0:
                raise trio.ClosedResourceError(f"listener on {self.endpoint} is closed")
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
            except OSError as error:
                if error.errno in _OF_THE_PEER:
                    await trio.lowlevel.checkpoint()
                    continue
                if error.errno not in _NO_DESCRIPTORS:
                    raise failed("accept on", self.endpoint, error) from error
                _log.warning("accept waits endpoint=%s cause=%s", self.endpoint, error.strerror)
                await trio.sleep(NO_DESCRIPTORS_PAUSE_S)
            else:
                sock.setblocking(False)
                if isinstance(self.endpoint, TcpEndpoint):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock

    def close(self) -> None:
        """Stops listening; idempotent."""
        if self._sock.fileno() < 0:
            return
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        # Another process may have taken the path meanwhile: remove only our own file.
        if self._file_id is not None and _file_id(self.endpoint) == self._file_id:
            with suppress(OSError):
                _listen_path(self.endpoint).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def listen(endpoint: Endpoint) -> Listener:
    """A listener on the endpoint. Raises: EndpointError, also when something listens there."""
    match endpoint:
        case TcpEndpoint():
            sock = _listen_tcp(endpoint)
            return Listener(sock, TcpEndpoint(endpoint.host, sock.getsockname()[1]))
        case UnixEndpoint():
            _remove_stale(endpoint)
            return Listener(_bind(endpoint, socket.AF_UNIX, str(endpoint.listen_path)), endpoint)
        case VsockEndpoint(cid=cid, port=port):
            cid = VSOCK_ANY if cid == VSOCK_UNDECIDED else cid
            sock = _bind(endpoint, vsock_family(endpoint), (cid, port))
            return Listener(sock, VsockEndpoint(cid, sock.getsockname()[1]))


def _listen_tcp(endpoint: TcpEndpoint) -> socket.socket:
    try:
        infos = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise unresolvable(endpoint, error) from error
    family, _, _, _, address = infos[0]
    return _bind(endpoint, family, address)


def _bind(endpoint: Endpoint, family: int, address: _Address) -> socket.socket:
    try:
        sock = _new_socket(family)
    except OSError as error:
        raise failed("listen on", endpoint, error) from error
    try:
        if isinstance(endpoint, TcpEndpoint):
            # Lets a restart bind while connections of the last run still linger in TIME_WAIT.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise failed("listen on", endpoint, error) from error
    return sock


def _remove_stale(endpoint: UnixEndpoint) -> None:
    """Removes the socket file of a process that is gone; leaves everything else for bind to hit."""
    path = endpoint.listen_path
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return
    if not is_socket:
        raise EndpointError(
            f"cannot listen on {endpoint}: {path} exists and is not a socket; choose another path"
        )
    # A datagram socket cannot connect to a stream one, so a living owner sees nothing of this.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            with suppress(OSError):
                path.unlink()


def _listen_path(endpoint: Endpoint) -> Path:
    assert isinstance(endpoint, UnixEndpoint), "only UNIX listeners have a file id"
    return endpoint.listen_path


def _file_id(endpoint: Endpoint) -> tuple[int, int] | None:
    if not isinstance(endpoint, UnixEndpoint):
        return None
    try:
        info = endpoint.listen_path.lstat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
