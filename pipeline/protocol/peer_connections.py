"""Meeting peers and parting from them: what both sides of a pipeline do alike."""

import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from pipeline.agreement.trust_policy import Trust
from pipeline.protocol.links import ControlLink
from pipeline.protocol.messages import Message
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel, accept_one_of, connect_channel
from transport.dial_and_listen import Endpoint, Listener, Permit, dial_retrying
from transport.errors import NoAnswer, TransportError
from transport.frozen import frozen
from transport.handshake import Credentials, Link, Role, RoleKind
from transport.pending_connections import Guest, HelloMemory, Lobby, Standing, source_of
from transport.retries import Retries
from transport.tensor_frames import FrameLimits

logger = logging.getLogger(__name__)

# Handshakes under way at once, at some 20 KiB each. A right peer is done in two round trips: it
# loses its place only to so many others in that time, from no place more crowded than its own.
MAX_PENDING_HANDSHAKES = 64
# Between two lines about handshakes that failed, and between two that say the same of them.
REFUSAL_SECONDS = 1.0
REMINDER_SECONDS = 60.0
# Between the first tries of a peer whose relay answers for it, before it is up.
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
    times: TimeLimits = DEFAULT_TIMES,
) -> SecureChannel:
    """The first connection that authenticates as the link's initiator; others are dropped."""
    (channel,) = await accept_of_each(listener, ((link, measurements, limits),), trust, times)
    return channel


async def accept_of_each(
    listener: Listener,
    awaited: Sequence[tuple[Link, Mapping[int, bytes], FrameLimits]],
    trust: Trust,
    times: TimeLimits = DEFAULT_TIMES,
) -> list[SecureChannel]:
    """The first connection of each of these links, with what its initiator has to show."""
    accepted: dict[int, SecureChannel] = {}
    are_accepted = trio.Event()

    def entrance(index: int) -> Entrance:
        async def welcome(channel: SecureChannel) -> None:
            if index in accepted:
                await close_quietly(channel)
                return
            accepted[index] = channel
            if len(accepted) == len(awaited):
                are_accepted.set()

        link, measurements, limits = awaited[index]
        return Entrance(link, trust.toward(link.initiator, measurements), limits, welcome)

    try:
        async with open_tasks() as tasks:
            entrances = [entrance(index) for index in range(len(awaited))]
            tasks.start_soon(partial(accept_each, listener, lambda: entrances, times=times))
            await are_accepted.wait()
            tasks.cancel_scope.cancel()
    except BaseException:  # cancelled between one's handshake and handing it over
        for channel in accepted.values():
            await close_quietly(channel)
        raise
    return [accepted[index] for index in range(len(awaited))]


async def accept_all(
    listener: Listener,
    link: Link,
    credentials: Credentials,
    limits: FrameLimits,
    welcome: Callable[[SecureChannel], Awaitable[None]],
    times: TimeLimits = DEFAULT_TIMES,
) -> None:
    """Welcome every connection that authenticates as the link's initiator, until cancelled.

    Handshakes run side by side, and when there are too many, the silent make room for others: so
    no number of strangers can keep the right peer out by saying nothing.
    """
    entrance = Entrance(link, credentials, limits, welcome)
    await accept_each(listener, lambda: (entrance,), times=times)


@frozen
class Entrance:
    """A link that is answered, on what terms, and who welcomes whoever comes by it."""

    link: Link
    credentials: Credentials
    limits: FrameLimits
    welcome: Callable[[SecureChannel], Awaitable[None]]


async def accept_each(
    listener: Listener,
    entrances: Callable[[], Sequence[Entrance]],
    on_refused: Callable[[TransportError], None] = lambda _: None,
    times: TimeLimits = DEFAULT_TIMES,
) -> None:
    """As `accept_all`, by whichever of several links somebody comes.

    `entrances` is asked for every connection; `on_refused` hears of handshakes that failed.
    """
    lobby, hellos, refusals = Lobby(MAX_PENDING_HANDSHAKES), HelloMemory(), Refusals()

    async def greet(sock: socket.socket, guest: Guest, found: Sequence[Entrance]) -> None:
        def on_hello(ephemeral_key: bytes) -> None:
            hellos.add(ephemeral_key)
            guest.standing = Standing.HEARD

        arrived = None
        try:
            with guest.scope, answered_within(times.handshake_seconds):
                terms = [(each.link, each.credentials, each.limits) for each in found]
                arrived = await accept_one_of(sock, terms, on_hello=on_hello)
        except (TransportError, trio.TooSlowError) as error:
            if isinstance(error, TransportError):
                on_refused(error)
            refusals.report(found[0].link, describe(error))
        finally:
            lobby.leave(guest)
        if guest.scope.cancelled_caught:
            refusals.report(
                found[0].link, "too many connect and do not authenticate; this one had to make room"
            )
        if arrived is not None:
            index, channel = arrived
            welcome = found[index].welcome
            del found  # however long this visit is, it keeps alive nothing of the other links
            await welcome(channel)

    async with open_tasks() as tasks:
        while True:
            sock = await listener.accept()
            guest = lobby.enter(source_of(sock))
            assert guest is not None  # nobody in this lobby counts as answered: they have left it
            tasks.start_soon(greet, sock, guest, entrances())


class Refusals:
    """Logs handshakes that failed, a line a second at most: a flood must not fill the disk too.

    What a peer is refused for that tries again and again is said once a minute.
    """

    def __init__(self) -> None:
        self._num_unsaid = 0
        self._quiet_until = -math.inf
        # When each reason may be said again: as many as there were lines in a minute.
        self._said: dict[str, float] = {}

    def report(self, link: Link, reason: str) -> None:
        """Log one, and how many there were since the last line."""
        now = trio.current_time()
        self._said = {each: until for each, until in self._said.items() if now < until}
        if now < self._quiet_until or reason in self._said:
            self._num_unsaid += 1
            return
        self._said[reason] = now + REMINDER_SECONDS
        logger.warning(
            "event=handshake_refused link=%s unsaid=%d error=%s",
            link.kind.name,
            self._num_unsaid,
            reason,
        )
        self._num_unsaid = 0
        self._quiet_until = now + REFUSAL_SECONDS


async def connect_retrying(
    where: Callable[[], Endpoint],
    link: Link,
    credentials: Credentials,
    limits: FrameLimits,
    on_wait: Callable[[TransportError], None],
    permit: Permit | None = None,
    times: TimeLimits = DEFAULT_TIMES,
) -> SecureChannel:
    """Dial and run the initiator's handshake, again and again until the peer is up.

    `where` is asked before each attempt, and `permit` about each address (see `dial`).

    A relay accepts for a stage that is not up and then hangs up without a word, so that counts as
    not up either. Every other failure of the handshake is final: a TransportError (AttemptsSpent
    where there is no next attempt), trio.EndOfChannel, or trio.TooSlowError for a peer that says
    nothing.
    """
    retries = Retries(times.retry)
    while True:
        sock = await dial_retrying(where, on_wait, permit, retries)
        try:
            with answered_within(times.handshake_seconds):
                return await connect_channel(sock, link, credentials, limits)
        except NoAnswer as error:
            on_wait(error)
            await retries.pause(error, at_least_s=NO_ANSWER_SECONDS)


@contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Raises trio.TooSlowError that says so where a peer has not answered by then."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise trio.TooSlowError(f"the peer was silent for {seconds:g} s") from error


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
    return (str(error) or type(error).__name__)[:1024]
