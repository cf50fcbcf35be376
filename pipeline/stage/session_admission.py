"""Which sessions a stage takes, how much KV memory it gives one, and which steps it takes in it."""

from dataclasses import replace

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError, MessageError, SessionRefused
from pipeline.models.registry import ModelShard
from pipeline.protocol.messages import Init, Message
from pipeline.protocol.step_header import PROTOCOL_VERSION, StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, expected_inputs, told
from pipeline.protocol.tide_window import MAX_TEXT, TideWindow
from pipeline.stage.worker_setup import StageSetup
from transport.dial_and_listen import TcpEndpoint, VsockEndpoint
from transport.tensor_frames import TensorSpec

# Bounds how long one step keeps a stage from listening, and how much memory its activations take.
MAX_STEP_TOKENS = 4096


def free_kv_bytes(shard: ModelShard) -> int:
    """What is left for a session's KV memory: weights are loaded, steps are yet to come."""
    return max(0, shard.kernels.free_bytes() - shard.step_bytes(MAX_STEP_TOKENS))


def with_memory(setup: StageSetup) -> StageSetup:
    """A stage that knows what a session may take: its own word, the manifest's, or a share.

    If neither says it, that is this stage's of what is free.

    Not before a session begins: then all stages are loaded that are loaded on this machine.
    """
    if setup.max_kv_bytes is not None:
        return setup
    if (planned := setup.manifest.stage(setup.stage_idx).kv_bytes) is not None:
        return replace(setup, max_kv_bytes=planned)
    free = free_kv_bytes(setup.shard)
    if setup.session_memory is not None:  # which is this stage's already
        free += setup.session_memory.num_bytes
    if setup.shard.kernels.is_host:
        num_here = num_on_this_machine(setup.manifest, setup.stage_idx)
        free //= num_here * setup.num_pipelines
    return replace(setup, max_kv_bytes=free)


def num_on_this_machine(manifest: Manifest, stage_idx: int) -> int:
    """Of how many stages the manifest says that they share this one's machine, itself counted.

    Those at the same address, for nobody knows more: relays make it seem more than there are.
    """
    hosts = [_host(manifest, stage.stage_idx) for stage in manifest.stages]
    return hosts.count(hosts[stage_idx])


def _host(manifest: Manifest, stage_idx: int) -> object:
    stage = manifest.stage(stage_idx)
    if stage.machine_keys:
        return stage.machine_keys
    if stage.endpoint is None:
        return None
    match stage.endpoint.control.to_endpoint():
        case TcpEndpoint(host=host):
            return host
        case VsockEndpoint(cid=cid):
            return cid
        case _:  # a path: a file of this machine's
            return None


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
        raise MessageError(f"step {header.step} carries {told(specs)}, expected {told(expected)}")
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
    if len(message.lengths or ()) != (0 if message.kept is None else message.num_slots):
        raise MessageError("init names what slots are to go on from, and not how far")
    spec = setup.manifest.activation_spec
    expected = _shape(setup.stage_idx, spec.dtype, spec.hidden_dim)
    found = _shape(message.stage_idx, message.activation_dtype, message.hidden_dim)
    window = _check_window(message, setup)
    longest = spec.max_seq_len if window is None else MAX_TEXT
    if found != expected or message.max_seq_len > longest:
        raise SessionRefused(
            f"init is for {found} and {message.max_seq_len} positions, this is {expected} "
            f"and at most {longest} positions"
        )
    if message.max_step_tokens > MAX_STEP_TOKENS:
        raise SessionRefused(
            f"init wants steps of {message.max_step_tokens} tokens, the most is {MAX_STEP_TOKENS}"
        )
    setup.target(message.data_out)
    num_rows = message.max_seq_len if window is None else window.size
    # A GPU's memory is taken whole; a host's as slots fill, and one position at least.
    shared = setup.shard.kernels.is_host
    kv_bytes = setup.shard.kv_bytes(*(1, 1) if shared else (message.num_slots, num_rows))
    if setup.max_kv_bytes is not None and kv_bytes > setup.max_kv_bytes:
        raise SessionRefused(
            f"{message.num_slots} slots of {num_rows} positions take {kv_bytes} bytes "
            f"of KV memory at least, this stage gives {setup.max_kv_bytes}; ask for less with "
            "--context or --max-batch"
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
        window=window,
    )


def _shape(stage_idx: int, dtype: str, hidden_dim: int) -> str:
    return f"stage {stage_idx} with rows of {hidden_dim} in {dtype}"


def _check_window(message: Init, setup: StageSetup) -> TideWindow | None:
    """The window a session is asked for. Raises SessionRefused where that cannot be had."""
    if not message.window:
        return None
    try:
        window = TideWindow(message.window, message.num_sinks)
        setup.shard.check_window(window)
    except InputError as error:
        raise SessionRefused(str(error)) from error
    longest = setup.manifest.activation_spec.max_seq_len
    if window.size > longest:
        raise SessionRefused(f"a window of {window.size} positions, the most is {longest}")
    return window
