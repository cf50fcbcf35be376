"""Vsock: the kernel's own, and a monitor's bridge to it over Unix sockets."""

import errno
import socket

import pytest
import trio

from tests.transport.sockets import receive
from transport import dial_and_listen as endpoint_module
from transport.dial_and_listen import (
    VSOCK_ANY,
    UnixEndpoint,
    VsockEndpoint,
    dial,
    listen,
)
from transport.errors import EndpointError


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


async def test_of_a_bridges_two_files_the_one_that_fails_is_named(tmp_path):
    endpoint = UnixEndpoint(tmp_path / "absent" / "v.sock", 9000)
    with pytest.raises(EndpointError, match=r"absent/v\.sock: No such file"):
        await dial(endpoint)
    with pytest.raises(EndpointError, match=r"absent/v\.sock_9000: No such file"):
        listen(endpoint)


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
