"""An offer as the machine sees it: one secret, for one home, for ten minutes and a few tries.

The secret is held in memory alone. When it is worth nothing any more it still opens a link on which
the machine says why: whoever carries a line that somebody else has used should learn of that.
"""

from collections.abc import Awaitable, Callable
from enum import Enum

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import fingerprint
from pipeline.errors import MessageError
from pipeline.machines.links import LIMITS, MachineLink, offering, pairing_link
from pipeline.machines.messages import Join, Joined
from pipeline.machines.offer_line import OfferLine
from pipeline.protocol.peer_connections import Entrance, close_quietly, hear_out
from transport.channel import SecureChannel
from transport.errors import HandshakeError, TransportError

OFFER_SECONDS = 600.0
MAX_TRIES = 10
# Whether the home with this key may join; asks a person.
Ask = Callable[[bytes], Awaitable[bool]]


class OfferState(Enum):
    """What has become of an offer; the value says why it is over."""

    OPEN = "open"
    ASKING = "somebody else is asking with this line just now"
    USED = "this line has been used already"
    DECLINED = "this line has been declined at the machine"
    EXPIRED = "this line is older than ten minutes"
    GUESSED = "too many came with a wrong secret, so the machine has given its offer up"


class Offer:
    """One line's life."""

    def __init__(
        self,
        own: X25519PrivateKey,
        line: OfferLine,
        software: str,
        ask: Ask,
        on_joined: Callable[[bytes], None],
    ) -> None:
        self._own = own
        self._software = software
        self._ask = ask
        self._on_joined = on_joined
        self._ends_at = trio.current_time() + OFFER_SECONDS
        self._state = OfferState.OPEN
        self._joined_key = b""
        self._num_tries = 0
        self._is_over = trio.Event()
        key = line.key
        self.entrance = Entrance(pairing_link(key), offering(own, line.psk), LIMITS, self._welcome)

    @property
    def state(self) -> OfferState:
        """What has become of it."""
        if self._state is OfferState.OPEN and trio.current_time() >= self._ends_at:
            self._end(OfferState.EXPIRED)
        return self._state

    def note_refusal(self, error: TransportError) -> None:
        """A handshake has failed: maybe somebody guesses."""
        if isinstance(error, HandshakeError) and self.state is OfferState.OPEN:
            self._num_tries += 1
            if self._num_tries >= MAX_TRIES:
                self._end(OfferState.GUESSED)

    async def wait(self) -> OfferState:
        """Wait until it is over, and how it has ended."""
        while not self._is_over.is_set():
            with trio.move_on_at(self._ends_at):
                await self._is_over.wait()
            if self.state is OfferState.ASKING:
                await self._is_over.wait()  # a person is asked, and may take longer
        return self.state

    async def _welcome(self, channel: SecureChannel) -> None:
        link = MachineLink(channel)
        try:
            await self._decide(link)
            await hear_out(channel)
        except (TransportError, MessageError, trio.EndOfChannel):
            pass  # gone before the answer; what has been decided stands
        finally:
            await close_quietly(channel)

    async def _decide(self, link: MachineLink) -> None:
        message = await link.hear()
        if not isinstance(message, Join):
            raise MessageError(f"{message.type!r} on a pairing link")
        if self.state is not OfferState.OPEN:
            who = f", by {fingerprint(self._joined_key)}" if self._joined_key else ""
            await link.refuse(
                f"{self.state.value}{who}; run `stage-worker offer` there for another"
            )
        elif message.software != self._software:
            await link.refuse(
                f"the machine runs veilpipe {self._software}, home {message.software}; install "
                "the same version on both"
            )
        else:
            self._state, decision = OfferState.ASKING, OfferState.OPEN
            try:
                may_join = await self._ask(link.peer_key)
                decision = OfferState.USED if may_join else OfferState.DECLINED
            finally:
                self._state = decision
            await self._conclude(link, decision)

    async def _conclude(self, link: MachineLink, decision: OfferState) -> None:
        if decision is OfferState.USED:
            self._joined_key = link.peer_key
            self._on_joined(link.peer_key)
        try:
            if decision is OfferState.USED:
                await link.say(Joined())
            else:
                await link.refuse(decision.value)
        finally:
            self._end(decision)

    def _end(self, state: OfferState) -> None:
        self._state = state
        self._is_over.set()
