"""A secret that both ends have beforehand, and listeners that answer on several links."""

import socket

import pytest
import trio

from transport import handshake
from transport.channel import accept_one_of, connect_channel
from transport.errors import HandshakeError
from transport.tensor_frames import Frame, FrameKind

SECRET, OTHER = b"\x01" * 32, b"\x02" * 32


def meet(toy, mine, theirs):
    link = toy.link()
    awaiting_reply, hello = handshake.initiate(link, toy.credentials(psk=mine))
    awaiting_proof, reply = (
        handshake.respond(link, toy.credentials(psk=theirs)).receive(hello).answer()
    )
    awaiting_accept, proof = awaiting_reply.receive(reply)
    session, accept = awaiting_proof.receive(proof)
    return hello, awaiting_accept.receive(accept), session


def test_ends_with_the_same_secret_meet(toy):
    hello, initiator, responder = meet(toy, SECRET, SECRET)
    assert initiator.handshake_hash == responder.handshake_hash
    assert len(hello) == 64
    assert len(meet(toy, None, None)[0]) == 48


@pytest.mark.parametrize("pair", [(SECRET, OTHER), (None, SECRET), (SECRET, None)], ids=str)
def test_whoever_lacks_the_secret_is_shown_nothing(toy, pair, monkeypatch):
    def spend(*_):
        pytest.fail("work for a stranger")

    monkeypatch.setattr(handshake._Side, "write_evidence", spend)
    with pytest.raises(HandshakeError):
        meet(toy, *pair)


def test_a_mark_is_unreadable_without_the_secret_and_bound_to_it(toy):
    hello, *_ = meet(toy, SECRET, SECRET)
    for position in range(64):
        altered = hello[:position] + bytes([hello[position] ^ 1]) + hello[position + 1 :]
        with pytest.raises(HandshakeError):
            handshake.respond(toy.link(), toy.credentials(psk=SECRET)).receive(altered)


async def greet(toy, asked, psk, entrances):
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    found = []

    async def accept():
        found.append(await accept_one_of(far, entrances))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            channel = await connect_channel(near, asked, toy.credentials(psk=psk), toy.LIMITS)
        index, theirs = found[0]
        await channel.send(Frame(FrameKind.CONTROL, b"hello"))
        assert (await theirs.receive()).header == b"hello"
        await channel.aclose()
        await theirs.aclose()
    return index


async def test_whoever_comes_is_answered_on_the_link_that_is_asked_for(toy):
    links = [toy.link(manifest_hash=bytes([number]) * 32) for number in range(3)]
    psks = [None, SECRET, None]
    entrances = [
        (link, toy.credentials(psk=psk), toy.LIMITS) for link, psk in zip(links, psks, strict=True)
    ]
    for index, (link, psk) in enumerate(zip(links, psks, strict=True)):
        assert await greet(toy, link, psk, entrances) == index


async def test_a_hello_for_no_entrance_is_refused(toy):
    entrances = [(toy.link(manifest_hash=bytes([9]) * 32), toy.credentials(), toy.LIMITS)]
    with pytest.RaisesGroup(HandshakeError):
        await greet(toy, toy.link(), None, entrances)
