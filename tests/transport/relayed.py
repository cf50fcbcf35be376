"""A relay of one map, and the ends of connections through it."""

import trio

from transport.dial_and_listen import TcpEndpoint, dial, listen
from transport.relay import Relay, RelayMap

LOOPBACK = TcpEndpoint("127.0.0.1", 0)


async def receive(sock, num_bytes=None):
    """So many bytes, or everything up to the end of the stream."""
    data = bytearray()
    while num_bytes is None or len(data) < num_bytes:
        await trio.lowlevel.wait_readable(sock)
        chunk = sock.recv(1 << 16)
        if not chunk:
            break
        data += chunk
    return bytes(data)


async def until(condition):
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110  (the relay has no event to wait for)
            await trio.sleep(0.002)


async def converse(near, far):
    """One byte each way: a connection that its target keeps."""
    near.send(b"?")
    assert await receive(far, 1) == b"?"
    far.send(b"!")
    assert await receive(near, 1) == b"!"


class Running:
    """A relay of one map with the ends of connections through it."""

    def __init__(self, nursery, listening, target, max_connections):
        self.target = listen(target)
        carried_to = self.target.endpoint
        self.relay = Relay([RelayMap(listening, carried_to, max_connections)])
        (self.stats,) = self.relay.stats.values()
        (listener,) = self.relay.listeners.values()
        self.endpoint = listener.endpoint
        nursery.start_soon(self.relay.run)

    async def connect(self):
        near = await dial(self.endpoint)
        return near, await self.target.accept()
