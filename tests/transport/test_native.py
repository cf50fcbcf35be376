"""The compiled way of a record is the record layer's own way, or leaves the record to that."""

import os
import random
import socket
import struct
import subprocess
import sys

import pytest
import trio

from transport import handshake
from transport.cipher import REKEY_NONCE
from transport.compiled_records import Inlet
from transport.errors import ConnectionLost, MisuseError, RecordError
from transport.record_counters import IS_COMPILED
from transport.records import HEADER_BYTES, OVERHEAD_BYTES
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import INLINE_BYTES, FrameForm

pytestmark = pytest.mark.skipif(not IS_COMPILED, reason="not compiled")

PATIENCE_MS = 500


WITHOUT_IT = """
import sys, types
sys.modules["transport._native"] = {module}
from transport import channel, frame_stream, noise, record_counters, records
from transport import rekey_policy, tensor_frames
assert not record_counters.IS_COMPILED
first, second = [noise.CipherState(noise.AEADS["ChaChaPoly"], bytes(32)) for _ in range(2)]
sender = frame_stream.FrameSender(records.RecordSealer(first, rekey_policy.RekeyPolicy()))
opener = records.RecordOpener(second, rekey_policy.RekeyPolicy())
receiver = frame_stream.FrameReceiver(opener, tensor_frames.FrameLimits(100, 1, 1000))
data, _ = sender.begin(tensor_frames.Frame(tensor_frames.FrameKind.DATA, b"header", ()))
receiver.space()[: len(data)] = data
receiver.wrote(len(data))
assert receiver.next_frame_untrusted().header == b"header"
"""


async def connected(toy, **options):
    """Two ends; the far one has seen a frame like those to come, and waits for them in place."""
    near, far = await toy.channels(**options)
    far.wait_in_place(PATIENCE_MS)
    form = FrameForm(toy.frame(3072))
    await near.send_form(form)
    assert await far.peek() == form.plain
    far.drop()
    return near, far, form


def counters(end):
    """All that a direction's record layer counts, but for times."""
    counted = []
    for half in (end._sealer, end._opener):
        cipher, use = half._cipher, half._use
        counted.append((cipher.nonce, use.num_records, use.num_bytes, half.num_rekeys))
    wire = end._wire
    return counted, wire.bytes_sent, wire.bytes_received


async def test_a_record_like_the_last_one_takes_neither_python_way(toy, monkeypatch):
    near, far, form = await connected(toy)
    spent = far.stats.decrypt_ns, far.stats.recv_ns, near.stats.encrypt_ns, near.stats.send_ns
    for end, names in ((near._sealer, ["seal_into"]), (far._receiver.reader, ["open_into"])):
        for name in names:
            monkeypatch.setattr(type(end), name, None)
    for _ in range(3):
        await near.send_form(form)
        assert await far.peek() == form.plain
        far.drop()
    monkeypatch.undo()
    now = far.stats.decrypt_ns, far.stats.recv_ns, near.stats.encrypt_ns, near.stats.send_ns
    assert all(map(int.__gt__, now, spent))
    await toy.close(near, far)


async def traffic(toy, seed, *, is_compiled, monkeypatch):
    """Frames of few sizes under keys that soon change, each sent and received in one of two ways.

    What arrived, and what both ends have counted in the end.
    """
    with monkeypatch.context() as patch:
        if not is_compiled:
            toy.without_compiled_records(patch)
        near, far = await toy.channels(rekey=RekeyPolicy(max_records=7, max_bytes=20_000))
    far.wait_in_place(PATIENCE_MS)
    choose = random.Random(seed)
    arrived = []
    for _ in range(150):
        size = choose.choice([4, 4, 4, 100, 3072, 65_000])
        frame = toy.frame(size)
        by_form, by_peek = choose.random() < 0.8, choose.random() < 0.8
        if by_form:
            await near.send_form(FrameForm(frame))
        else:
            await near.send(frame)
        if by_peek and (plain := await far.peek()) is not None:
            arrived.append(bytes(plain[-size:]) == bytes(frame.tensors[0].data))
            far.drop()
        else:
            arrived.append(toy.contents(await far.receive()) == toy.contents(frame))
    counted = counters(near), counters(far)
    await toy.close(near, far)
    return arrived, counted


