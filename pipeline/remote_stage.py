"""A stage as the orchestrator sees it: its control channel, watched from the first moment on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import trio

from pipeline.errors import MessageError, SessionError, StageHung, StageLost
from pipeline.links import ControlLink
from pipeline.manifest import StageSpec
from pipeline.messages import Failure, Health, Healthy, Message, Ready, StageFigures, Waiting
from pipeline.peers import describe
from pipeline.tasks import open_tasks
from transport.errors import TransportError
from transport.handshake import Peer

# Often enough for someone who watches, rare enough to be free.
HEALTH_SECONDS = 1.0
# When a data channel breaks, the control channel of the stage that died ends at the same moment;
# its neighbours' complaints may only be quicker.
BLAME_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a stage has to say of itself when it is ready."""

    spec: StageSpec
    is_last: bool


class RemoteStage:
    """One stage's control channel. `watch` must run for anything here to move."""

    def __init__(
        self, expected: Expectation, control: ControlLink, on_waiting: Callable[[str], None]
    ) -> None:
        """`on_waiting` hears what the stage itself is waiting for."""
        self.idx = expected.spec.stage_idx
        self._expected = expected
        self._control = control
        self._on_waiting = on_waiting
        self._ready: Ready | None = None
        self._is_ready = trio.Event()
        self._last_heard = self.connected_at = trio.current_time()
        # What it last told of itself, and what before that: together they give rates.
        self.figures: StageFigures | None = None
        self.past_figures: StageFigures | None = None

    @property
    def peer(self) -> Peer:
        """Whom the handshake has authenticated."""
        return self._control.channel.peer

    @property
    def precision(self) -> str | None:
        """What its weights are held in, once it has said so."""
        return None if self._ready is None else self._ready.precision

    @property
    def is_ready(self) -> bool:
        """Whether it has said that steps may flow."""
        return self._is_ready.is_set()

    async def send(self, message: Message) -> None:
        """Send a control message. Raises StageLost."""
        try:
            await self._control.send(message)
        except (TransportError, trio.ClosedResourceError) as error:
            raise StageLost(self.idx, describe(error)) from error

    async def ready(self) -> Ready:
        """What the stage told of itself once both its data channels stood."""
        await self._is_ready.wait()
        assert self._ready is not None  # set before the event
        return self._ready

    async def watch(self, hang_seconds: float) -> NoReturn:
        """Read the channel. Raises StageLost, StageHung or SessionError when the stage fails."""
        async with open_tasks() as tasks:
            tasks.start_soon(self._ask, hang_seconds)
            while True:
                try:
                    message = await self._control.receive()
                except (TransportError, trio.EndOfChannel) as error:
                    raise StageLost(self.idx, describe(error)) from error
                self._last_heard = trio.current_time()
                await self._take(message)

    async def _ask(self, hang_seconds: float) -> NoReturn:
        sequence = 0
        while True:
            await trio.sleep(min(HEALTH_SECONDS, hang_seconds / 2))
            if trio.current_time() - self._last_heard > hang_seconds:
                raise StageHung(self.idx, f"it has not answered for {hang_seconds:g} s")
            await self.send(Health(sequence=sequence))
            sequence += 1

    async def _take(self, message: Message) -> None:
        match message:
            case Healthy(figures=figures):
                self.past_figures, self.figures = self.figures, figures
            case Waiting(detail=detail):
                self._on_waiting(f"stage {self.idx} waits: {detail}")
            case Ready() if self._ready is None:
                self._check_ready(message)
                self._ready = message
                self._is_ready.set()
            case Failure():
                await self._raise_failure(message)
            case _:
                raise MessageError(f"stage {self.idx} sent {message.type!r} out of turn")

    def _check_ready(self, ready: Ready) -> None:
        """The stage is attested; this catches a worker started with other flags than planned."""
        spec = self._expected.spec
        # A manifest that pins no precision leaves it to the stage.
        expected = (spec.stage_idx, spec.precision or ready.precision)
        found = (ready.stage_idx, ready.precision)
        if found != expected:
            raise MessageError(
                f"stage {self.idx} says it is stage {found[0]} in {found[1]}, "
                f"the manifest says stage {expected[0]} in {expected[1]}"
            )

    async def _raise_failure(self, failure: Failure) -> NoReturn:
        reports = f"stage {self.idx} reports: {failure.detail}"
        if failure.code == "upstream" and self.idx > 0:
            await blame(self.idx - 1, reports)
        if failure.code == "downstream" and not self._expected.is_last:
            await blame(self.idx + 1, reports)
        if failure.code == "downstream":
            raise SessionError(f"stage {self.idx} cannot deliver its results: {failure.detail}")
        raise SessionError(f"stage {self.idx} refused the session: {failure.detail}")


async def blame(stage_idx: int, reason: str, cause: BaseException | None = None) -> NoReturn:
    """Name the stage at the far end of a broken link, unless a death explains it first."""
    await trio.sleep(BLAME_SECONDS)
    raise StageLost(stage_idx, reason) from cause
