"""One orchestrator's session on a stage: its data channels, its KV state, its requests."""

import logging
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns

import trio

from pipeline.errors import MessageError
from pipeline.links import (
    SEND_ONLY_LIMITS,
    ControlLink,
    StepGate,
    receive_step,
    send_step,
)
from pipeline.manifest import Manifest, Precision
from pipeline.messages import (
    PROTOCOL_VERSION,
    Abort,
    Done,
    Failure,
    Health,
    Init,
    Message,
    Ready,
    Shutdown,
    Start,
    StepHeader,
    Waiting,
)
from pipeline.meter import StageMeter
from pipeline.models.registry import ModelShard
from pipeline.peers import (
    GOODBYE_SECONDS,
    ORCHESTRATOR,
    accept_first,
    close_quietly,
    connect_retrying,
    describe,
    say,
)
from pipeline.stage import StageCore
from pipeline.steps import ACTIVATION_DTYPES, SessionLimits, expected_inputs
from pipeline.tasks import open_tasks
from pipeline.trust import Trust
from transport.channel import SecureChannel
from transport.endpoint import Endpoint, Listener, parse_endpoint
from transport.errors import TransportError
from transport.frames import TensorSpec
from transport.handshake import Link, LinkKind, Role, RoleKind

logger = logging.getLogger(__name__)

# Bounds how long one step keeps a stage from listening, and how much memory its activations take.
MAX_STEP_TOKENS = 4096
# Between reports of what a stage waits for.
WAITING_SECONDS = 1.0
# An orchestrator sends `health` every few seconds; one silent for this long is gone.
SILENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class StageSetup:
    """All that a worker is, whoever connects. `data_out` overrides the orchestrator's word."""

    manifest: Manifest
    stage_idx: int
    shard: ModelShard
    trust: Trust
    precision: Precision
    num_threads: int
    device: str
    # The most a session may take of this machine, whatever its orchestrator asks for.
    max_kv_bytes: int
    data_out: Endpoint | None = None

    @property
    def role(self) -> Role:
        """This stage's role on every link."""
        return Role(RoleKind.STAGE, self.stage_idx)


class SessionEnded(Exception):
    """The orchestrator ended the session, or is gone; `reason` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def expect_step(
    header: StepHeader, specs: tuple[TensorSpec, ...], *, limits: SessionLimits, is_first: bool
) -> None:
    """Hold a step's declared tensors against those this stage takes. Raises MessageError."""
    expected = expected_inputs(header, limits, is_first=is_first)
    if specs != expected:
        raise MessageError(f"step {header.step} carries {specs}, expected {expected}")


def check_init(message: Message, setup: StageSetup) -> tuple[Init, SessionLimits]:
    """Hold the first control message against the manifest. Raises MessageError."""
    if not isinstance(message, Init):
        raise MessageError(f"the first control message is {message.type!r}, expected 'init'")
    if message.version != PROTOCOL_VERSION:
        raise MessageError(f"control protocol version {message.version}, not {PROTOCOL_VERSION}")
    spec = setup.manifest.activation_spec
    expected = (setup.stage_idx, spec.dtype, spec.hidden_dim)
    found = (message.stage_idx, message.activation_dtype, message.hidden_dim)
    if found != expected or message.max_seq_len > spec.max_seq_len:
        raise MessageError(
            f"init is for {found} with {message.max_seq_len} positions, this stage is "
            f"{expected} with at most {spec.max_seq_len}"
        )
    if message.max_step_tokens > MAX_STEP_TOKENS:
        raise MessageError(
            f"init wants steps of {message.max_step_tokens} tokens, the most is {MAX_STEP_TOKENS}"
        )
    kv_bytes = setup.shard.kv_bytes(message.num_slots, message.max_seq_len)
    if kv_bytes > setup.max_kv_bytes:
        raise MessageError(
            f"{message.num_slots} slots of {message.max_seq_len} positions take {kv_bytes} bytes "
            f"of KV memory, this stage gives {setup.max_kv_bytes}; ask for fewer or shorter ones"
        )
    return message, SessionLimits(
        num_slots=message.num_slots,
        max_seq_len=message.max_seq_len,
        max_step_tokens=message.max_step_tokens,
        hidden_dim=message.hidden_dim,
        activation_dtype=ACTIVATION_DTYPES[message.activation_dtype],
    )


