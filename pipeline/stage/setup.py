"""What a stage worker is, and which sessions and steps it therefore takes."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.registry import make_codec
from pipeline.dtypes import Precision
from pipeline.errors import MessageError, SessionRefused
from pipeline.models.registry import ModelShard
from pipeline.protocol.messages import Init, Message
from pipeline.protocol.step_header import PROTOCOL_VERSION, StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, expected_inputs
from pipeline.stage.activation_log import ActivationLog, log_bytes
from pipeline.stage.dial_policy import DialPolicy, Network, Target
from pipeline.stage.step_executor import StageCore
from transport.endpoint import Endpoint
from transport.handshake import Role, RoleKind
from transport.tensor_frames import TensorSpec

# Bounds how long one step keeps a stage from listening, and how much memory its activations take.
MAX_STEP_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class StageSetup:
    """All that a worker is, whoever connects. `data_out` overrides the orchestrator's word.

    A stage imports no mode: what one replaces, whoever starts the worker hands in here, and with
    the shard the parts of its layers (`pipeline.models.layer_parts`).
    """

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
    # How long to wait for a step in place (`SecureChannel.wait_in_place`); 0 where other tasks of
    # this process have better things to do.
    patience_ms: int = 0
    # The codec of a manifest's name for it, for rows of a width.
    make_codec: Callable[[str, int], ActivationCodec] = make_codec
    # What may be dialed beside what the manifest names.
    allow_dial: tuple[Network, ...] = ()

    @property
    def role(self) -> Role:
        """This stage's role on every link."""
        return Role(RoleKind.STAGE, self.stage_idx)

    @property
    def dial_policy(self) -> DialPolicy:
        """What an orchestrator may have this stage dial."""
        return DialPolicy(self.manifest.stage(self.stage_idx), self.allow_dial)

    def target(self, data_out: str) -> Target:
        """Where results go, if the orchestrator says `data_out`. Raises SessionRefused."""
        if self.data_out is not None:
            return Target(self.data_out, None)
        return self.dial_policy.target(data_out)


def expect_step(
    header: StepHeader,
    specs: tuple[TensorSpec, ...],
    *,
    limits: SessionLimits,
    stage_idx: int,
    num_stages: int,
) -> None:
    """Hold a step's declared tensors against those this stage takes. Raises MessageError."""
    expected = expected_inputs(header, limits, is_first=stage_idx == 0, declared=specs)
    if specs != expected:
        raise MessageError(f"step {header.step} carries {specs}, expected {expected}")
    if header.kind is StepKind.REPLAY and not stage_idx <= header.until < num_stages:
        raise MessageError(
            f"step {header.step} is replayed until stage {header.until}, this is {stage_idx} "
            f"of {num_stages}"
        )


def check_init(message: Message, setup: StageSetup) -> tuple[Init, SessionLimits]:
    """Hold the first control message against the manifest.

    Raises MessageError for another message, SessionRefused for a session that is not to be had.
    """
    if not isinstance(message, Init):
        raise MessageError(f"the first control message is {message.type!r}, expected 'init'")
    if message.version != PROTOCOL_VERSION:
        raise SessionRefused(f"control protocol version {message.version}, not {PROTOCOL_VERSION}")
    spec = setup.manifest.activation_spec
    expected = (setup.stage_idx, spec.dtype, spec.hidden_dim)
    found = (message.stage_idx, message.activation_dtype, message.hidden_dim)
    if found != expected or message.max_seq_len > spec.max_seq_len:
        raise SessionRefused(
            f"init is for {found} with {message.max_seq_len} positions, this stage is "
            f"{expected} with at most {spec.max_seq_len}"
        )
    if message.max_step_tokens > MAX_STEP_TOKENS:
        raise SessionRefused(
            f"init wants steps of {message.max_step_tokens} tokens, the most is {MAX_STEP_TOKENS}"
        )
    setup.target(message.data_out)
    kv_bytes = setup.shard.kv_bytes(message.num_slots, message.max_seq_len)
    if kv_bytes > setup.max_kv_bytes:
        raise SessionRefused(
            f"{message.num_slots} slots of {message.max_seq_len} positions take {kv_bytes} bytes "
            f"of KV memory, this stage gives {setup.max_kv_bytes}; ask for less with --context or "
            "--max-batch"
        )
    try:
        codec = setup.make_codec(spec.dtype, spec.hidden_dim)
    except ValueError as error:
        raise MessageError(str(error)) from error
    return message, SessionLimits(
        num_slots=message.num_slots,
        max_seq_len=message.max_seq_len,
        max_step_tokens=message.max_step_tokens,
        codec=codec,
        has_client_ends=setup.manifest.has_client_ends,
    )


def new_core(setup: StageSetup, limits: SessionLimits) -> StageCore:
    """KV memory for a session, and a log of what it sends on where that fits as well."""
    shard = setup.shard
    slots, length, width = limits.num_slots, limits.max_seq_len, limits.codec.hidden_dim
    num_bytes = shard.kv_bytes(slots, length) + log_bytes(slots, length, width)
    log = None
    is_last = setup.stage_idx == len(setup.manifest.stages) - 1
    if not is_last and num_bytes <= setup.max_kv_bytes:
        log = ActivationLog(slots, length, width)
    return StageCore(shard, limits, log)