@pytest.mark.parametrize("seed", range(4))
async def test_both_ways_carry_and_count_the_same(toy, seed, monkeypatch):
    arrived, counted = await traffic(toy, seed, is_compiled=True, monkeypatch=monkeypatch)
    assert all(arrived)
    assert len(arrived) == 150
    assert (arrived, counted) == await traffic(
        toy, seed, is_compiled=False, monkeypatch=monkeypatch
    )


async def record_of(near, far, form):
    """The next record of `near`, taken off its way."""
    await near.send_form(form)
    size = len(form.plain) + OVERHEAD_BYTES
    return bytearray(await far._wire.receive_exactly(size))


@pytest.mark.parametrize("at", [0, 3, 7, HEADER_BYTES, HEADER_BYTES + 1500, -16, -1])
async def test_a_forged_record_is_refused_and_nothing_of_it_can_be_read(toy, at):
    near, far, form = await connected(toy)
    record = await record_of(near, far, form)
    record[at] ^= 1
    near._wire.try_send(memoryview(record))
    near._wire.close()  # by its header a longer one might have yet to come
    with pytest.raises((RecordError, ConnectionLost)):
        await far.peek() or await far.receive()
    assert far.is_closed
    if at >= HEADER_BYTES or at < 0:
        assert not any(far._receiver.buffer.storage[: len(form.plain)])
    await toy.close(near, far)


@pytest.mark.parametrize("attack", ["repeat", "drop", "other direction"])
async def test_a_record_out_of_its_place_is_refused(toy, attack):
    near, far, form = await connected(toy)
    record = await record_of(near, far, form)
    if attack == "repeat":
        near._wire.try_send(memoryview(record))
        assert await far.peek() == form.plain
        far.drop()
        near._wire.try_send(memoryview(record))
    elif attack == "drop":
        await near.send_form(form)
    else:
        far._wire.try_send(memoryview(record))
        near, far = far, near
        far.wait_in_place(PATIENCE_MS)
    with pytest.raises(RecordError):
        await far.peek()
    assert far.is_closed
    await toy.close(near, far)


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, 2000])
async def test_a_record_in_pieces_or_with_another_behind_it_is_left_to_the_ordinary_way(toy, cut):
    near, far, form = await connected(toy)
    first, second = [await record_of(near, far, form) for _ in range(2)]
    near._wire.try_send(memoryview(first)[:cut])
    assert await far.peek() is None
    near._wire.try_send(memoryview(bytes(first[cut:] + second)))
    for _ in range(2):
        frame = await far.receive()
        assert frame.tensors[0].data == form.plain[slice(*form.places[0])]
    await toy.close(near, far)


async def test_a_lost_connection_is_told_as_such(toy):
    near, far, _ = await connected(toy)
    near._wire._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near._wire.close()  # with a reset
    with pytest.raises(ConnectionLost, match="reset"):
        await far.peek()
    with pytest.raises(trio.ClosedResourceError):
        await far.peek()
    near, far, form = await connected(toy)
    far._wire.close()
    await near.send_form(form)  # which is answered with a reset
    with pytest.raises(ConnectionLost):
        await send_on_and_on(near, form)
    assert near.is_closed


async def send_on_and_on(channel, form):
    while True:
        await trio.sleep(0.001)
        await channel.send_form(form)


