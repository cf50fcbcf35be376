"""One orchestrator's session on a stage: its data channels, its KV state, its requests."""

import logging
from functools import partial
from time import perf_counter_ns
from typing import NoReturn

import trio

from pipeline.errors import MessageError
from pipeline.protocol.links import ControlLink, StepGate, receive_step, send_step
from pipeline.protocol.messages import (
    Abort,
    Broken,
    Done,
    Failure,
    Health,
    Init,
    Load,
    Message,
    Ready,
    Rewind,
    Save,
    Shutdown,
    Start,
    Waiting,
)
from pipeline.protocol.peer_connections import close_quietly, describe, hang_up, say
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_limits import SessionLimits
from pipeline.stage.data_channels import DOWNSTREAM, UPSTREAM, LinkBroken, Neighbours
from pipeline.stage.decode_lane import Lane
from pipeline.stage.dial_policy import Target
from pipeline.stage.session_admission import expect_step
from pipeline.stage.slot_storage import SlotStorage
from pipeline.stage.stage_metrics import StageMeter
from pipeline.stage.worker_setup import StageSetup, new_core
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.dial_and_listen import Listener
from transport.errors import TransportError
from transport.frozen import frozen

logger = logging.getLogger(__name__)

# For the result of a step to be read, when this worker has been told to stop.
LEAVE_SECONDS = 5.0
# Between steps shorter than this the channels' own turns are enough.
LONG_STEP_NS = 50_000_000


