"""Who has connected and not yet shown a right to stay: so many, of whom the least go first.

A silent connection costs its maker nothing, so no number of places outlasts those who make them;
and a right peer speaks at once. So nobody is kept waiting for a place: when all are taken, whoever
comes gets that of one who has shown less. That somebody has been answered shows little for a while:
so is whoever knows what to say first.
"""

import math
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import trio

from transport.errors import HandshakeError

# A stage meets a few peers at a time, each in a handful per session: enough to remember for hours.
MAX_HELLOS: Final = 4096
# A stage gives a handshake ten seconds from its beginning, and answers later than that: it has hung
# up on whoever is not still there so long after its answer.
PROOF_SECONDS: Final = 10.0
_V6_NETWORK_BYTES: Final = 8  # one machine has a /64 of addresses to itself

Source = str | bytes | int | None


class Standing(IntEnum):
    """What a connection has shown of itself."""

    SILENT = 0  # nothing, or not a whole first message
    HEARD = 1  # something that a stranger may have said too
    ANSWERED = 2  # something that was answered


@dataclass(eq=False, slots=True)
class Guest:
    """One connection; run it within `scope`, which ends when its place is another's."""

    source: Source
    standing: Standing = Standing.SILENT
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    answered_at: float = math.inf

    def answer(self) -> None:
        """It has been answered, now if not before."""
        if self.standing is not Standing.ANSWERED:
            self.standing = Standing.ANSWERED
            self.answered_at = trio.current_time()

    @property
    def is_established(self) -> bool:
        """Whether it makes room for nobody: its answer has stood the time."""
        is_answered = self.standing is Standing.ANSWERED
        return is_answered and trio.current_time() >= self.answered_at + PROOF_SECONDS


class Lobby:
    """The places of one listener."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._guests: dict[Guest, None] = {}  # the longest here first

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, source: Source) -> Guest | None:
        """A place, maybe at another's cost; None where none is to be had."""
        if len(self._guests) >= self._num_places:
            least = self._least(source)
            if least is None:
                return None
            self.leave(least)
            least.scope.cancel()
        guest = Guest(source)
        self._guests[guest] = None
        return guest

    def leave(self, guest: Guest) -> None:
        """Free the place; idempotent."""
        self._guests.pop(guest, None)

    def _least(self, newcomer: Source) -> Guest | None:
        """Who makes room: one of the largest group of those that are not established.

        All that wait for an answer are one group, and each source's answered ones another. Attack:
        one source has itself answered again and again. It loses its own to others, and takes from
        no newcomer the time to be answered.
        """
        guests = [guest for guest in self._guests if not guest.is_established]
        waiting = [guest for guest in guests if guest.standing is not Standing.ANSWERED]
        answered = [guest for guest in guests if guest.standing is Standing.ANSWERED]
        for source, num_answered in Counter(guest.source for guest in answered).most_common(1):
            if num_answered <= len(waiting) + 1:  # whoever comes waits too
                continue
            if source != newcomer:
                return next(guest for guest in answered if guest.source == source)
            waiting = [guest for guest in waiting if guest.source == source]
        return _least_waiting(waiting, Counter(guest.source for guest in guests))


def _least_waiting(waiting: Sequence[Guest], crowds: Counter[Source]) -> Guest | None:
    """The longest here of the most crowded source, among whichever is more: silent or heard.

    Strangers that can say nothing only crowd out each other; those that can say a hello, too, and
    leave whoever comes the time to say his.
    """
    if not waiting:
        return None
    source = max(waiting, key=lambda guest: crowds[guest.source]).source
    crowd = [guest for guest in waiting if guest.source == source]
    silent = [guest for guest in crowd if guest.standing is Standing.SILENT]
    heard = [guest for guest in crowd if guest.standing is Standing.HEARD]
    return heard[0] if len(heard) > len(silent) else silent[0]


class HelloMemory:
    """The hellos heard lately. Attack: one seen on its way, repeated to be shown evidence again."""

    def __init__(self) -> None:
        self._heard: dict[bytes, None] = {}  # the oldest first

    def add(self, ephemeral_key: bytes) -> None:
        """Remember a hello's key. Raises: HandshakeError where it is no news."""
        if ephemeral_key in self._heard:
            raise HandshakeError("a hello that has been heard before: it is replayed")
        self._heard[ephemeral_key] = None
        if len(self._heard) > MAX_HELLOS:
            del self._heard[next(iter(self._heard))]


def source_of(sock: socket.socket) -> Source:
    """Where a connection comes from: machine, network or CID; None where that cannot be told."""
    try:
        name = sock.getpeername()
    except OSError:
        return None  # it has gone already
    if sock.family == socket.AF_INET6:
        address, _, _ = str(name[0]).partition("%")
        return socket.inet_pton(socket.AF_INET6, address)[:_V6_NETWORK_BYTES]
    if isinstance(name, tuple):
        host: str | int = name[0]
        return host
    return None
