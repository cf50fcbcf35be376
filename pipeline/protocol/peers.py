"""Meeting peers and parting from them: what both sides of a pipeline do alike."""

import logging
import socket
from collections.abc import Callable, Mapping

import trio

from pipeline.agreement.trust import Trust
from pipeline.protocol.links import ControlLink
from pipeline.protocol.messages import Message
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel, accept_channel, connect_channel
from transport.endpoint import Endpoint, Listener, Permit, dial_retrying
from transport.errors import NoAnswer, TransportError
from transport.frames import FrameLimits
from transport.handshake import Credentials, Link, Role, RoleKind

logger = logging.getLogger(__name__)

# A peer that says nothing for this long while it is its turn in a handshake is dropped.
HANDSHAKE_SECONDS = 10.0
# Handshakes under way at once; more wait in the kernel's backlog, so a flood costs no memory.
MAX_PENDING_HANDSHAKES = 16
# Between tries of a peer whose relay answers for it, before it is up.
NO_ANSWER_SECONDS = 0.25
# Time for a last message to a peer that may not be reading.
GOODBYE_SECONDS = 1.0
# Control channels come before any session, so they bind no session's epoch.
CONTROL_EPOCH = bytes(16)
# How long processes that only drive steps wait for one in place. It covers a token of most
# pipelines, and nobody notices that a signal or a control message has waited for it.
PATIENCE_MS = 20
ORCHESTRATOR = Role(RoleKind.ORCHESTRATOR, 0)


async def accept_first(
    listener: Listener,
    link: Link,
    trust: Trust,
    measurements: Mapping[int, bytes],
    limits: FrameLimits,
) -> SecureChannel:
    """The first connection that authenticates as the link's initiator; others are dropped.

    Handshakes run side by side, so that a silent stranger cannot keep the right peer out.
    """
    accepted: list[SecureChannel] = []
    is_accepted = trio.Event()
    slots = trio.CapacityLimiter(MAX_PENDING_HANDSHAKES)

    async def greet(sock: socket.socket, place: object) -> None:
        credentials = trust.toward(link.initiator, measurements)
        channel = await accept_or_log(sock, link, credentials, limits)
        slots.release_on_behalf_of(place)
        if channel is not None and accepted:
            await close_quietly(channel)
        elif channel is not None:
            accepted.append(channel)
            is_accepted.set()

    async def greet_all(tasks: trio.Nursery) -> None:
        while True:
            place = object()
            await slots.acquire_on_behalf_of(place)
            tasks.start_soon(greet, await listener.accept(), place)

    try:
        async with open_tasks() as tasks:
            tasks.start_soon(greet_all, tasks)
            await is_accepted.wait()
            tasks.cancel_scope.cancel()
    except BaseException:  # cancelled between one's handshake and handing it over
        for channel in accepted:
            await close_quietly(channel)
        raise
    return accepted[0]


async def connect_retrying(
    where: Callable[[], Endpoint],
    link: Link,
    credentials: Credentials,
    limits: FrameLimits,
    on_wait: Callable[[TransportError], None],
    permit: Permit | None = None,
) -> SecureChannel:
    """Dial and run the initiator's handshake, again and again until the peer is up.

    `where` is asked before each attempt, and `permit` about each address (see `dial`).

    A relay accepts for a stage that is not up and then hangs up without a word, so that counts as
    not up either. Every other failure of the handshake is final: a TransportError,
    trio.EndOfChannel, or trio.TooSlowError for a peer that says nothing.
    """
    while True:
        sock = await dial_retrying(where, on_wait, permit)
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                return await connect_channel(sock, link, credentials, limits)
        except NoAnswer as error:
            on_wait(error)
        await trio.sleep(NO_ANSWER_SECONDS)


async def accept_or_log(
    sock: socket.socket, link: Link, credentials: Credentials, limits: FrameLimits
) -> SecureChannel | None:
    """Run the responder's handshake; a peer that fails it is logged and dropped."""
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            return await accept_channel(sock, link, credentials, limits)
    except (TransportError, trio.EndOfChannel, trio.TooSlowError) as error:
        logger.warning("event=handshake_refused link=%s error=%s", link.kind.name, describe(error))
        return None


async def say(control: ControlLink, message: Message) -> None:
    """Try to send a last message; the peer may be the one that failed."""
    with trio.move_on_after(GOODBYE_SECONDS, shield=True):
        try:
            await control.send(message)
        except (TransportError, trio.ClosedResourceError, trio.BrokenResourceError):
            logger.debug("event=goodbye_failed type=%s", message.type)


async def hear_out(channel: SecureChannel) -> None:
    """Read until the peer has hung up or had its time.

    Closing a socket with bytes unread resets the connection, and a peer that is just sending would
    learn of that instead of the last message it was sent.
    """
    with trio.move_on_after(GOODBYE_SECONDS):
        try:
            while True:
                await channel.receive()
        except (TransportError, trio.EndOfChannel, trio.ClosedResourceError):
            pass  # what it says no longer matters


async def close_quietly(channel: SecureChannel) -> None:
    """Close with notice if the peer still reads, without if not."""
    with trio.move_on_after(GOODBYE_SECONDS, shield=True):
        try:
            await channel.aclose()
        except TransportError as error:
            logger.debug("event=close_failed error=%s", describe(error))


async def hang_up(channel: SecureChannel) -> None:
    """Close at once and without notice, cancelled or not: what was on its way is void."""
    with trio.CancelScope(shield=True) as scope:
        scope.cancel()
        await channel.aclose()


def describe(error: BaseException) -> str:
    """One line for an error that may carry no text."""
    if isinstance(error, trio.EndOfChannel):
        return "the peer closed the channel"
    if isinstance(error, trio.TooSlowError):
        return f"the peer was silent for {HANDSHAKE_SECONDS:.0f} s"
    return (str(error) or type(error).__name__)[:1024]
