"""A stage as the orchestrator sees it: its control channel, watched from the first moment on."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NoReturn

import trio

from pipeline.agreement.manifest import StageSpec
from pipeline.engine.step import Notice
from pipeline.errors import (
    LinkLost,
    MessageError,
    SessionError,
    SessionRefused,
    StageHung,
    StageLost,
)
from pipeline.protocol.links import ControlLink
from pipeline.protocol.messages import (
    Broken,
    Failure,
    Health,
    Healthy,
    Init,
    Load,
    Loaded,
    Message,
    NotStored,
    Ready,
    Rewind,
    Save,
    Saved,
    StageFigures,
    Waiting,
)
from pipeline.protocol.peer_connections import close_quietly, describe
from pipeline.tasks import open_tasks
from transport.errors import TransportError
from transport.frozen import frozen
from transport.handshake import Peer

# Often enough for someone who watches, rare enough to be free.
HEALTH_SECONDS = 1.0


@frozen
class Expectation:
    """What a stage has to say of itself when it is ready."""

    spec: StageSpec
    is_last: bool


class RemoteStage:
    """One stage's control channel. `watch` must run for anything here to move."""

    def __init__(
        self,
        expected: Expectation,
        control: ControlLink,
        on_waiting: Callable[[str], None],
        on_broken: Callable[[LinkLost], None],
        address: str = "",
    ) -> None:
        """The callbacks hear what the stage waits for, and of links that it says are broken.

        `address`: where it was found, for whoever watches.
        """
        self.idx = expected.spec.stage_idx
        self.address = address
        self.keeps_activations = False
        self._expected = expected
        self._control = control
        self._on_waiting = on_waiting
        self._on_broken = on_broken
        # Once it has begun it has a session, which can be rewound.
        self.has_begun = False
        self._epoch: bytes | None = None
        self._ready: Ready | None = None
        self._is_ready = trio.Event()
        self._num_unanswered = 0
        # Of requests' lives, what it has not been told yet.
        self._untold: deque[Notice] = deque()
        # Orders to save and load that are under way, and what they were answered.
        self._ordered: dict[int, trio.Event] = {}
        self._answers: dict[int, Saved | Loaded | NotStored] = {}
        self.connected_at = trio.current_time()
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
    def kernels(self) -> str | None:
        """What it computes with, once it has said so."""
        return None if self._ready is None else self._ready.kernels

    @property
    def is_ready(self) -> bool:
        """Whether it has said that steps may flow."""
        return self._is_ready.is_set()

    def end_epoch(self) -> None:
        """Its data channels are given up: whatever it still says of them is of no interest."""
        self._epoch = self._ready = None
        self._is_ready = trio.Event()

    async def begin(self, message: Init | Rewind) -> None:
        """Open the stage's session, or rewind it, for a new epoch. Raises StageLost."""
        self.end_epoch()
        self._epoch = message.epoch
        await self.send(message)
        self.has_begun = True  # not before: cancelled on the way, the stage has heard of nothing

    async def aclose(self) -> None:
        """Hang up."""
        await close_quietly(self._control.channel)

    async def send(self, message: Message) -> None:
        """Send a control message. Raises StageLost."""
        try:
            await self._control.send(message)
        except (TransportError, trio.ClosedResourceError) as error:
            raise StageLost(self.idx, describe(error)) from error

    def note(self, notices: Iterable[Notice]) -> None:
        """Have this told by the next `tell`: also if the one under way is cut short by a loss."""
        self._untold += notices

    async def tell(self) -> None:
        """Tell the stage of requests' lives what it has not heard yet. Raises StageLost."""
        while self._untold:
            await self.send(self._untold[0])
            self._untold.popleft()

    async def order(self, order: Save | Load) -> Saved | Loaded | NotStored:
        """Have the stage save or load; what it answers. Raises StageLost if it cannot be told.

        One that is lost meanwhile answers never: whoever waits is cancelled then.
        """
        number = order.operation
        self._ordered[number] = is_answered = trio.Event()
        try:
            await self.send(order)
            await is_answered.wait()
            return self._answers[number]
        finally:
            del self._ordered[number]
            self._answers.pop(number, None)

    async def ready(self) -> Ready:
        """What the stage told of itself once both its data channels of this epoch stood."""
        await self._is_ready.wait()
        assert self._ready is not None  # set before the event
        return self._ready

    async def watch(self, idle_seconds: float) -> NoReturn:
        """Read the channel until the stage fails.

        Raises StageLost, StageHung, SessionRefused for what it will never do, or SessionError.
        """
        async with open_tasks() as tasks:
            tasks.start_soon(self._ask, idle_seconds)
            while True:
                try:
                    message = await self._control.receive()
                except (TransportError, trio.EndOfChannel, trio.ClosedResourceError) as error:
                    # Closed by whoever failed to send: it may notice first that the stage is gone.
                    raise StageLost(self.idx, describe(error)) from error
                except MessageError as error:
                    raise MessageError(f"stage {self.idx}: {error}") from error
                self._num_unanswered = 0
                self._take(message)

    async def _ask(self, idle_seconds: float) -> NoReturn:
        pause_seconds = min(HEALTH_SECONDS, idle_seconds / 2)
        sequence = 0
        while True:
            await trio.sleep(pause_seconds)
            # Questions are counted, not seconds: while this process itself is stopped, none is put.
            if self._num_unanswered * pause_seconds >= idle_seconds:
                raise StageHung(self.idx, f"it has not answered for {idle_seconds:g} s")
            await self.send(Health(sequence=sequence))
            self._num_unanswered += 1
            sequence += 1

    def _take(self, message: Message) -> None:
        match message:
            case Healthy(figures=figures):
                self.past_figures, self.figures = self.figures, figures
            case Waiting(detail=detail):
                self._on_waiting(f"stage {self.idx} waits: {detail}")
            case Ready(epoch=epoch) | Broken(epoch=epoch) if epoch != self._epoch:
                pass  # said before it heard of the epoch that is
            case Ready() if self._ready is None:
                self._check_ready(message)
                self._ready = message
                self.keeps_activations = message.keeps_activations
                self._is_ready.set()
            case Saved() | Loaded() | NotStored():
                # Else it is of an order that has been given up, as all are by a loss.
                if message.operation in self._ordered:
                    self._answers[message.operation] = message
                    self._ordered[message.operation].set()
            case Broken():
                self._on_broken(self._link_lost(message))
            case Failure():
                raise self._ended(message)
            case _:
                raise MessageError(f"stage {self.idx} sent {message.type!r} out of turn")

    def _ended(self, failure: Failure) -> SessionError:
        match failure.code:
            case "refused":
                return SessionRefused(f"stage {self.idx} refused the session: {failure.detail}")
            case "leaving":
                return StageLost(self.idx, failure.detail)
        return SessionError(f"stage {self.idx} ended the session: {failure.detail}")

    def _check_ready(self, ready: Ready) -> None:
        """The stage is attested; this catches a worker started with other flags than planned."""
        spec = self._expected.spec
        # A manifest that pins no precision, or no kernels, leaves them to the stage.
        expected = (
            spec.stage_idx,
            spec.precision or ready.precision,
            spec.kernels or ready.kernels,
        )
        found = (ready.stage_idx, ready.precision, ready.kernels)
        if found != expected:
            raise MessageError(
                f"stage {self.idx} says it is stage {found[0]} in {found[1]} on {found[2]}, "
                f"the manifest says stage {expected[0]} in {expected[1]} on {expected[2]}"
            )

    def _link_lost(self, broken: Broken) -> LinkLost:
        """Name the stage at the far end: it may be the one that has died."""
        if broken.side == "downstream" and self._expected.is_last:
            return LinkLost(self.idx, f"it cannot deliver its results: {broken.detail}")
        far = self.idx - 1 if broken.side == "upstream" else self.idx + 1
        return LinkLost(max(far, 0), f"stage {self.idx} reports: {broken.detail}")
