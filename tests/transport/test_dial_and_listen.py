"""Dialing and listening over TCP and Unix sockets."""

import errno
import os
import socket
from contextlib import ExitStack
from ipaddress import ip_address
from itertools import pairwise
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from tests.transport.sockets import receive
from transport import dial_and_listen as endpoint_module
from transport.dial_and_listen import (
    VSOCK_ANY,
    VSOCK_UNDECIDED,
    TcpEndpoint,
    UnixEndpoint,
    VsockEndpoint,
    dial,
    dial_retrying,
    listen,
    parse_cids,
    parse_endpoint,
)
from transport.errors import DialRefused, EndpointError

# --- connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix:{}/s.sock"])
async def test_bytes_pass_both_ways_without_blocking(text, tmp_path):
    with listen(parse_endpoint(text.format(tmp_path))) as listener:
        dialed = await dial(listener.endpoint)
        accepted = await listener.accept()
        with dialed, accepted:
            assert not dialed.getblocking()
            assert not accepted.getblocking()
            dialed.send(b"ping")
            assert await receive(accepted, 4) == b"ping"
            accepted.send(b"pong")
            assert await receive(dialed, 4) == b"pong"
            if isinstance(listener.endpoint, TcpEndpoint):
                for sock in (dialed, accepted):
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_refused_connection_is_named(tmp_path):
    with listen(TcpEndpoint("127.0.0.1", 0)) as listener:
        free = listener.endpoint
    for endpoint in (free, UnixEndpoint(tmp_path / "absent.sock")):
        with pytest.raises(EndpointError, match="start the listener first") as caught:
            await dial(endpoint)
        assert str(endpoint) in str(caught.value)


async def test_host_that_does_not_resolve_is_named(monkeypatch):
    async def unresolvable(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", unresolvable)
    with pytest.raises(EndpointError, match="cannot resolve host 'absent'"):
        await dial(TcpEndpoint("absent", 1))


async def test_every_address_of_a_host_is_tried(monkeypatch):
    with (
        listen(TcpEndpoint("127.0.0.1", 0)) as listener,
        listen(TcpEndpoint("127.0.0.1", 0)) as closed,
    ):
        closed.close()
        addresses = [closed.endpoint, listener.endpoint]

        async def both(*_, **__):
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 0, "", (each.host, each.port))
                for each in addresses
            ]

        monkeypatch.setattr(trio.socket, "getaddrinfo", both)
        (await dial(TcpEndpoint("two-addresses", 1))).close()


@pytest.mark.parametrize(
    "endpoint",
    [
        TcpEndpoint("127.0.0.1", 0),
        VsockEndpoint(VSOCK_ANY, 1),
        VsockEndpoint(3, VSOCK_ANY),
        VsockEndpoint(VSOCK_UNDECIDED, 1),
    ],
)
async def test_placeholder_addresses_are_not_dialed_nor_retried(endpoint):
    for attempt in (dial(endpoint), dial_retrying(lambda: endpoint, pytest.fail)):
        with pytest.raises(EndpointError, match=r"cannot be dialed|name it with --cid STAGE=CID"):
            await attempt


@pytest.mark.parametrize("cid", [VSOCK_UNDECIDED, VSOCK_ANY])
def test_a_cid_that_launching_decides_is_listened_on_whichever_it_is(monkeypatch, cid):
    bound = []

    def bind(endpoint, family, address):
        bound.append((family, address))
        return SimpleNamespace(getsockname=lambda: address)

    monkeypatch.setattr(endpoint_module, "_bind", bind)
    assert listen(VsockEndpoint(cid, 5000)).endpoint == VsockEndpoint(VSOCK_ANY, 5000)
    assert bound == [(socket.AF_VSOCK, (VSOCK_ANY, 5000))]


def test_cids_are_read_by_stage_and_what_is_none_is_named():
    assert parse_cids(["0=16", "12=4294967294", "0=16"]) == {0: 16, 12: 4294967294}
    for text in ("1", "1=", "=16", "1=x", "-1=16", "1=0", "1=4294967295", "1=1.5", "١=x", ""):
        with pytest.raises(EndpointError, match="STAGE=CID"):
            parse_cids([text])
    with pytest.raises(EndpointError, match="stage 1 has another CID"):
        parse_cids(["1=16", "1=17"])


async def test_retrying_dial_reports_each_failure_until_someone_listens(tmp_path, autojump_clock):
    endpoint = UnixEndpoint(tmp_path / "s.sock")
    listeners = []
    failed_at = []

    def on_wait(error):
        failed_at.append(trio.current_time())
        if failed_at[-1] > 100:
            listeners.append(listen(endpoint))

    (await dial_retrying(lambda: endpoint, on_wait)).close()
    listeners[0].close()
    # One that was away for a moment is met at once, one that was away for long within 2 s.
    pauses = [(later, later - earlier) for earlier, later in pairwise(failed_at)]
    assert all(pause <= max(0.05, 0.05 * away) + 1e-9 for away, pause in pauses)
    assert 1.5 <= max(pause for _, pause in pauses) <= 2  # chance takes off a quarter at most
    assert len(pauses) < 200


async def test_retrying_dial_finds_a_peer_that_comes_up_elsewhere(tmp_path, autojump_clock):
    places = [UnixEndpoint(tmp_path / name) for name in ("before", "after")]
    failures = []

    def on_wait(error):
        failures.append(str(error))

    with listen(places[1]):
        (await dial_retrying(lambda: places[len(failures) > 2], on_wait)).close()
    assert len(failures) == 3
    assert all(str(places[0]) in failure for failure in failures)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::ffff:127.0.0.1"])
