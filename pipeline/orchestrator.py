"""The orchestrator: a trio shell on the user's side that connects the stages and drives steps."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from pipeline.engine.scheduler import Limits, Step
from pipeline.errors import InputError, MessageError, SessionError, StageLost
from pipeline.links import (
    CONTROL_LIMITS,
    SEND_ONLY_LIMITS,
    ControlLink,
    StepGate,
    receive_step,
    send_step,
)
from pipeline.manifest import Manifest
from pipeline.messages import Init, Message, Ready, Shutdown, StepHeader, StepKind, Want
from pipeline.peers import (
    CONTROL_EPOCH,
    ORCHESTRATOR,
    accept_first,
    close_quietly,
    connect_retrying,
    describe,
)
from pipeline.remote_stage import Expectation, RemoteStage, blame
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
from transport.channel import SecureChannel
from transport.endpoint import Endpoint, Listener, listen
from transport.errors import EndpointError, TransportError
from transport.frames import DType, TensorSpec
from transport.handshake import Link, LinkKind, Role, RoleKind

logger = logging.getLogger(__name__)

# A stage computes a chunk without looking up; one that answers nothing for this long is hung.
HANG_SECONDS = 60.0
# Time for the last message of a session.
GOODBYE_SECONDS = 1.0
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


class Pipeline:
    """Connected stages: steps go in, their results come out in order."""

    def __init__(
        self,
        stages: Sequence[RemoteStage],
        ready: Sequence[Ready],
        data_in: SecureChannel,
        data_out: SecureChannel,
        gate: StepGate,
    ) -> None:
        self.ready = tuple(ready)
        self.vocab_size = min(each.vocab_size for each in ready)
        self._stages = stages
        self._data_in = data_in
        self._data_out = data_out
        self._gate = gate

    @property
    def stages(self) -> Sequence[RemoteStage]:
        """The stages, for whoever watches."""
        return self._stages

    async def send(self, step: Step) -> None:
        """Send a step to the first stage."""
        is_clear = step.header.kind is StepKind.CLEAR
        tensor = CLEAR_SENTINEL if is_clear else token_ids_to_wire(step.token_ids)
        try:
            await send_step(self._data_in, step.header, (tensor,))
        except (TransportError, trio.ClosedResourceError) as error:
            await blame(0, f"its data channel broke: {describe(error)}", error)

    async def receive(self) -> StepResult:
        """The oldest outstanding step's result, the stages' timings in its header."""
        last = self._stages[-1].idx
        try:
            header, tensors = await receive_step(self._data_out, self._gate)
        except (TransportError, trio.EndOfChannel) as error:
            await blame(last, f"its data channel broke: {describe(error)}", error)
        result = step_result(header, tensors)
        if result.token_ids and max(result.token_ids) >= self.vocab_size:
            raise MessageError(
                f"stage {last} returned a token outside the vocabulary of {self.vocab_size}"
            )
        return result

    async def notify(self, message: Message) -> None:
        """Tell every stage about a request's life."""
        for stage in self._stages:
            await stage.send(message)


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
                pipeline = await connector.connect(tasks)
            if deadline.cancelled_caught:
                raise SessionError(
                    f"gave up after {options.connect_seconds:g} s: {connector.waiting_for}"
                )
            yield pipeline
            tasks.cancel_scope.cancel()
        await connector.say_goodbye()
    finally:
        await connector.aclose()