class StageSession:
    """From `init` to the end of the orchestrator's control channel."""

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
        self._core = StageCore(setup.shard, limits)
        # Not a method of this object: a reference back to it would keep the KV memory of an ended
        # session alive until the garbage collector comes by.
        self._gate = StepGate(
            limits, partial(expect_step, limits=limits, is_first=setup.shard.is_first)
        )
        self._requests: set[int] = set()
        self._waiting_for: str | None = None

    async def run(self, data_in: Listener) -> None:
        """Connect both neighbours, then serve steps. Ends by raising the reason of the end."""
        channels: list[SecureChannel] = []
        try:
            async with open_tasks() as tasks:
                tasks.start_soon(self._serve_control)
                upstream, downstream = await self._connect(data_in, channels)
                await self._control.send(self._ready())
                logger.info("event=ready stage=%d", self._setup.stage_idx)
                await self._serve_steps(upstream, downstream)
        finally:
            # Whoever holds this memory next must not find the last user's keys and values.
            self._core.cache.release()
            for channel in channels:
                self._meter.close(channel)
                await close_quietly(channel)

    async def _connect(
        self, data_in: Listener, channels: list[SecureChannel]
    ) -> tuple[SecureChannel, SecureChannel]:
        upstream: SecureChannel | None = None
        downstream: SecureChannel | None = None

        async def accept() -> None:
            nonlocal upstream
            upstream = await self._accept_upstream(data_in)
            channels.append(upstream)
            self._meter.open(upstream)

        async with open_tasks() as reporting:
            reporting.start_soon(self._report_waiting)
            async with open_tasks() as tasks:
                tasks.start_soon(accept)
                downstream = await self._dial_downstream()
                channels.append(downstream)
                self._meter.open(downstream)
            reporting.cancel_scope.cancel()
        assert upstream is not None  # the task group has ended without an error
        return upstream, downstream

    async def _accept_upstream(self, data_in: Listener) -> SecureChannel:
        stage_idx = self._setup.stage_idx
        peer = Role(RoleKind.STAGE, stage_idx - 1) if stage_idx else ORCHESTRATOR
        return await accept_first(
            data_in,
            self._data_link(initiator=peer, responder=self._setup.role),
            self._setup.trust,
            self._init.upstream_measurements,
            self._gate.frame_limits(self._limits.max_tensor_bytes),
        )

    async def _dial_downstream(self) -> SecureChannel:
        stage_idx = self._setup.stage_idx
        is_last = stage_idx == len(self._setup.manifest.stages) - 1
        peer = ORCHESTRATOR if is_last else Role(RoleKind.STAGE, stage_idx + 1)
        link = self._data_link(initiator=self._setup.role, responder=peer)
        credentials = self._setup.trust.toward(peer, self._init.downstream_measurements)
        try:
            endpoint = self._setup.data_out or parse_endpoint(self._init.data_out)
            # Retries end with the session: the orchestrator is the one who loses patience.
            return await connect_retrying(
                endpoint, link, credentials, SEND_ONLY_LIMITS, self._note_waiting
            )
        except (TransportError, trio.TooSlowError, trio.EndOfChannel) as error:
            await say(self._control, Failure(code="downstream", detail=describe(error)))
            raise

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

    def _data_link(self, *, initiator: Role, responder: Role) -> Link:
        return Link(LinkKind.DATA, initiator, responder, self._init.manifest_hash, self._init.epoch)

    def _ready(self) -> Ready:
        setup = self._setup
        return Ready(
            stage_idx=setup.stage_idx,
            weight_bytes=setup.shard.num_weight_bytes,
            kv_bytes=self._core.cache.num_bytes,
            vocab_size=setup.shard.config.vocab_size,
            precision=setup.precision,
            kernels=setup.shard.kernels.name,
            num_threads=setup.num_threads,
            device=setup.device,
        )

    async def _serve_control(self) -> None:
        while True:
            try:
                # The answer is inside: a peer that asks and never reads is silent as well.
                with trio.fail_after(SILENCE_SECONDS):
                    self._take(message := await self._control.receive())
                    if isinstance(message, Health):
                        cache, num_requests = self._core.cache, len(self._requests)
                        await self._control.send(self._meter.answer(message, cache, num_requests))
            except trio.TooSlowError:
                raise SessionEnded(f"orchestrator silent for {SILENCE_SECONDS:.0f} s") from None
            except (trio.EndOfChannel, TransportError) as error:
                raise SessionEnded(f"orchestrator is gone ({describe(error)})") from error

    def _take(self, message: Message) -> None:
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
            case Shutdown():
                raise SessionEnded("shutdown")
            case _:
                raise MessageError(f"control message {message.type!r} is not for a stage")

    async def _serve_steps(self, upstream: SecureChannel, downstream: SecureChannel) -> None:
        side = "upstream"
        try:
            while True:
                side = "upstream"
                header, tensors = await receive_step(upstream, self._gate)
                started = perf_counter_ns()
                outputs = self._core.step(header, tensors)
                timing = self._meter.step(header, perf_counter_ns() - started)
                side = "downstream"
                await send_step(downstream, header.with_timing(timing), outputs)
        except (TransportError, trio.EndOfChannel) as error:
            if isinstance(error, trio.EndOfChannel):
                # The stage before ends its part of a session a moment before this one hears of it.
                await trio.sleep(GOODBYE_SECONDS)
            failure = Failure.model_validate({"code": side, "detail": describe(error)})
            await say(self._control, failure)
            raise
