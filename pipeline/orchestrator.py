"""The orchestrator: a trio shell on the user's side that connects the stages and drives steps."""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

import trio

from pipeline.engine.scheduler import Limits, Step
from pipeline.errors import InputError, MessageError, SessionError, StageHung, StageLost
from pipeline.links import (
    CONTROL_LIMITS,
    SEND_ONLY_LIMITS,
    ControlLink,
    StepGate,
    receive_step,
    send_step,
)
from pipeline.manifest import Manifest
from pipeline.messages import (
    Failure,
    Health,
    Healthy,
    Init,
    Message,
    Ready,
    Shutdown,
    StepHeader,
    StepKind,
    Want,
)
from pipeline.peers import (
    CONTROL_EPOCH,
    HANDSHAKE_SECONDS,
    ORCHESTRATOR,
    accept_first,
    close_quietly,
    describe,
    say,
)
from pipeline.steps import (
    ACTIVATION_DTYPES,
    CLEAR_SENTINEL,
    CLEAR_SPEC,
    SessionLimits,
    StepResult,
    step_result,
    token_ids_to_wire,
)
from pipeline.tasks import open_tasks
from pipeline.trust import Trust
from transport.channel import SecureChannel, connect_channel
from transport.endpoint import Endpoint, Listener, dial_retrying, listen
from transport.errors import EndpointError, NoAnswer, TransportError
from transport.frames import DType, TensorSpec
from transport.handshake import Link, LinkKind, Role, RoleKind

logger = logging.getLogger(__name__)

# Often enough that a hung stage is noticed while someone still watches, rare enough to be free.
HEALTH_SECONDS = 5.0
# A stage computes a chunk without looking up; one that answers nothing for this long is hung.
HANG_SECONDS = 60.0
# When a data channel breaks, the control channel of the stage that died ends at the same moment;
# its neighbours' complaints may only be quicker.
BLAME_SECONDS = 1.0
# Between tries of a stage whose relay answers for it, before it is up.
NO_ANSWER_SECONDS = 1.0
# The largest vocabularies have a quarter of this; it bounds what a step's logits may take.
MAX_VOCAB = 1 << 20

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What the user may choose beside the manifest."""

    limits: Limits
    connect_seconds: float
    data_out_listen: Endpoint | None = None
    hang_seconds: float = HANG_SECONDS


@dataclass(frozen=True, slots=True)
class _Stage:
    idx: int
    control: ControlLink
    is_last: bool


class Pipeline:
    """Connected stages: steps go in, their results come out in order."""

    def __init__(
        self,
        stages: Sequence[_Stage],
        ready: Sequence[Ready],
        data_in: SecureChannel,
        data_out: SecureChannel,
        gate: StepGate,
    ) -> None:
        self.ready = tuple(ready)
        self._stages = stages
        self._data_in = data_in
        self._data_out = data_out
        self._gate = gate

    async def send(self, step: Step) -> None:
        """Send a step to the first stage."""
        if step.header.kind is StepKind.CLEAR:
            tensor = CLEAR_SENTINEL
        else:
            tensor = token_ids_to_wire(step.token_ids)
        try:
            await send_step(self._data_in, step.header, (tensor,))
        except (TransportError, trio.EndOfChannel) as error:
            await _blame(0, f"its data channel broke: {describe(error)}", error)

    async def receive(self) -> StepResult:
        """The oldest outstanding step's result, the stages' timings in its header."""
        try:
            header, tensors = await receive_step(self._data_out, self._gate)
        except (TransportError, trio.EndOfChannel) as error:
            last = self._stages[-1].idx
            await _blame(last, f"its data channel broke: {describe(error)}", error)
        return step_result(header, tensors)

    async def notify(self, message: Message) -> None:
        """Tell every stage about a request's life."""
        for stage in self._stages:
            try:
                await stage.control.send(message)
            except TransportError as error:
                raise StageLost(stage.idx, describe(error)) from error


@asynccontextmanager
async def open_pipeline(
    manifest: Manifest, trust: Trust, options: PipelineOptions, progress: Progress
) -> AsyncIterator[Pipeline]:
    """Connect every stage of `manifest`, verify what it runs, and yield the working pipeline.

    Raises SessionError or StageLost naming the stage that is missing, refused or lost; while the
    body runs, the loss of any stage is raised in it.
    """
    connector = _Connector(manifest, trust, options, progress)
    try:
        async with open_tasks() as tasks:
            with trio.move_on_after(options.connect_seconds) as deadline:
                pipeline = await connector.connect()
            if deadline.cancelled_caught:
                raise SessionError(
                    f"gave up after {options.connect_seconds:g} s: {connector.waiting_for}"
                )
            for stage in connector.stages:
                tasks.start_soon(_watch, stage, options.hang_seconds)
            yield pipeline
            tasks.cancel_scope.cancel()
        # Nobody watches any more: a stage may close its channel as soon as it hears this.
        for stage in connector.stages:
            await say(stage.control, Shutdown())
    finally:
        await connector.aclose()


