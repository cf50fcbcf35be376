"""Clients that do not keep to the protocol, or to its spirit: one answer each, and others go on."""

import socket
import struct

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
import trio

from pipeline.doors import call as call_module
from pipeline.doors import listening
from pipeline.doors.call import BodyBudget
from pipeline.doors.grpc_client import open_grpc_door
from pipeline.doors.messages import InferRequest

HEADERS = [
    (":method", "POST"), (":scheme", "http"), (":authority", "door"),
    (":path", "/infemeral.TensorInference/Infer"), ("te", "trailers"),
    ("content-type", "application/grpc"),
]  # fmt: skip
REQUEST = InferRequest(b"sealed", b"key", b"nonce", (1,), "float32", "s")


class Raw:
    """A client of HTTP/2 that may do anything."""

    def __init__(self, stream):
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events = []

    async def flush(self):
        await self.stream.send_all(self.h2.data_to_send())

    async def until(self, kind, stream_id=None):
        """The first event of that kind; None if the connection ends before."""
        with trio.fail_after(120):
            while True:
                for event in self.events:
                    is_its = stream_id in {None, getattr(event, "stream_id", None)}
                    if isinstance(event, kind) and is_its:
                        return event
                data = await self.stream.receive_some(65536)
                if not data:
                    return None
                self.events += self.h2.receive_data(bytes(data))
                await self.flush()

    async def status(self, stream_id):
        event = await self.until(h2.events.TrailersReceived, stream_id)
        return dict(event.headers)["grpc-status"]


@pytest.fixture
async def raw(serve_door):
    async with serve_door() as served:
        async with await trio.open_tcp_stream("127.0.0.1", served.grpc) as stream:
            client = Raw(stream)
            client.served = served
            await client.flush()
            yield client
        await others_are_served(served)


async def others_are_served(served):
    served.door.before = served.door.fault = None
    async with open_grpc_door("127.0.0.1", served.grpc, None) as door:
        with trio.fail_after(120):
            assert bytes((await door.infer(REQUEST)).output) == b"sealed"


def begin(raw, headers=HEADERS):
    stream_id = raw.h2.get_next_available_stream_id()
    raw.h2.send_headers(stream_id, headers)
    return stream_id


async def test_a_size_that_is_too_large_is_refused_before_it_comes(raw):
    stream_id = begin(raw)
    raw.h2.send_data(stream_id, struct.pack(">BI", 0, 0xFFFFFFFF))
    await raw.flush()
    assert await raw.status(stream_id) == "8"
    # What was on its way meanwhile reaches nobody, and harms no other call.
    raw.h2.send_data(stream_id, b"x" * 1000)
    second = begin(raw)
    raw.h2.send_data(second, struct.pack(">BI", 1, 0), end_stream=True)
    await raw.flush()
    assert await raw.status(second) == "12"


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0", struct.pack(">BI", 0, 10) + b"short", struct.pack(">BI", 0, 0) * 2],
    ids=["nothing", "half a prefix", "half a message", "two messages"],
)
async def test_a_stream_that_ends_early_or_late_is_invalid(raw, body):
    stream_id = begin(raw)
    raw.h2.send_data(stream_id, body, end_stream=True)
    await raw.flush()
    assert await raw.status(stream_id) == "3"


async def test_a_deadline_that_is_none_is_invalid(raw):
    stream_id = begin(raw, [*HEADERS, ("grpc-timeout", "soon")])
    await raw.flush()
    assert await raw.status(stream_id) == "3"


async def test_another_content_type_is_told_what_this_port_speaks(raw):
    stream_id = begin(raw, [*HEADERS[:-1], ("content-type", "application/json")])
    raw.h2.send_data(stream_id, b"{}")
    await raw.flush()
    response = await raw.until(h2.events.ResponseReceived, stream_id)
    assert dict(response.headers)[":status"] == "415"
    await raw.until(h2.events.StreamEnded, stream_id)
    raw.h2.send_data(stream_id, b"{}")
    second = begin(raw)
    raw.h2.end_stream(second)
    await raw.flush()
    assert await raw.status(second) == "3"


