"""A relay that owns the wire: whatever it does to the bytes, an end notices, and first."""

import hashlib

import pytest
import trio

from transport import handshake
from transport.channel import accept_channel, connect_channel
from transport.errors import ConnectionLost, HandshakeError, RecordError
from transport.records import RecordKind

TO_RESPONDER, TO_INITIATOR = "to responder", "to initiator"
NUM_HANDSHAKE_UNITS = {TO_RESPONDER: 2, TO_INITIATOR: 1}


class Relay:
    """Forwards whole handshake messages and records, each through `tamper`.

    `tamper(direction, number, unit)` returns the units to forward in place of number `number`,
    counted per direction; None ends the connection there.
    """

    def __init__(self, toy, tamper):
        self.tamper = tamper
        self._read_unit = toy.read_unit
        self.near, self._from_initiator = toy.tcp_pair()
        self._from_responder, self.far = toy.tcp_pair()

    async def run(self):
        initiator = self._stream(self._from_initiator)
        responder = self._stream(self._from_responder)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, TO_RESPONDER, initiator, responder)
                nursery.start_soon(self._forward, TO_INITIATOR, responder, initiator)
        finally:
            initiator.socket.close()
            responder.socket.close()

    @staticmethod
    def _stream(sock):
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def _forward(self, direction, source, target):
        number = 0
        try:
            while True:
                is_handshake = number < NUM_HANDSHAKE_UNITS[direction]
                unit = await self._read_unit(source, is_handshake=is_handshake)
                forwarded = unit and self.tamper(direction, number, unit)
                if forwarded is None:
                    break
                for altered in forwarded:
                    await target.send_all(altered)
                number += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await source.aclose()
        await target.aclose()


def honest(direction, number, unit):
    return [unit]


class Scene:
    """Two parties and the relay between them, in one nursery that ends with the test."""

    def __init__(self, toy, tamper=honest, link=None, peer_link=None):
        self.toy = toy
        self.relay = Relay(toy, tamper)
        self.link = link or toy.link()
        self.peer_link = peer_link or self.link
        self.near = self.far = None

    async def __aenter__(self):
        self._manager = trio.open_nursery()
        self.nursery = await self._manager.__aenter__()
        self.nursery.start_soon(self.relay.run)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._connect)
                nursery.start_soon(self._accept)
        except BaseException:
            self.nursery.cancel_scope.cancel()
            await self._manager.__aexit__(None, None, None)
            raise
        return self

    async def _connect(self):
        credentials = self.toy.credentials()
        self.near = await connect_channel(self.relay.near, self.link, credentials, self.toy.LIMITS)

    async def _accept(self):
        credentials = self.toy.credentials()
        self.far = await accept_channel(
            self.relay.far, self.peer_link, credentials, self.toy.LIMITS
        )

    async def __aexit__(self, *exception):
        for channel in (self.near, self.far):
            channel._wire.close()
        self.nursery.cancel_scope.cancel()
        return await self._manager.__aexit__(*exception)


def on_record(direction, number, action):
    """Tamper with the data record `number` of a direction, counted without ACCEPT."""
    first = 2

    def tamper(its_direction, its_number, unit):
        if its_direction == direction and its_number - first == number:
            return action(unit)
        return [unit]

    return tamper


def held_back(*, is_swapped):
    """Keep the responder's second data record until the third has come, which may overtake it."""
    held = []

    def tamper(direction, number, unit):
        if direction == TO_RESPONDER and number == 3:
            held.append(unit)
            return []
        is_next = direction == TO_RESPONDER and number == 4
        both = [*held, unit] if is_next else [unit]
        return both[::-1] if is_swapped else both

    return tamper


async def send_three(scene):
    for number in range(3):
        await scene.near.send(scene.toy.frame(100, header=b"%d" % number))


async def expect_first_only(scene, error):
    """The frame before the attack arrives; the attack is `error`, and the channel is closed."""
    await send_three(scene)
    assert (await scene.far.receive()).header == b"0"
    with pytest.raises(error):
        await scene.far.receive()
    assert scene.far.is_closed


async def test_an_honest_relay_changes_nothing(toy):
    async with Scene(toy) as scene:
        await send_three(scene)
        assert [(await scene.far.receive()).header for _ in range(3)] == [b"0", b"1", b"2"]
        await scene.near.aclose()
        with pytest.raises(trio.EndOfChannel):
            await scene.far.receive()


async def test_a_delay_alone_changes_nothing(toy):
    async with Scene(toy, held_back(is_swapped=False)) as scene:
        await send_three(scene)
        assert [(await scene.far.receive()).header for _ in range(3)] == [b"0", b"1", b"2"]


async def test_a_dropped_record_is_detected(toy):
    async with Scene(toy, on_record(TO_RESPONDER, 1, lambda unit: [])) as scene:
        await expect_first_only(scene, RecordError)


async def test_a_replayed_record_is_detected(toy):
    async with Scene(toy, on_record(TO_RESPONDER, 0, lambda unit: [unit, unit])) as scene:
        await expect_first_only(scene, RecordError)


async def test_reordered_records_are_detected(toy):
    async with Scene(toy, held_back(is_swapped=True)) as scene:
        await expect_first_only(scene, RecordError)