class _Connector:
    """Builds the pipeline's channels; owns and closes whatever has been opened."""

    def __init__(
        self, manifest: Manifest, trust: Trust, options: PipelineOptions, progress: Progress
    ) -> None:
        self.stages: list[_Stage] = []
        self._manifest = manifest
        self._trust = trust
        self._options = options
        self._progress = progress
        self._epoch = os.urandom(16)
        self._channels: list[SecureChannel] = []
        self._pending: dict[str, str] = {}
        spec = manifest.activation_spec
        self._limits = SessionLimits(
            num_slots=options.limits.num_slots,
            max_seq_len=options.limits.max_seq_len,
            max_step_tokens=options.limits.max_step_tokens,
            hidden_dim=spec.hidden_dim,
            activation_dtype=ACTIVATION_DTYPES[spec.dtype],
        )

    @property
    def waiting_for(self) -> str:
        """What the connection still lacks, for the user."""
        return "; ".join(self._pending.values()) or "the stages did not become ready"

    async def aclose(self) -> None:
        """Close every channel that was opened."""
        for channel in self._channels:
            await close_quietly(channel)

    async def connect(self) -> Pipeline:
        """Control channels first, then data channels from the first stage to the last."""
        manifest = self._manifest
        last = manifest.stages[-1].stage_idx
        listen_at = self._options.data_out_listen or (
            manifest.endpoint(last).data_out.to_endpoint()
        )
        try:
            listener = listen(listen_at)
        except EndpointError as error:
            raise InputError(f"cannot listen for the last stage's results: {error}") from error
        try:
            async with open_tasks() as tasks:
                for spec in manifest.stages:
                    tasks.start_soon(self._connect_control, spec.stage_idx)
            self.stages.sort(key=lambda stage: stage.idx)
            for stage in self.stages:
                await stage.control.send(self._init(stage.idx))
            return await self._connect_data(listener)
        finally:
            listener.close()

    async def _connect_data(self, listener: Listener) -> Pipeline:
        gate = StepGate(self._limits, self._expect)
        links: dict[str, SecureChannel] = {}
        ready: list[Ready] = []

        async def accept_results() -> None:
            links["out"] = await self._accept_results(listener, gate)

        async with open_tasks() as tasks:
            for stage in self.stages:
                tasks.start_soon(self._await_ready, stage, ready)
            tasks.start_soon(accept_results)
            links["in"] = await self._dial_first()
        ready.sort(key=lambda message: message.stage_idx)
        return Pipeline(self.stages, ready, links["in"], links["out"], gate)

    async def _connect_control(self, stage_idx: int) -> None:
        endpoint = self._manifest.endpoint(stage_idx).control.to_endpoint()
        role = Role(RoleKind.STAGE, stage_idx)
        link = Link(LinkKind.CONTROL, ORCHESTRATOR, role, self._manifest.core_hash(), CONTROL_EPOCH)
        channel = await self._dial(stage_idx, endpoint, link)
        is_last = stage_idx == len(self._manifest.stages) - 1
        self.stages.append(_Stage(stage_idx, ControlLink(channel), is_last))

    async def _dial_first(self) -> SecureChannel:
        endpoint = self._manifest.endpoint(0).data_in.to_endpoint()
        return await self._dial(0, endpoint, self._data_link(ORCHESTRATOR, _stage_role(0)))

    async def _dial(self, stage_idx: int, endpoint: Endpoint, link: Link) -> SecureChannel:
        what = f"stage {stage_idx}'s {link.kind.name.lower()} channel at {endpoint}"

        is_announced = False

        def on_wait(error: TransportError) -> None:
            nonlocal is_announced
            if not is_announced:
                self._progress(f"waiting for {what}")
            is_announced = True
            self._pending[what] = f"{what} is not up ({error})"

        while True:
            sock = await dial_retrying(endpoint, on_wait)
            self._pending[what] = f"{what} does not answer the handshake"
            try:
                channel = await self._greet(sock, stage_idx, link)
                break
            except NoAnswer as error:  # a relay hangs up while it cannot reach the stage
                on_wait(error)
                await trio.sleep(NO_ANSWER_SECONDS)
            except (TransportError, trio.EndOfChannel, trio.TooSlowError) as error:
                raise SessionError(f"{what}: {describe(error)}") from error
        del self._pending[what]
        self._channels.append(channel)
        return channel

    async def _greet(self, sock: socket.socket, stage_idx: int, link: Link) -> SecureChannel:
        measurements = self._manifest.stage(stage_idx).measurements()
        credentials = self._trust.toward(link.responder, measurements)
        is_control = link.kind is LinkKind.CONTROL
        limits = CONTROL_LIMITS if is_control else SEND_ONLY_LIMITS
        with trio.fail_after(HANDSHAKE_SECONDS):
            return await connect_channel(sock, link, credentials, limits)

    async def _accept_results(self, listener: Listener, gate: StepGate) -> SecureChannel:
        last = self._manifest.stages[-1]
        link = self._data_link(_stage_role(last.stage_idx), ORCHESTRATOR)
        max_bytes = self._limits.num_slots * (1 + MAX_VOCAB) * DType.F32.itemsize
        channel = await accept_first(
            listener, link, self._trust, last.measurements(), gate.frame_limits(max_bytes)
        )
        self._channels.append(channel)
        return channel

    def _data_link(self, initiator: Role, responder: Role) -> Link:
        return Link(LinkKind.DATA, initiator, responder, self._manifest.whole_hash(), self._epoch)

    def _init(self, stage_idx: int) -> Init:
        stages, spec = self._manifest.stages, self._manifest.activation_spec
        is_last = stage_idx == len(stages) - 1
        return Init(
            epoch=self._epoch,
            manifest_hash=self._manifest.whole_hash(),
            stage_idx=stage_idx,
            activation_dtype=spec.dtype,
            hidden_dim=spec.hidden_dim,
            max_seq_len=self._limits.max_seq_len,
            num_slots=self._limits.num_slots,
            max_step_tokens=self._limits.max_step_tokens,
            data_out=str(self._manifest.endpoint(stage_idx).data_out.to_endpoint()),
            upstream_measurements=stages[stage_idx - 1].measurements() if stage_idx else {},
            downstream_measurements={} if is_last else stages[stage_idx + 1].measurements(),
        )

    async def _await_ready(self, stage: _Stage, ready: list[Ready]) -> None:
        what = f"stage {stage.idx}"
        self._pending[what] = f"{what} is not ready"
        message = await _receive(stage)
        if not isinstance(message, Ready):
            await _unexpected(stage, message)
        ready.append(message)
        del self._pending[what]

    def _expect(self, header: StepHeader, specs: tuple[TensorSpec, ...]) -> None:
        """What the last stage may return for a step; how many tokens, the scheduler checks."""
        if header.kind is StepKind.CLEAR:
            expected: tuple[TensorSpec, ...] = (CLEAR_SPEC,)
        else:
            num_results = sum(want is not Want.NOTHING for want in header.wants)
            expected = (TensorSpec(DType.U32, (num_results,)),)
            num_logits = sum(want is Want.LOGITS for want in header.wants)
            if num_logits:
                # The vocabulary's size is the stage's word, as the greedy token is.
                vocab = specs[1].shape[-1] if len(specs) == 2 and specs[1].shape else 0
                expected = (*expected, TensorSpec(DType.F32, (num_logits, min(vocab, MAX_VOCAB))))
        if specs != expected or len(header.timings) != len(self._manifest.stages):
            raise MessageError(f"step {header.step} returned {specs}, expected {expected}")