async def test_a_body_that_does_not_come_in_time_is_given_up(raw, monkeypatch):
    monkeypatch.setattr(call_module, "_TRANSFER_SECONDS", 0.2)
    stream_id = begin(raw)
    raw.h2.send_data(stream_id, struct.pack(">BI", 0, 10) + b"slow")
    await raw.flush()
    assert await raw.status(stream_id) == "4"


async def test_a_reset_stops_the_work(raw):
    raw.served.door.before = trio.sleep_forever
    stream_id = begin(raw)
    raw.h2.send_data(stream_id, struct.pack(">BI", 0, 0), end_stream=True)
    await raw.flush()
    await until(lambda: raw.served.door.requests)
    raw.h2.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
    await raw.flush()
    await until(lambda: raw.served.door.num_cancelled)


async def test_a_connection_that_breaks_stops_the_work(raw):
    raw.served.door.before = trio.sleep_forever
    stream_id = begin(raw)
    raw.h2.send_data(stream_id, struct.pack(">BI", 0, 0), end_stream=True)
    await raw.flush()
    await until(lambda: raw.served.door.requests)
    linger = struct.pack("ii", 1, 0)  # close by a reset
    raw.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    await raw.stream.aclose()
    await until(lambda: raw.served.door.num_cancelled)


async def test_more_streams_than_allowed_end_the_connection(raw):
    raw.served.door.before = trio.sleep_forever
    for _ in range(200):
        begin(raw)
    await raw.flush()
    assert await raw.until(h2.events.ConnectionTerminated) is not None


async def test_streams_opened_and_reset_without_end_end_the_connection(raw, monkeypatch):
    monkeypatch.setattr(listening, "_MAX_RESETS", 100)
    with pytest.raises((trio.BrokenResourceError, AssertionError)):  # noqa: PT012
        for _ in range(200):
            raw.h2.reset_stream(begin(raw))
            await raw.flush()
        assert await raw.until(h2.events.PingAckReceived) is not None


async def test_http_1_on_the_port_of_grpc_is_told_so(raw):
    async with await trio.open_tcp_stream("127.0.0.1", raw.served.grpc) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await read_all(stream)
        assert b"505" in answer.splitlines()[0]
        assert b"this port speaks gRPC" in answer


@pytest.mark.parametrize("junk", [b"\x16\x03\x01" + bytes(200), b"PRI * HTTP/2.0\r\n\r\nXX" * 9])
async def test_junk_ends_its_own_connection(raw, junk):
    async with await trio.open_tcp_stream("127.0.0.1", raw.served.grpc) as stream:
        await stream.send_all(junk)
        await read_all(stream)


async def test_junk_on_the_port_of_http_ends_its_own_connection(raw):
    async with await trio.open_tcp_stream("127.0.0.1", raw.served.http) as stream:
        await stream.send_all(bytes(range(256)) * 4)
        assert b" 400 " in await read_all(stream)


async def test_bodies_of_all_calls_together_are_bounded(serve_door, monkeypatch):
    monkeypatch.setattr(listening, "BodyBudget", lambda: BodyBudget(1000))
    async with serve_door() as served:
        async with await trio.open_tcp_stream("127.0.0.1", served.grpc) as stream:
            raw = Raw(stream)
            first, second = begin(raw), None
            raw.h2.send_data(first, struct.pack(">BI", 0, 900) + bytes(890))
            await raw.flush()
            second = begin(raw)
            raw.h2.send_data(second, struct.pack(">BI", 0, 200) + bytes(200), end_stream=True)
            await raw.flush()
            assert await raw.status(second) == "8"
        await others_are_served(served)  # what the first held is free again


async def read_all(stream):
    data = b""
    with trio.fail_after(120):
        try:
            while chunk := await stream.receive_some(65536):
                data += chunk
        except trio.BrokenResourceError:
            pass
    return data


async def until(condition):
    with trio.fail_after(120):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
