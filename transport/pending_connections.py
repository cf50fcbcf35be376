"""Who has connected and not yet shown a right to stay: so many, of whom the least go first.

A silent connection costs its maker nothing, so no number of places outlasts those who make them;
and a right peer speaks at once. So nobody is kept waiting for a place: when all are taken, whoever
comes gets that of one who has shown less.
"""

import socket
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import trio

from transport.errors import HandshakeError

# A stage meets a few peers at a time, each in a handful per session: enough to remember for hours.
MAX_HELLOS: Final = 4096
_V6_NETWORK_BYTES: Final = 8  # one machine has a /64 of addresses to itself

Source = str | bytes | int | None


class Standing(IntEnum):
    """What a connection has shown of itself."""

    SILENT = 0  # nothing, or not a whole first message
    HEARD = 1  # something that a stranger may have said too
    ESTABLISHED = 2  # its right to its place: it makes room for nobody


@dataclass(eq=False, slots=True)
class Guest:
    """One connection; run it within `scope`, which ends when its place is another's."""

    source: Source
    standing: Standing = Standing.SILENT
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Lobby:
    """The places of one listener."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._guests: dict[Guest, None] = {}  # the longest here first

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, source: Source) -> Guest | None:
        """A place, maybe at another's cost; None where all are of the established."""
        if len(self._guests) >= self._num_places:
            least = self._least()
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

    def _least(self) -> Guest | None:
        """The longest here of the most crowded source, among whichever is more: silent or heard.

        Strangers that can say nothing only crowd out each other; those that can say a hello, too,
        and leave whoever comes the time to say his.
        """
        waiting = [guest for guest in self._guests if guest.standing < Standing.ESTABLISHED]
        if not waiting:
            return None
        ((source, _),) = Counter(guest.source for guest in waiting).most_common(1)
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