async def test_a_reflected_record_is_detected(toy):
    sent = []

    def reflect(direction, number, unit):
        if direction == TO_RESPONDER and number == 2:
            sent.append(unit)
        return list(sent) if direction == TO_INITIATOR and number == 2 else [unit]

    async with Scene(toy, reflect) as scene:
        await scene.near.send(toy.frame(100))
        await scene.far.send(await scene.far.receive())
        with pytest.raises(RecordError):
            await scene.near.receive()
        assert scene.near.is_closed


async def test_a_record_spliced_in_from_a_concurrent_channel_is_detected(toy):
    captured = []

    def capture(unit):
        captured.append(unit)
        return [unit]

    async with (
        Scene(toy, on_record(TO_RESPONDER, 1, capture)) as other,
        Scene(toy, on_record(TO_RESPONDER, 1, lambda unit: [captured[0]])) as scene,
    ):
        await send_three(other)
        for _ in range(3):
            await other.far.receive()
        await expect_first_only(scene, RecordError)


@pytest.mark.parametrize("where", ["header", "length", "body", "tag"])
async def test_a_flipped_bit_is_detected(toy, where):
    position = {"header": 0, "length": 7, "body": 20, "tag": -1}[where]

    def flip(unit):
        altered = bytearray(unit)
        altered[position] ^= 1
        return [bytes(altered), bytes(64)]  # so that a longer declared record completes, too

    async with Scene(toy, on_record(TO_RESPONDER, 1, flip)) as scene:
        await expect_first_only(scene, RecordError)


async def test_a_stream_cut_between_records_is_told_apart_from_its_end(toy):
    async with Scene(toy, on_record(TO_RESPONDER, 1, lambda unit: None)) as scene:
        await scene.near.send(toy.frame(100, header=b"0"))
        assert (await scene.far.receive()).header == b"0"
        await scene.near.aclose()
        with pytest.raises(ConnectionLost):
            await scene.far.receive()
        assert scene.far.is_closed


async def test_a_stream_cut_inside_a_record_is_a_lost_connection(toy):
    def cut(direction, number, unit):
        if direction == TO_RESPONDER and number == 3:
            return [unit[:50]]
        return None if direction == TO_RESPONDER and number == 4 else [unit]

    async with Scene(toy, cut) as scene:
        await expect_first_only(scene, ConnectionLost)


async def test_a_close_cannot_be_forged(toy):
    forged = bytes([RecordKind.CLOSE, 0, 0, 0, 0, 0, 0, 16]) + bytes(16)
    async with Scene(toy, on_record(TO_RESPONDER, 1, lambda unit: [forged])) as scene:
        await expect_first_only(scene, RecordError)


async def test_a_piece_of_a_large_tensor_moved_within_it_is_detected(toy):
    async with Scene(toy, held_back(is_swapped=True)) as scene:
        scene.nursery.start_soon(scene.near.send, toy.frame(1_000_000))
        with pytest.raises(RecordError):
            await scene.far.receive()


OTHER_LINKS = {
    "another stage's channel": {"responder": handshake.Role(handshake.RoleKind.STAGE, 7)},
    "another manifest's channel": {"manifest_hash": hashlib.sha256(b"another").digest()},
    "another epoch's channel": {"epoch": b"\x09" * 16},
    "a control channel": {"kind": handshake.LinkKind.CONTROL},
}


@pytest.mark.parametrize("name", OTHER_LINKS)
async def test_an_answer_from_elsewhere_is_detected_by_the_initiator(toy, name):
    scene = Scene(toy, peer_link=toy.link(**OTHER_LINKS[name]))
    with pytest.RaisesGroup(pytest.RaisesExc(HandshakeError, match="another manifest")):
        async with scene:
            pytest.fail("the handshake went through")
    assert scene.relay.near.fileno() < 0
    assert scene.relay.far.fileno() < 0


async def test_our_own_first_message_reflected_does_not_authenticate(toy):
    first = []

    def reflect(its_direction, number, unit):
        if its_direction == TO_RESPONDER and number == 0:
            first.append(unit)
        if its_direction == TO_INITIATOR and number == 0:
            size = handshake.REPLY_SIZES[0]
            return [handshake.with_length((first[0][2:] * 10)[:size])]
        return [unit]

    with pytest.RaisesGroup(HandshakeError):
        async with Scene(toy, reflect):
            pytest.fail("the handshake went through")


async def test_a_handshake_replayed_to_a_responder_does_not_authenticate(toy):
    recorded = []

    def record(direction, number, unit):
        if direction == TO_RESPONDER and number < 2:
            recorded.append(unit)
        return [unit]

    async with Scene(toy, record):
        pass
    near, far = toy.tcp_pair()
    async with trio.open_nursery() as nursery:

        async def respond():
            with pytest.raises(HandshakeError, match="does not authenticate"):
                await accept_channel(far, toy.link(), toy.credentials(), toy.LIMITS)

        nursery.start_soon(respond)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
        await stream.send_all(recorded[0])
        await stream.receive_some()
        await stream.send_all(recorded[1])
    await stream.aclose()
    assert far.fileno() < 0


async def test_accept_from_another_handshake_is_detected(toy):
    accepts = []

    def capture(direction, number, unit):
        if direction == TO_INITIATOR and number == 1:
            accepts.append(unit)
        return [unit]

    def splice(direction, number, unit):
        return [accepts[0]] if direction == TO_INITIATOR and number == 1 else [unit]

    async with Scene(toy, capture):
        pass
    scene = Scene(toy, splice)
    with pytest.RaisesGroup(RecordError):
        async with scene:
            pytest.fail("the handshake went through")
    scene.far._wire.close()