class SessionEnded(Exception):
    """The orchestrator ended the session, or is gone; `reason` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@frozen
class _Epoch:
    """What the data channels of one stretch bind and lead to, and what comes first on them."""

    epoch: bytes
    target: Target | None
    replay_until: int | None = None


class StageSession:
    """From `init` to the end of the orchestrator's control channel.

    Data channels come and go meanwhile: when one breaks, or the orchestrator says so, KV state goes
    back to what is certain and both neighbours are met afresh, under a new epoch, so that nothing
    of before can still be on its way.
    """

    def __init__(
        self,
        setup: StageSetup,
        meter: StageMeter,
        control: ControlLink,
        init: Init,
        limits: SessionLimits,
    ) -> None:
        self._setup = setup
        self._meter = meter
        self._control = control
        self._init = init
        self._limits = limits
        self._core = new_core(setup, limits, init.kept)
        is_found = init.kept is not None and init.kept == self._core.name
        self._core.go_on(init.lengths if is_found else None)
        # Not a method of this object: a reference back to it would keep the KV memory of an ended
        # session alive until the garbage collector comes by.
        expect = partial(
            expect_step,
            limits=limits,
            stage_idx=setup.stage_idx,
            num_stages=len(setup.manifest.stages),
        )
        self._gate = StepGate(limits, expect)
        self._neighbours = Neighbours(
            setup, init, control, meter, self._gate.frame_limits(limits.max_tensor_bytes)
        )
        self._storage = SlotStorage(self._core, setup.store, control)
        # What its layers need beside it, if anything, is there.
        self._has_parts = trio.Event()
        self._requests: set[int] = set()
        self._rewind: Rewind | None = None
        self._is_rewound = trio.Event()
        self._scope = trio.CancelScope()
        # The orchestrator has said so: nothing is missing at the end of what it was sent.
        self._is_over = False
        # Whether a step has come and its result is not on its way, and whoever waits for that.
        self._has_step = False
        self._step_done = trio.Event()

    async def leave(self) -> None:
        """Let the step under way go on, and tell the orchestrator that this stage leaves.

        It would find out by itself, but may take a worker that is only busy for one that hangs.
        """
        if self._has_step:
            self._step_done = trio.Event()
            with trio.move_on_after(LEAVE_SECONDS):
                await self._step_done.wait()
        await say(self._control, Failure(code="leaving", detail="its worker has been told to stop"))

    async def run(self, data_in: Listener) -> None:
        """Serve steps, whatever happens to data channels. Ends by raising the reason of the end."""
        try:
            async with open_tasks() as tasks:
                tasks.start_soon(self._serve_control, tasks)
                tasks.start_soon(self._hold_parts, tasks)
                await self._serve_epochs(data_in)
        finally:
            # Whoever holds this memory next must not find the last user's keys and values.
            self._core.release()

    async def _hold_parts(self, tasks: trio.Nursery) -> None:
        """Have what the shard's layers need; the orchestrator hears what that waits for."""
        session = self._setup.parts_session
        if session is None:
            self._has_parts.set()
            return
        told = ""

        def on_waiting(text: str) -> None:
            nonlocal told
            if text != told:
                told = text
                tasks.start_soon(say, self._control, Waiting(detail=text[:1024]))

        async with session(self._limits, on_waiting, self._init.seed):
            self._has_parts.set()
            await trio.sleep_forever()

    async def _serve_epochs(self, data_in: Listener) -> NoReturn:
        epoch = _Epoch(self._init.epoch, self._setup.target(self._init.data_out))
        while True:
            with self._scope:
                await self._serve_epoch(epoch, data_in)
            epoch = await self._next_epoch()

    async def _next_epoch(self) -> _Epoch:
        """Wait for the orchestrator's `rewind`, the latest if there are several, and obey it."""
        await self._is_rewound.wait()
        rewind = self._rewind
        assert rewind is not None  # set before the event
        self._is_rewound = trio.Event()
        self._scope = trio.CancelScope()
        self._core.rewind(rewind.lengths)
        logger.info("event=rewound stage=%d", self._setup.stage_idx)
        return _Epoch(rewind.epoch, self._setup.target(rewind.data_out), rewind.replay_until)

    async def _serve_epoch(self, epoch: _Epoch, data_in: Listener) -> None:
        """Meet both neighbours and serve steps until a channel breaks; the orchestrator hears."""
        channels: list[SecureChannel] = []
        is_closed = False
        try:
            upstream, downstream = await self._neighbours.meet(
                epoch.epoch, data_in, epoch.target, channels
            )
            await self._has_parts.wait()
            await self._control.send(self._ready(epoch.epoch))
            logger.info("event=ready stage=%d", self._setup.stage_idx)
            # Whoever asks for what is not kept has just heard of that, and asks for something else.
            if epoch.replay_until is not None and self._core.keeps_activations:
                await self._replay(downstream, epoch.replay_until)
            await self._serve_steps(upstream, downstream)
        except LinkBroken as broken:
            is_closed = broken.is_closed
            what = "closed" if is_closed else "broken"
            logger.info("event=link_%s stage=%d error=%s", what, self._setup.stage_idx, broken)
            # Should this fail, the control channel's own reader says what that means.
            message = Broken(epoch=epoch.epoch, side=broken.side, detail=broken.detail)
            await say(self._control, message)
        finally:
            for channel in channels:
                self._meter.close(channel)
                # A neighbour may learn of the session's end from this before the orchestrator.
                is_clean = is_closed or self._is_over
                await (close_quietly(channel) if is_clean else hang_up(channel))

    def _ready(self, epoch: bytes) -> Ready:
        setup = self._setup
        return Ready(
            epoch=epoch,
            stage_idx=setup.stage_idx,
            weight_bytes=setup.shard.num_weight_bytes,
            kv_bytes=self._core.num_bytes,
            kv_tokens=self._core.num_tokens,
            vocab_size=setup.shard.config.vocab_size,
            precision=setup.precision,
            kernels=setup.shard.kernels.name,
            num_threads=setup.num_threads,
            device=setup.device,
            keeps_activations=self._core.keeps_activations,
            is_row_exact=setup.shard.is_row_exact,
            kept=self._core.name,
        )

    async def _serve_control(self, tasks: trio.Nursery) -> None:
        seconds = self._setup.times.idle_seconds  # it sends `health` every one
        while True:
            try:
                # The answer is inside: a peer that asks and never reads is silent as well.
                with trio.fail_after(seconds):
                    self._take(message := await self._control.receive(), tasks)
                    if isinstance(message, Health):
                        await self._control.send(self._meter.answer(message, self._core))
            except trio.TooSlowError:
                raise SessionEnded(f"orchestrator silent for {seconds:g} s") from None
            except (trio.EndOfChannel, trio.ClosedResourceError, TransportError) as error:
                raise SessionEnded(f"orchestrator is gone ({describe(error)})") from error

    def _take(self, message: Message, tasks: trio.Nursery) -> None:
        match message:
            case Health():
                pass  # answered by the caller
            case Start(request_id=request_id, slot=slot):
                is_valid = 0 <= slot < self._limits.num_slots and request_id not in self._requests
                if not is_valid or len(self._requests) >= self._limits.num_slots:
                    raise MessageError(f"start of request {request_id} in slot {slot} is refused")
                self._requests.add(request_id)
            case Done(request_id=request_id) | Abort(request_id=request_id):
                self._requests.discard(request_id)
            case Rewind():
                self._check_rewind(message)
                self._storage.cancel()
                self._rewind = message
                self._is_rewound.set()
                self._scope.cancel()
            case Save() | Load():
                self._storage.take(message, tasks)
            case Shutdown():
                self._is_over = True
                raise SessionEnded("shutdown")
            case _:
                raise MessageError(f"control message {message.type!r} is not for a stage")

    def _check_rewind(self, rewind: Rewind) -> None:
        """What its slots hold is checked once the step under way is out of the way.

        Raises MessageError, or SessionRefused for an address that may not be dialed.
        """
        self._setup.target(rewind.data_out)
        until, num_stages = rewind.replay_until, len(self._setup.manifest.stages)
        if until is not None and not self._setup.stage_idx < until < num_stages:
            raise MessageError(
                f"replay until stage {until} is not for stage {self._setup.stage_idx} "
                f"of {num_stages}"
            )

    async def _replay(self, downstream: SecureChannel, until: int) -> None:
        num_steps = 0
        for header, tensors in self._core.replay(until):
            with DOWNSTREAM:
                await send_step(downstream, header, tensors)
            num_steps += 1
        logger.info("event=replayed stage=%d steps=%d", self._setup.stage_idx, num_steps)

    async def _serve_steps(self, upstream: SecureChannel, downstream: SecureChannel) -> None:
        lane = Lane(self._core, self._meter, upstream, downstream, self._setup.stage_idx)
        try:
            await self._serve_both_ways(lane, upstream, downstream)
        finally:
            lane.wipe()
            self._has_step = False
            self._step_done.set()

    async def _serve_both_ways(
        self, lane: Lane, upstream: SecureChannel, downstream: SecureChannel
    ) -> None:
        while True:
            await lane.serve()
            with UPSTREAM:
                header, tensors = await receive_step(upstream, self._gate)
            started = perf_counter_ns()
            self._has_step = True
            done = self._core.take(header, tensors)
            num_tokens = header.num_tokens if header.kind is StepKind.STEP else 0
            timing = self._meter.step(num_tokens, len(header.segments), perf_counter_ns() - started)
            for each, outputs in done:
                if each.kind is StepKind.REPLAY and each.until <= self._setup.stage_idx:
                    continue
                with DOWNSTREAM:
                    await send_step(downstream, each.with_timing(timing), outputs)
            self._has_step = False
            self._step_done.set()
            self._core.keep()
            lane.learn(header)
            if timing.compute_ns > LONG_STEP_NS:
                # Several steps may have come at once; the control channel has its turn between
                # long ones, or a stage that is only busy would be taken for hung.
                await trio.lowlevel.checkpoint()