class _Connector:
    """Builds the pipeline's channels; owns and closes whatever has been opened."""

    def __init__(
        self, manifest: Manifest, trust: Trust, options: PipelineOptions, progress: Progress
    ) -> None:
        self._stages: list[RemoteStage] = []
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

    async def say_goodbye(self) -> None:
        """End the session, last stage first: each still hears of it before its neighbour leaves."""
        with trio.move_on_after(GOODBYE_SECONDS, shield=True):
            for stage in reversed(self._stages):
                try:
                    await stage.send(Shutdown())
                except StageLost as error:
                    logger.debug("event=goodbye_failed stage=%d error=%s", stage.idx, error)

    async def connect(self, tasks: trio.Nursery) -> Pipeline:
        """Control channels first, then data channels; stages are watched by `tasks` throughout."""
        last = self._manifest.stages[-1].stage_idx
        listen_at = self._options.data_out_listen or (
            self._manifest.endpoint(last).data_out.to_endpoint()
        )
        try:
            listener = listen(listen_at)
        except EndpointError as error:
            raise InputError(f"cannot listen for the last stage's results: {error}") from error
        with listener:
            async with open_tasks() as connecting:
                for spec in self._manifest.stages:
                    connecting.start_soon(self._connect_control, spec.stage_idx, tasks)
            self._stages.sort(key=lambda stage: stage.idx)
            for stage in self._stages:
                await stage.send(self._init(stage.idx))
            return await self._connect_data(listener)

    async def _connect_data(self, listener: Listener) -> Pipeline:
        gate = StepGate(self._limits, self._expect)
        links: dict[str, SecureChannel] = {}

        async def accept_results() -> None:
            links["out"] = await self._accept_results(listener, gate)

        async with open_tasks() as tasks:
            tasks.start_soon(accept_results)
            links["in"] = await self._dial_first()
        ready = []
        for stage in self._stages:
            what = f"stage {stage.idx}"
            self._pending.setdefault(what, f"{what} is not ready")
            ready.append(await stage.ready())
            del self._pending[what]
        return Pipeline(self._stages, ready, links["in"], links["out"], gate)

    async def _connect_control(self, stage_idx: int, tasks: trio.Nursery) -> None:
        endpoint = self._manifest.endpoint(stage_idx).control.to_endpoint()
        core_hash = self._manifest.core_hash()
        link = Link(
            LinkKind.CONTROL, ORCHESTRATOR, _stage_role(stage_idx), core_hash, CONTROL_EPOCH
        )
        channel = await self._dial(stage_idx, endpoint, link)

        def on_waiting(text: str) -> None:
            self._pending[f"stage {stage_idx}"] = text

        is_last = stage_idx == len(self._manifest.stages) - 1
        expected = Expectation(self._manifest.stage(stage_idx), is_last)
        stage = RemoteStage(expected, ControlLink(channel), on_waiting)
        self._stages.append(stage)
        tasks.start_soon(stage.watch, self._options.hang_seconds)

    async def _dial_first(self) -> SecureChannel:
        endpoint = self._manifest.endpoint(0).data_in.to_endpoint()
        return await self._dial(0, endpoint, self._data_link(ORCHESTRATOR, _stage_role(0)))

    async def _dial(self, stage_idx: int, endpoint: Endpoint, link: Link) -> SecureChannel:
        what = f"stage {stage_idx}'s {link.kind.name.lower()} channel at {endpoint}"
        self._pending[what] = f"{what} does not answer the handshake"
        is_announced = False

        def on_wait(error: TransportError) -> None:
            nonlocal is_announced
            if not is_announced:
                self._progress(f"waiting for {what}")
            is_announced = True
            self._pending[what] = f"{what} is not up ({error})"

        measurements = self._manifest.stage(stage_idx).measurements()
        credentials = self._trust.toward(link.responder, measurements)
        limits = CONTROL_LIMITS if link.kind is LinkKind.CONTROL else SEND_ONLY_LIMITS
        try:
            channel = await connect_retrying(endpoint, link, credentials, limits, on_wait)
        except (TransportError, trio.EndOfChannel, trio.TooSlowError) as error:
            raise SessionError(f"{what}: {describe(error)}") from error
        del self._pending[what]
        self._channels.append(channel)
        return channel

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


def _stage_role(stage_idx: int) -> Role:
    return Role(RoleKind.STAGE, stage_idx)
