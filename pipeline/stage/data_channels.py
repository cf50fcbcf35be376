"""A stage's data channels: the one it accepts, the one it dials, and what it waits for."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import trio

from pipeline.protocol.links import SEND_ONLY_LIMITS, ControlLink
from pipeline.protocol.messages import Init, Waiting
from pipeline.protocol.peer_connections import (
    ORCHESTRATOR,
    accept_of_each,
    connect_retrying,
    describe,
)
from pipeline.stage.dial_policy import Target
from pipeline.stage.stage_metrics import StageMeter
from pipeline.stage.worker_setup import StageSetup
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.dial_and_listen import Listener
from transport.errors import DialRefused, TransportError
from transport.handshake import Link, LinkKind, Role, RoleKind
from transport.tensor_frames import FrameLimits

logger = logging.getLogger(__name__)

# Between reports of what a stage waits for.
WAITING_SECONDS = 1.0

Side = Literal["upstream", "downstream"]
# A link, what its initiator has to show, and what may come on it.
_Awaited = tuple[Link, Mapping[int, bytes], FrameLimits]


class LinkBroken(Exception):
    """A data channel broke, or was closed; the session may go on, on new ones."""

    def __init__(self, side: Side, error: BaseException) -> None:
        self.side: Side = side
        self.detail = describe(error)
        # By the peer, in its own word for it.
        self.is_closed = isinstance(error, trio.EndOfChannel)
        super().__init__(f"{side}: {self.detail}")


class OnLink:
    """A context that names the side on which a data channel breaks. Raises LinkBroken.

    A class, because steps pass through it twice: in a third of a generator's time.
    """

    def __init__(self, side: Side) -> None:
        self._side = side

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TransportError | trio.EndOfChannel | trio.TooSlowError):
            raise self.broken(error) from error

    def broken(self, error: Exception) -> LinkBroken:
        """What to raise for an error on this side."""
        return LinkBroken(self._side, error)


UPSTREAM, DOWNSTREAM = OnLink("upstream"), OnLink("downstream")


class Neighbours:
    """Meets the stages on both sides of this one, or the orchestrator at the ends."""

    def __init__(
        self,
        setup: StageSetup,
        init: Init,
        control: ControlLink,
        meter: StageMeter,
        upstream_limits: FrameLimits,
    ) -> None:
        self._setup = setup
        self._init = init
        self._control = control
        self._meter = meter
        self._upstream_limits = upstream_limits
        self._waiting_for: str | None = None

    async def meet(
        self, epoch: bytes, data_in: Listener, target: Target | None, channels: list[SecureChannel]
    ) -> tuple[SecureChannel, SecureChannel]:
        """Both channels of `epoch`; whatever has been opened is in `channels`, come what may.

        Without a `target` the orchestrator dials here for the results.

        Raises LinkBroken when the stage behind refuses, or is not what it should be, and
        SessionRefused when `target` is no address that this one may dial.
        """
        self._waiting_for, setup = None, self._setup
        awaited = [self._upstream(epoch)]
        if target is None:
            awaited.append(self._results(epoch))
        accepted: list[SecureChannel] = []

        async def accept() -> None:
            accepted.extend(await accept_of_each(data_in, awaited, setup.trust, setup.times))
            accepted[0].wait_in_place(self._setup.patience_ms)
            self._note(accepted, channels)

        async with open_tasks() as reporting:
            reporting.start_soon(self._report_waiting)
            async with open_tasks() as tasks:
                tasks.start_soon(accept)
                if target is not None:
                    downstream = await self._dial_downstream(epoch, target)
                    self._note([downstream], channels)
            reporting.cancel_scope.cancel()
        upstream, *results = accepted  # the task group has ended without an error
        return upstream, results[0] if target is None else downstream

    def _note(self, opened: Sequence[SecureChannel], channels: list[SecureChannel]) -> None:
        channels.extend(opened)
        for channel in opened:
            self._meter.open(channel)

    def _upstream(self, epoch: bytes) -> _Awaited:
        stage_idx = self._setup.stage_idx
        peer = Role(RoleKind.STAGE, stage_idx - 1) if stage_idx else ORCHESTRATOR
        link = self._link(epoch, initiator=peer, responder=self._setup.role)
        return link, self._init.upstream_measurements, self._upstream_limits

    def _results(self, epoch: bytes) -> _Awaited:
        core_hash, own = self._setup.manifest.core_hash(), self._setup.role
        link = Link(LinkKind.RESULTS, ORCHESTRATOR, own, core_hash, epoch)
        return link, {}, SEND_ONLY_LIMITS

    async def _dial_downstream(self, epoch: bytes, target: Target) -> SecureChannel:
        setup = self._setup
        is_last = setup.stage_idx == len(setup.manifest.stages) - 1
        peer = ORCHESTRATOR if is_last else Role(RoleKind.STAGE, setup.stage_idx + 1)
        link = self._link(epoch, initiator=setup.role, responder=peer)
        credentials = setup.trust.toward(peer, self._init.downstream_measurements)
        with DOWNSTREAM:
            # Retries end with the session: the orchestrator is the one who loses patience.
            try:
                return await connect_retrying(
                    lambda: target.endpoint,
                    link,
                    credentials,
                    SEND_ONLY_LIMITS,
                    self._note_waiting,
                    target.permit,
                    setup.times,
                )
            except DialRefused as error:
                raise setup.dial_policy.refusal(target.endpoint) from error

    def _link(self, epoch: bytes, *, initiator: Role, responder: Role) -> Link:
        core_hash = self._setup.manifest.core_hash()
        return Link(LinkKind.DATA, initiator, responder, core_hash, epoch)

    def _note_waiting(self, error: TransportError) -> None:
        if self._waiting_for is None:
            logger.info("event=waiting error=%s", error)
        self._waiting_for = describe(error)

    async def _report_waiting(self) -> None:
        """Tell the orchestrator, whose user can do something about it."""
        reported = None
        while True:
            await trio.sleep(WAITING_SECONDS)
            if self._waiting_for != reported:
                reported = self._waiting_for
                await self._control.send(Waiting(detail=reported or ""))