async def test_an_address_that_is_not_permitted_is_never_dialed(host):
    with listen(TcpEndpoint("127.0.0.1", 0)) as listener:
        endpoint = TcpEndpoint(host, listener.endpoint.port)
        judged = []

        def permit(address):
            judged.append(address)
            return False

        for attempt in (dial(endpoint, permit), dial_retrying(lambda: endpoint, print, permit)):
            with pytest.raises(DialRefused, match="stands for"):
                await attempt
        with pytest.raises(BlockingIOError):
            listener._sock.accept()
    assert ip_address("127.0.0.1") in judged


async def test_of_a_names_addresses_only_those_permitted_are_dialed(monkeypatch):
    with listen(TcpEndpoint("127.0.0.1", 0)) as listener:
        port = listener.endpoint.port

        async def both(*_, **__):
            await trio.lowlevel.checkpoint()
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))
                for host in ("127.0.0.2", "127.0.0.1")
            ]

        monkeypatch.setattr(trio.socket, "getaddrinfo", both)
        with await dial(TcpEndpoint("two", 1), lambda ip: str(ip) == "127.0.0.1") as sock:
            assert sock.getpeername() == ("127.0.0.1", port)


async def test_retrying_dial_ends_with_the_callers_scope(tmp_path, autojump_clock):
    failures = []
    with trio.move_on_after(10) as scope:
        await dial_retrying(lambda: UnixEndpoint(tmp_path / "s.sock"), failures.append)
    assert scope.cancelled_caught
    assert len(failures) > 10


async def test_cancelled_dial_leaves_no_socket_open(monkeypatch):
    made = []

    class Pending(socket.socket):
        def connect_ex(self, address):
            return errno.EINPROGRESS

    def pending(family):
        sock = Pending(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        made.append(sock)
        return sock

    async def never(_):
        await trio.sleep_forever()

    monkeypatch.setattr(endpoint_module, "_new_socket", pending)
    monkeypatch.setattr(trio.lowlevel, "wait_writable", never)
    with trio.move_on_after(0.01):
        await dial(TcpEndpoint("127.0.0.1", 1))
    assert [sock.fileno() for sock in made] == [-1]


# --- listening -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["127.0.0.1:0", "unix:{}/s.sock", "unix:{}/v.sock:5000"])
async def test_address_in_use_is_refused(text, tmp_path):
    with listen(parse_endpoint(text.format(tmp_path))) as listener:
        with pytest.raises(EndpointError, match="in use; stop what listens there"):
            listen(listener.endpoint)
        with trio.move_on_after(0.05) as scope:  # the refused one left no connection behind
            await listener.accept()
        assert scope.cancelled_caught


def test_address_of_another_machine_is_refused():
    with pytest.raises(EndpointError, match="an address of this machine"):
        listen(TcpEndpoint("192.0.2.1", 0))


async def test_stale_socket_file_is_replaced(tmp_path):
    endpoint = UnixEndpoint(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(endpoint.path))
    with listen(endpoint) as listener:
        (await dial(endpoint)).close()
        (await listener.accept()).close()


def test_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(EndpointError, match="is not a socket"):
        listen(UnixEndpoint(path))
    assert path.read_text() == "data"


def test_closing_removes_the_socket_file_and_only_its_own(tmp_path):
    endpoint = UnixEndpoint(tmp_path / "s.sock")
    first = listen(endpoint)
    endpoint.path.unlink()
    second = listen(endpoint)
    first.close()
    assert endpoint.path.exists()
    second.close()
    second.close()
    assert not endpoint.path.exists()


async def test_a_dial_is_taken_behind_a_crowd_that_nobody_has_accepted_yet():
    with listen(TcpEndpoint("127.0.0.1", 0)) as listener, ExitStack() as crowd:
        for _ in range(200):
            with trio.fail_after(60):
                crowd.enter_context(await dial(listener.endpoint))


async def test_closing_ends_a_pending_accept():
    listener = listen(TcpEndpoint("127.0.0.1", 0))
    async with trio.open_nursery() as nursery:

        async def accept():
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        listener.close()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


@pytest.mark.parametrize(
    "codes",
    [(errno.EMFILE, errno.ECONNABORTED, errno.ENFILE),
     (errno.ENETDOWN, errno.EHOSTUNREACH, errno.EPROTO)],
    ids=["no descriptors", "no network"],
)  # fmt: skip
async def test_accept_outlives_what_passes(monkeypatch, autojump_clock, codes):
    class Short:
        def __init__(self, sock):
            self._sock = sock
            self.failures = list(codes)

        def accept(self):
            if self.failures:
                code = self.failures.pop()
                raise OSError(code, os.strerror(code))
            return self._sock.accept()

        def __getattr__(self, name):
            return getattr(self._sock, name)

    with listen(TcpEndpoint("127.0.0.1", 0)) as listener:
        (await dial(listener.endpoint)).close()
        monkeypatch.setattr(listener, "_sock", Short(listener._sock))
        (await listener.accept()).close()


async def test_an_attempt_that_nobody_answers_ends_and_the_next_begins_anew(monkeypatch):
    monkeypatch.setattr(endpoint_module, "ATTEMPT_S", 0.2)
    failures, scope = [], trio.CancelScope()

    def on_wait(error):
        failures.append(error)
        if len(failures) == 3:
            scope.cancel()

    # A queue of connections that is full: the system drops what comes, as a dead network does.
    with ExitStack() as open_sockets, socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        for _ in range(8):
            waiting = open_sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        began = trio.current_time()
        with trio.fail_after(60), scope:
            await dial_retrying(lambda: TcpEndpoint(*address), on_wait)
    assert trio.current_time() - began >= 3 * 0.2
    assert all("timed out" in str(failure) for failure in failures)
