import errno
import os
import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from transport import endpoint as endpoint_module
from transport.endpoint import (
    VSOCK_ANY,
    TcpEndpoint,
    UnixEndpoint,
    VsockEndpoint,
    dial,
    dial_retrying,
    listen,
    parse_endpoint,
)
from transport.errors import EndpointError


async def receive(sock, num_bytes):
    data = b""
    while len(data) < num_bytes:
        await trio.lowlevel.wait_readable(sock)
        chunk = sock.recv(num_bytes - len(data))
        if not chunk:
            break
        data += chunk
    return data


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
    [TcpEndpoint("127.0.0.1", 0), VsockEndpoint(VSOCK_ANY, 1), VsockEndpoint(3, VSOCK_ANY)],
)
async def test_placeholder_addresses_are_not_dialed_nor_retried(endpoint):
    for attempt in (dial(endpoint), dial_retrying(endpoint, pytest.fail)):
        with pytest.raises(EndpointError, match="cannot be dialed"):
            await attempt


async def test_retrying_dial_reports_each_failure_until_someone_listens(tmp_path, autojump_clock):
    endpoint = UnixEndpoint(tmp_path / "s.sock")
    listeners = []
    failures = []

    def on_wait(error):
        failures.append(error)
        if len(failures) == 7:
            listeners.append(listen(endpoint))

    started = trio.current_time()
    (await dial_retrying(endpoint, on_wait)).close()
    listeners[0].close()
    assert len(failures) == 7
    assert 1 < trio.current_time() - started < 2  # 0.05 doubling up to 0.25 s


async def test_retrying_dial_ends_with_the_callers_scope(tmp_path, autojump_clock):
    failures = []
    with trio.move_on_after(10) as scope:
        await dial_retrying(UnixEndpoint(tmp_path / "s.sock"), failures.append)
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
            with trio.fail_after(5):
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


async def test_accept_outlives_a_shortage_of_descriptors(monkeypatch, autojump_clock):
    class Short:
        def __init__(self, sock):
            self._sock = sock
            self.failures = [errno.EMFILE, errno.ECONNABORTED, errno.ENFILE]

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


# --- vsock -----------------------------------------------------------------------------------


class Bridge:
    """Stands in for a monitor: reads the CONNECT line, answers, and then echoes."""

    def __init__(self, path, reply):
        self.line = b""
        self._reply = reply
        self._listener = listen(UnixEndpoint(path))

    async def serve(self):
        with self._listener, await self._listener.accept() as sock:
            while not self.line.endswith(b"\n"):
                self.line += await receive(sock, 1)
            for piece in self._reply:
                await trio.sleep(0.001)
                sock.send(piece)
            await trio.sleep(0.01)


@pytest.mark.parametrize("reply", [[b"OK 1073741824\n"], [b"O", b"K 7", b"\n"]])
async def test_bridged_vsock_is_asked_for_the_port(tmp_path, reply, nursery):
    bridge = Bridge(tmp_path / "v.sock", reply)
    nursery.start_soon(bridge.serve)
    (await dial(UnixEndpoint(tmp_path / "v.sock", 5000))).close()
    assert bridge.line == b"CONNECT 5000\n"


async def test_bytes_right_after_the_bridges_answer_belong_to_the_connection(tmp_path, nursery):
    nursery.start_soon(Bridge(tmp_path / "v.sock", [b"OK 1\nfirst bytes"]).serve)
    with await dial(UnixEndpoint(tmp_path / "v.sock", 5000)) as sock:
        assert await receive(sock, 11) == b"first bytes"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ([], "nothing listens on port 5000"),
        ([b"NO\n"], "instead of OK"),
        ([b"OK\n"], "instead of OK"),
        ([b"OK x\n"], "instead of OK"),
        ([b"OK 1"], "instead of OK"),
        ([b"OK " + b"1" * 100 + b"\n"], "instead of OK"),
        ([b"x" * 1000], "instead of OK"),
    ],
)
async def test_bridge_that_does_not_connect_is_an_error(tmp_path, reply, reason, nursery):
    nursery.start_soon(Bridge(tmp_path / "v.sock", reply).serve)
    with pytest.raises(EndpointError, match=reason):
        await dial(UnixEndpoint(tmp_path / "v.sock", 5000))


async def test_what_a_guest_dials_arrives_at_the_numbered_socket(tmp_path):
    with listen(UnixEndpoint(tmp_path / "v.sock", 9000)) as listener:
        (await dial(UnixEndpoint(tmp_path / "v.sock_9000"))).close()
        (await listener.accept()).close()
    assert not (tmp_path / "v.sock_9000").exists()


async def test_vsock_dials_the_context_id_and_port(monkeypatch, tmp_path):
    class OverUnix(socket.socket):
        def connect_ex(self, address):
            asked.append(address)
            return super().connect_ex(str(tmp_path / "s.sock"))

    def over_unix(family):
        assert family == socket.AF_VSOCK
        sock = OverUnix(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock

    asked = []
    with listen(UnixEndpoint(tmp_path / "s.sock")):
        monkeypatch.setattr(endpoint_module, "_new_socket", over_unix)
        (await dial(VsockEndpoint(16, 5000))).close()
    assert asked == [(16, 5000)]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENODEV, "enclave of this CID is running"),
        (errno.ECONNRESET, "enclave is up and listens"),
        (errno.ETIMEDOUT, "machine is up"),
    ],
)
async def test_unreachable_vsock_is_named_with_a_remedy(monkeypatch, code, remedy):
    class Failing(socket.socket):
        def connect_ex(self, address):
            return code

    monkeypatch.setattr(endpoint_module, "_new_socket", lambda _: Failing(socket.AF_UNIX))
    with pytest.raises(EndpointError, match=remedy) as caught:
        await dial(VsockEndpoint(16, 5000))
    assert "vsock:16:5000" in str(caught.value)


async def test_system_without_vsock_says_so(monkeypatch):
    monkeypatch.delattr(socket, "AF_VSOCK")
    with pytest.raises(EndpointError, match="has no vsock"):
        await dial(VsockEndpoint(3, 1))
    with pytest.raises(EndpointError, match="has no vsock"):
        listen(VsockEndpoint(3, 1))


def test_vsock_listens_where_the_kernel_has_it():
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError as error:
        pytest.skip(f"no vsock in this kernel: {error}")
    with listen(VsockEndpoint(VSOCK_ANY, VSOCK_ANY)) as listener:
        assert listener.endpoint.port != VSOCK_ANY
        with pytest.raises(EndpointError, match="in use"):
            listen(listener.endpoint)
