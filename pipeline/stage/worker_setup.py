"""What a stage worker is, and which sessions and steps it therefore takes."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Protocol

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.codecs.base import ActivationCodec
from pipeline.codecs.registry import make_codec
from pipeline.dtypes import Precision
from pipeline.errors import SessionRefused
from pipeline.kernels.kept_weights import native_layout
from pipeline.kernels.session_memory import KeptSlots, SessionMemory
from pipeline.models.registry import ModelShard
from pipeline.protocol.step_limits import SessionLimits
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.dial_policy import DialPolicy, Network, Target
from pipeline.stage.slot_storage import SlotStore
from pipeline.stage.step_executor import StageCore
from transport.dial_and_listen import Endpoint
from transport.frozen import frozen
from transport.handshake import Role, RoleKind


class PartsSession(Protocol):
    """What parts of layers need beside the stage, for as long as a session lasts."""

    def __call__(
        self, limits: SessionLimits, on_waiting: Callable[[str], None], seed: bytes | None
    ) -> AbstractAsyncContextManager[None]:
        """While it is open steps may come; `on_waiting` hears what it waits for.

        seed: of keys that the orchestrator hands over, if it does. Raises SessionError.
        """
        ...


@frozen
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
    # The most a session's slots may take of this machine together; None: what is free then.
    max_kv_bytes: int | None
    data_out: Endpoint | None = None
    # How long to wait for a step in place (`SecureChannel.wait_in_place`); 0 where other tasks of
    # this process have better things to do.
    patience_ms: int = 0
    # The codec of a manifest's name for it, for rows of a width.
    make_codec: Callable[[str, int], ActivationCodec] = make_codec
    # What may be dialed beside what the manifest names.
    allow_dial: tuple[Network, ...] = ()
    # Where sessions that outlive a request are kept, if anywhere.
    store: SlotStore | None = None
    # How long this worker waits for whom.
    times: TimeLimits = DEFAULT_TIMES
    # Where keys and values outlive this worker, if anywhere.
    session_memory: SessionMemory | None = None
    # What the parts of its layers need in a session, if anything.
    parts_session: PartsSession | None = None
    # What steps are computed within that others wait for: `kernels.runtime.all_cpus`, or nothing.
    while_replaying: Callable[[], AbstractContextManager[None]] = nullcontext
    # How many pipelines like this one have their stages on this machine, and share what is free.
    num_pipelines: int = 1

    @property
    def role(self) -> Role:
        """This stage's role on every link."""
        return Role(RoleKind.STAGE, self.stage_idx)

    @property
    def dial_policy(self) -> DialPolicy:
        """What an orchestrator may have this stage dial."""
        return DialPolicy(self.manifest.stage(self.stage_idx), self.allow_dial)

    def target(self, data_out: str | None) -> Target | None:
        """Where results go, if the orchestrator says `data_out`; None: it comes for them.

        Raises SessionRefused.
        """
        if self.data_out is not None:
            return Target(self.data_out, None)
        if data_out is None:
            if self.stage_idx < len(self.manifest.stages) - 1:
                raise SessionRefused(
                    f"stage {self.stage_idx} is told nobody to dial; only the last one is dialed"
                )
            return None
        return self.dial_policy.target(data_out)


def new_core(setup: StageSetup, limits: SessionLimits, name: bytes | None = None) -> StageCore:
    """KV memory for a session, and a log of what it sends on as long as that fits as well.

    `name`: of what another worker's slots held, which are these if they are found. No log under a
    window: what it has dropped is computed again from the first token on, of which a log without
    end would have to be kept. Raises SessionRefused.
    """
    shard = setup.shard
    slots, length, width = limits.num_slots, limits.max_seq_len, limits.codec.hidden_dim
    log = None
    is_last = setup.stage_idx == len(setup.manifest.stages) - 1
    try:
        if not is_last and limits.window is None:
            log = ActivationLog(slots, length, width)
        kept = _kept_slots(setup, limits, name)
        return StageCore(shard, limits, log, setup.max_kv_bytes, setup.while_replaying, kept)
    except MemoryError as error:
        raise SessionRefused(
            f"{slots} slots of {length} positions have no addresses here ({error}); ask for less "
            "with --context or --max-batch"
        ) from error


def _kept_slots(setup: StageSetup, limits: SessionLimits, name: bytes | None) -> KeptSlots | None:
    """Slots that outlive this worker, where all that their rows follow from is pinned.

    Not under a window, which moves rows in place, nor where parts of layers keep more than these.
    """
    if setup.session_memory is None or setup.parts_session is not None or limits.window is not None:
        return None
    layout = native_layout(setup.shard.kernels)
    if layout is None or not setup.manifest.stage(setup.stage_idx).weight_hashes:
        return None
    shard, length = setup.shard, limits.max_seq_len
    meaning = {
        **layout,
        "config": repr(shard.config),
        "core": setup.manifest.core_hash().hex(),
        "stage": setup.stage_idx,
        "precision": setup.precision,
        "max_seq_len": length,
    }
    size = shard.kv_bytes(limits.num_slots, length)
    num_arrays = 2 * (shard.layer_end - shard.layer_start)
    return setup.session_memory.begin(meaning, name, limits.num_slots, size, num_arrays)
