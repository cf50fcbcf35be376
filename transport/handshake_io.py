"""The handshake's messages over a wire, from either end; the bytes are in WIRE.md."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from transport.errors import ConnectionLost, HandshakeError, NoAnswer
from transport.handshake import (
    ACCEPT_BYTES,
    HELLO_SIZES,
    LENGTH,
    PROOF_SIZES,
    REFUSAL,
    REPLY_SIZES,
    VERSION,
    Credentials,
    HelloHeard,
    Link,
    Session,
    Sizes,
    initiate,
    message_size_untrusted,
    respond,
    with_length,
)
from transport.nonblocking_socket import Wire
from transport.rekey_policy import RekeyPolicy

# A link that may be asked for, and what we show and demand on it.
Entrance = tuple[Link, Credentials]


async def run_initiator(
    wire: Wire, link: Link, credentials: Credentials, rekey: RekeyPolicy | None
) -> Session:
    """Speak first. Raises: ProtocolError, ConnectionLost, trio.ClosedResourceError."""
    awaiting_reply, hello = initiate(link, credentials, rekey)
    reply = await _exchange_hello(wire, hello, link)
    awaiting_accept, proof = awaiting_reply.receive(reply)
    await _send_message(wire, proof)
    return awaiting_accept.receive(await _receive_accept(wire, link))


async def run_responder(
    wire: Wire,
    entrances: Sequence[Entrance],
    rekey: RekeyPolicy | None,
    on_hello: Callable[[bytes], None],
) -> tuple[int, Session]:
    """Answer one who speaks first, on the first of the links that its hello is for; which one.

    Raises: as `run_initiator`.
    """
    index, heard = await _hear_hello(wire, entrances, rekey, on_hello)
    link, _ = entrances[index]
    awaiting_proof, reply = heard.answer()
    await _send_message(wire, reply)
    session, accept = awaiting_proof.receive(await _receive_message(wire, PROOF_SIZES, link))
    await wire.send_all(memoryview(accept))
    return index, session


async def _hear_hello(
    wire: Wire,
    entrances: Sequence[Entrance],
    rekey: RekeyPolicy | None,
    on_hello: Callable[[bytes], None],
) -> tuple[int, HelloHeard]:
    try:
        hello = await _receive_message(wire, HELLO_SIZES, entrances[0][0])
        index, heard = _find_entrance(hello, entrances, rekey)
        on_hello(heard.ephemeral_key)
    except HandshakeError:
        with suppress(ConnectionLost):
            wire.try_send(memoryview(REFUSAL))
        raise
    return index, heard


def _find_entrance(
    hello: bytes, entrances: Sequence[Entrance], rekey: RekeyPolicy | None
) -> tuple[int, HelloHeard]:
    """Try a hello on each link: a few hashes for every one. Raises: the last one's HandshakeError.

    No two entrances take the same hello, since it carries the mark of one prologue.
    """
    *before, last = [respond(link, credentials, rekey) for link, credentials in entrances]
    for index, awaiting in enumerate(before):
        with suppress(HandshakeError):
            return index, awaiting.receive(hello)
    return len(before), last.receive(hello)


async def _exchange_hello(wire: Wire, hello: bytes, link: Link) -> bytes:
    try:
        await _send_message(wire, hello)
        return await _receive_message(wire, REPLY_SIZES, link)
    except ConnectionLost as error:
        if wire.bytes_received:
            raise
        raise NoAnswer(str(error)) from error


async def _send_message(wire: Wire, message: bytes) -> None:
    await wire.send_all(memoryview(with_length(message)))


async def _receive_message(wire: Wire, sizes: Sizes, link: Link) -> bytes:
    try:
        prefix = await wire.receive_exactly(LENGTH.size)
        return await wire.receive_exactly(message_size_untrusted(prefix, sizes, link))
    except ConnectionLost as error:
        raise ConnectionLost(
            f"{error} during the handshake: the peer may refuse our evidence or key, "
            f"or not speak {VERSION.decode()}"
        ) from error


async def _receive_accept(wire: Wire, link: Link) -> bytes:
    try:
        return await wire.receive_exactly(ACCEPT_BYTES)
    except ConnectionLost as error:
        raise ConnectionLost(
            f"{error} before the peer accepted us on our {link}: it may refuse our evidence or key"
        ) from error