async def _watch(stage: _Stage, hang_seconds: float) -> NoReturn:
    """Raise when a stage ends, complains or hangs."""
    async with open_tasks() as tasks:
        alive = trio.Event()

        async def ask() -> None:
            nonlocal alive
            sequence = 0
            while True:
                await trio.sleep(min(HEALTH_SECONDS, hang_seconds / 2))
                alive = trio.Event()
                try:
                    await stage.control.send(Health(sequence=sequence))
                    with trio.fail_after(hang_seconds):
                        await alive.wait()
                except TransportError as error:
                    raise StageLost(stage.idx, describe(error)) from error
                except trio.TooSlowError:
                    reason = f"it has not answered for {hang_seconds:g} s"
                    raise StageHung(stage.idx, reason) from None
                sequence += 1

        tasks.start_soon(ask)
        while True:
            message = await _receive(stage)
            if not isinstance(message, Healthy):
                await _unexpected(stage, message)
            alive.set()


async def _receive(stage: _Stage) -> Message:
    try:
        return await stage.control.receive()
    except (TransportError, trio.EndOfChannel) as error:
        raise StageLost(stage.idx, describe(error)) from error


async def _unexpected(stage: _Stage, message: Message) -> NoReturn:
    if not isinstance(message, Failure):
        raise SessionError(f"stage {stage.idx} sent {message.type!r} out of turn")
    if message.code == "upstream" and stage.idx > 0:
        await _blame(stage.idx - 1, f"stage {stage.idx} reports: {message.detail}")
    if message.code == "downstream" and stage.is_last:
        raise SessionError(f"stage {stage.idx} cannot deliver its results: {message.detail}")
    if message.code == "downstream":
        await _blame(stage.idx + 1, f"stage {stage.idx} reports: {message.detail}")
    raise SessionError(f"stage {stage.idx} refused the session: {message.detail}")


async def _blame(stage_idx: int, reason: str, cause: BaseException | None = None) -> NoReturn:
    """Name the stage at the far end of a broken link, unless a death explains it first."""
    await trio.sleep(BLAME_SECONDS)
    raise StageLost(stage_idx, reason) from cause


def _stage_role(stage_idx: int) -> Role:
    return Role(RoleKind.STAGE, stage_idx)
