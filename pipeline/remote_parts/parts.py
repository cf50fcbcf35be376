"""A stage's layers whose parts are answered elsewhere, and the session with whoever answers."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.errors import InputError, PartLost, PartRefused
from pipeline.models.layer_parts import LayerParts
from pipeline.protocol.peer_connections import CONTROL_EPOCH, connect_retrying, describe
from pipeline.protocol.step_limits import SessionLimits
from pipeline.remote_parts.lanes import Lanes
from pipeline.remote_parts.link import PartLink
from pipeline.remote_parts.wire import Message
from transport.channel import SecureChannel
from transport.dial_and_listen import Endpoint
from transport.errors import AttestationError, HandshakeError, TransportError
from transport.handshake import Link, LinkKind, Role, RoleKind
from transport.tensor_frames import FrameLimits, Tensor

PART = Role(RoleKind.PART)
# An honest worker answers in milliseconds, and a chunk of a long text in a second or so.
SILENCE_SECONDS = 30.0


def part_link(manifest: Manifest) -> Link:
    """The link that both ends must agree on."""
    stage = Role(RoleKind.STAGE, 0)
    return Link(LinkKind.DATA, stage, PART, manifest.core_hash(), CONTROL_EPOCH)


class Asked(Protocol):
    """Whoever answers: a `PartLink`, or a worker in this process."""

    def ask(
        self,
        header: bytes,
        tensors: tuple[Tensor, ...] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> Message:
        """See `PartLink.ask`."""
        ...


class SessionSize(Protocol):
    """Of `SessionLimits` what a worker has to know."""

    @property
    def num_slots(self) -> int:
        """Requests side by side."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Tokens of each."""
        ...


class RemoteParts(LayerParts):
    """Parts that ask; a mode says which, and what it tells the worker at first.

    The worker is another one in each session, and is told nothing that outlives it.
    """

    are_recordable = False

    def __init__(self, limits: FrameLimits) -> None:
        """`limits`: what may come for an answer."""
        self.limits = limits
        self.lanes = Lanes()
        self.overlap = self.lanes
        self._link: Asked | None = None

    @property
    def link(self) -> Asked:
        """To the session's worker."""
        assert self._link is not None, "steps come in sessions"
        return self._link

    def begin(self, limits: SessionSize) -> None:
        """A session begins, with a worker that knows nothing yet. Raises PartLost, PartRefused."""

    def end(self) -> None:
        """The session is over: whatever was kept of it is to be forgotten."""

    @asynccontextmanager
    async def session(self, link: PartLink, limits: SessionLimits) -> AsyncIterator[None]:
        """Work with this link's worker."""
        try:
            self.attach(link, limits)
            yield
        finally:
            self.end()
            self._link = None
            link.close()

    def attach(self, link: Asked, limits: SessionSize) -> None:
        """Begin a session with whoever is asked. Raises PartLost, PartRefused."""
        self._link = link
        self.begin(limits)


class PartAccess:
    """How a stage reaches the worker that it asks."""

    def __init__(
        self,
        manifest: Manifest,
        trust: Trust,
        parts: RemoteParts,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        """Raises InputError for a manifest that does not say where the worker is."""
        assert manifest.part is not None, "there is a part"
        if manifest.part.address is None:
            raise InputError("the manifest's part has no address; add one")
        self._where: Endpoint = manifest.part.address.to_endpoint()
        self._name = f"the {manifest.part.kind} worker at {self._where}"
        self._link = part_link(manifest)
        self._trust = trust
        self._parts = parts
        self._silence_seconds = silence_seconds

    @asynccontextmanager
    async def session(
        self, limits: SessionLimits, on_waiting: Callable[[str], None], seed: bytes | None = None
    ) -> AsyncIterator[None]:
        """The parts may ask while this is open; `on_waiting` hears that the worker is not up.

        Raises PartLost, and PartRefused where it is not the manifest's or refuses the session.
        """
        del seed  # keys stay where they are made
        link = await self.dial(on_waiting)
        async with self._parts.session(link, limits):
            yield

    async def dial(self, on_waiting: Callable[[str], None]) -> PartLink:
        """A link to the worker, once it is up. Raises PartLost, PartRefused."""
        channel = await self._dial(on_waiting)
        return PartLink(channel.taken_over(self._silence_seconds), self._name, self._parts.lanes)

    async def _dial(self, on_waiting: Callable[[str], None]) -> SecureChannel:
        def on_wait(error: TransportError) -> None:
            on_waiting(f"{self._name} is not up ({error})")

        credentials = self._trust.toward(PART, {})
        try:
            return await connect_retrying(
                lambda: self._where, self._link, credentials, self._parts.limits, on_wait
            )
        except (AttestationError, HandshakeError) as error:
            raise PartRefused(f"{self._name}: {describe(error)}") from error
        except (TransportError, trio.EndOfChannel, trio.TooSlowError) as error:
            raise PartLost(f"{self._name}: {describe(error)}") from error