async def test_a_closed_channel_touches_no_socket_that_has_its_number_now(toy):
    near, far, form = await connected(toy)
    numbers = near._wire.fd, far._wire.fd
    near._wire.close()
    far._wire.close()
    others = [socket.socketpair() for _ in range(8)]
    taken = {sock.fileno(): sock for pair in others for sock in pair}
    assert taken.keys() >= set(numbers)
    before = counters(near), counters(far)
    for pair in others:
        pair[0].send(os.urandom(100))
        pair[1].send(os.urandom(100))
    assert near._outlet.send(form.plain) is None
    assert far._inlet.receive(0) is None
    assert (counters(near), counters(far)) == before
    for sock in taken.values():
        assert len(sock.recv(1000)) == 100
        sock.close()


async def test_a_frame_that_has_no_room_or_no_key_is_left_to_the_ordinary_way(toy):
    near, far, form = await connected(toy, rekey=RekeyPolicy(max_records=2))
    large = memoryview(bytearray(INLINE_BYTES + 1))
    assert near._outlet.send(large) is None
    assert near._outlet.send(form.plain) is not None
    assert near._outlet.send(form.plain) is None  # the key is spent
    assert await far.peek() == form.plain
    await toy.close(near, far)


async def test_a_cipher_that_lays_out_its_nonces_otherwise_is_left_to_the_ordinary_way(
    toy, monkeypatch
):
    monkeypatch.setattr(handshake, "PROTOCOL_NAME", "Noise_XX_25519_AESGCM_SHA256")
    near, far, form = await connected(toy)
    assert near._outlet.send(form.plain) is None
    for _ in range(3):
        await near.send_form(form)
        assert far._inlet.receive(PATIENCE_MS) is None
        assert await far.peek() == form.plain
        far.drop()
    await toy.close(near, far)


async def test_nonces_from_first_to_last(toy):
    near, far, form = await connected(toy, rekey=RekeyPolicy(2**63 - 1, 2**63 - 1))
    for nonce in (2**63 - 1, 2**63):
        near._sealer._cipher.nonce = far._opener._cipher.nonce = nonce
        await near.send_form(form)
        assert await far.peek() == form.plain
        far.drop()
        assert near._sealer._cipher.nonce == far._opener._cipher.nonce == nonce + 1
    near._sealer._cipher.nonce = REKEY_NONCE
    with pytest.raises(MisuseError):
        await near.send_form(form)
    assert near.is_closed
    await toy.close(near, far)


async def test_a_key_that_has_been_replaced_is_held_nowhere(toy):
    near, far, form = await connected(toy, rekey=RekeyPolicy(max_records=3))
    await near.send_form(form)
    assert await far.peek() == form.plain
    far.drop()
    keys = [half._cipher._cipher for half in (near._sealer, far._opener)]
    for _ in range(2):
        await near.send(toy.frame(1))
        await far.receive()
    assert near.stats.rekeys == far.stats.rekeys == 1
    assert [sys.getrefcount(keys[at]) for at in range(2)] == [2, 2]  # in the list, and in the call
    await toy.close(near, far)


async def test_interrupted_before_a_record_is_authentic_nothing_of_it_can_be_read(toy):
    near, far, form = await connected(toy)

    class Interrupted:
        def decrypt_into(self, nonce, sealed, header, plain):
            plain[:] = sealed[: len(plain)]
            raise KeyboardInterrupt

    far._opener._cipher._cipher = Interrupted()
    await near.send_form(form)
    with pytest.raises(KeyboardInterrupt):
        await far.peek()
    assert far.is_closed
    assert not any(far._receiver.buffer.storage[: len(form.plain)])
    await toy.close(near, far)


async def test_what_is_no_buffer_is_misuse(toy):
    near, far, _ = await connected(toy)
    with pytest.raises(TypeError):
        near._outlet.send("text")
    with pytest.raises(TypeError):
        far._inlet.receive("soon")
    with pytest.raises(TypeError):
        Inlet(1)
    await toy.close(near, far)


@pytest.mark.parametrize("module", ["None", "types.ModuleType('of_other_sources')"])
def test_where_it_is_absent_or_was_built_from_other_sources_all_goes_without_it(module):
    script = WITHOUT_IT.format(module=module)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
