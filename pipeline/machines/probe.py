"""How far apart two machines are: round trips, and what goes through between them."""

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.errors import MessageError, SessionError
from pipeline.machines.links import LIMITS, MachineLink, knowing, probe_link
from pipeline.machines.messages import PIECE_BYTES, Fine, Flood, Ping, Probed
from pipeline.protocol.peer_connections import (
    Entrance,
    answered_within,
    close_quietly,
    describe,
)
from pipeline.protocol.time_limits import DEFAULT_TIMES
from transport.channel import SecureChannel, connect_channel
from transport.dial_and_listen import Endpoint, dial
from transport.errors import TransportError

_NUM_PINGS = 10
# Pieces are doubled until they take this long, so that a slow link is not flooded for minutes.
_FLOOD_SECONDS = 0.1
_MOST_PIECES = 128
PROBE_SECONDS = 30.0
_PIECE = bytes(PIECE_BYTES)


def probe_entrance(own: X25519PrivateKey, visitor: bytes) -> Entrance:
    """What answers one machine that wants to know how far this one is."""

    async def welcome(channel: SecureChannel) -> None:
        link = MachineLink(channel)
        try:
            while True:
                with trio.fail_after(PROBE_SECONDS):
                    await _answer(link)
        except (TransportError, MessageError, trio.EndOfChannel, trio.TooSlowError):
            await close_quietly(channel)

    public = own.public_key().public_bytes_raw()
    return Entrance(probe_link(visitor, public), knowing(own, visitor), LIMITS, welcome)


async def _answer(link: MachineLink) -> None:
    message = await link.hear()
    match message:
        case Ping():
            pass
        case Flood(num_pieces=num_pieces):
            for _ in range(num_pieces):
                await link.receive_piece()
        case _:
            raise MessageError(f"{message.type!r} where only distances are measured")
    await link.say(Fine())


async def probe(
    own: X25519PrivateKey, endpoint: Endpoint, key: bytes, data_in: Endpoint | None
) -> Probed:
    """How far the machine with this key is from here. Raises SessionError.

    `data_in`: where it has to be reached as well.
    """
    try:
        with trio.fail_after(PROBE_SECONDS):
            return await _probe(own, endpoint, key, data_in)
    except (TransportError, MessageError, trio.EndOfChannel, trio.TooSlowError) as error:
        raise SessionError(describe(error)) from error


async def _probe(
    own: X25519PrivateKey, endpoint: Endpoint, key: bytes, data_in: Endpoint | None
) -> Probed:
    public = own.public_key().public_bytes_raw()
    with answered_within(DEFAULT_TIMES.handshake_seconds):
        sock = await dial(endpoint)
        channel = await connect_channel(sock, probe_link(public, key), knowing(own, key), LIMITS)
    link = MachineLink(channel)
    try:
        trips = [await _timed(link, 0) for _ in range(_NUM_PINGS)]
        num_pieces, seconds = 1, await _timed(link, 1)
        while seconds < _FLOOD_SECONDS and num_pieces < _MOST_PIECES:
            num_pieces *= 2
            seconds = await _timed(link, num_pieces)
        if data_in is not None:
            (await dial(data_in)).close()
        return Probed(
            round_trip_seconds=max(min(trips), 1e-9),
            bytes_per_second=num_pieces * PIECE_BYTES / max(seconds, 1e-9),
        )
    finally:
        await close_quietly(channel)


async def _timed(link: MachineLink, num_pieces: int) -> float:
    """Seconds until so many pieces have arrived; none: a round trip."""
    began = trio.current_time()
    await link.say(Flood(num_pieces=num_pieces) if num_pieces else Ping())
    for _ in range(num_pieces):
        await link.send_piece(_PIECE)
    answer = await link.hear()
    if not isinstance(answer, Fine):
        raise SessionError(f"it answers {answer.type!r} where distances are measured")
    return trio.current_time() - began
