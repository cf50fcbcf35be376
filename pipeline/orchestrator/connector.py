"""The orchestrator's channels to the stages of a manifest: how each is opened, and where."""

import os
from collections.abc import Callable, Sequence

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.errors import MessageError, SessionError, StageAbsent, StageMismatch, StageSilent
from pipeline.placement.base import Placement
from pipeline.protocol.last_stage_inputs import MAX_VOCAB
from pipeline.protocol.links import CONTROL_LIMITS, SEND_ONLY_LIMITS, ControlLink, StepGate
from pipeline.protocol.messages import Init
from pipeline.protocol.peer_connections import (
    CONTROL_EPOCH,
    ORCHESTRATOR,
    accept_first,
    connect_retrying,
    describe,
)
from pipeline.protocol.step_header import StepHeader
from pipeline.protocol.step_limits import SessionLimits, told
from pipeline.protocol.step_results import expected_results, max_result_bytes
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from transport.channel import SecureChannel
from transport.dial_and_listen import Endpoint, Listener
from transport.errors import AttemptsSpent, AttestationError, HandshakeError, TransportError
from transport.handshake import Link, LinkKind, Role, RoleKind
from transport.tensor_frames import FrameLimits, TensorSpec

Progress = Callable[[str], None]


class Connector:
    """Dials stages, and accepts the last one's results; each handshake verifies its peer anew."""

    def __init__(
        self,
        manifest: Manifest,
        trust: Trust,
        limits: SessionLimits,
        placement: Placement,
        progress: Progress,
        times: TimeLimits = DEFAULT_TIMES,
    ) -> None:
        self.num_handshakes = 0
        # Of the model, once its stages have named it: what logits may come back.
        self.vocab_size = 0
        # What each connection under way still lacks, for the user.
        self.pending: dict[str, str] = {}
        # Stages that took no connection when they were last dialed.
        self.absent: set[int] = set()
        # What the user has been told to be awaited, and has not come since.
        self._announced: set[str] = set()
        self._placement = placement
        self._manifest = manifest
        self._trust = trust
        self._limits = limits
        self._progress = progress
        self._times = times

    async def control(self, stage_idx: int) -> ControlLink:
        """A stage's control channel, as soon as the stage is up.

        Raises StageSilent when it takes the connection and says nothing, StageMismatch when it is
        not what it should be, StageAbsent when no attempt is left, SessionError when the connection
        breaks.
        """
        core_hash = self._manifest.core_hash()
        link = Link(
            LinkKind.CONTROL, ORCHESTRATOR, _stage_role(stage_idx), core_hash, CONTROL_EPOCH
        )
        return ControlLink(await self._dial(stage_idx, link, CONTROL_LIMITS))

    async def first(self, epoch: bytes) -> SecureChannel:
        """The data channel to stage 0. Raises StageSilent or SessionError."""
        link = self._data_link(ORCHESTRATOR, _stage_role(0), epoch)
        return await self._dial(0, link, SEND_ONLY_LIMITS)

    async def results(
        self, listener: Listener | None, epoch: bytes, gate: StepGate
    ) -> SecureChannel:
        """The data channel from the last stage, which is dialed where nobody listens for it.

        Raises StageSilent or SessionError.
        """
        last = self._manifest.stages[-1]
        role, core_hash = _stage_role(last.stage_idx), self._manifest.core_hash()
        limits = gate.frame_limits(max_result_bytes(self._limits, MAX_VOCAB))
        if listener is None:
            link = Link(LinkKind.RESULTS, ORCHESTRATOR, role, core_hash, epoch)
            return await self._dial(last.stage_idx, link, limits)
        link = self._data_link(role, ORCHESTRATOR, epoch)
        channel = await accept_first(
            listener, link, self._trust, last.measurements(), limits, self._times
        )
        self.num_handshakes += 1
        return channel

    def new_gate(self) -> StepGate:
        """Holds the last stage's answers against what may come."""
        return StepGate(self._limits, self._expect)

    def init(
        self,
        stage_idx: int,
        epoch: bytes,
        kept: bytes | None = None,
        lengths: Sequence[int] = (),
    ) -> Init:
        """What opens a stage's session, which is to go on from what is `kept` by that name."""
        stages, spec = self._manifest.stages, self._manifest.activation_spec
        is_last = stage_idx == len(stages) - 1
        window = self._limits.window
        return Init(
            epoch=epoch,
            stage_idx=stage_idx,
            activation_dtype=spec.dtype,
            hidden_dim=spec.hidden_dim,
            max_seq_len=self._limits.max_seq_len,
            num_slots=self._limits.num_slots,
            max_step_tokens=self._limits.max_step_tokens,
            window=0 if window is None else window.size,
            num_sinks=0 if window is None else window.num_sinks,
            kept=kept,
            lengths=None if kept is None else list(lengths),
            seed=os.urandom(32) if stage_idx in self._manifest.encoded_stages else None,
            data_out=self.data_out(stage_idx),
            upstream_measurements=stages[stage_idx - 1].measurements() if stage_idx else {},
            downstream_measurements={} if is_last else stages[stage_idx + 1].measurements(),
        )

    def data_out(self, stage_idx: int) -> str | None:
        """Where a stage finds the next one now, or the last one its results' listener.

        None where that is dialed for its results.
        """
        address = self._placement.where(stage_idx).data_out
        return None if address is None else str(address.to_endpoint())

    def _where(self, stage_idx: int, kind: LinkKind) -> Endpoint:
        addresses = self._placement.where(stage_idx)
        address = addresses.control if kind is LinkKind.CONTROL else addresses.data_in
        return address.to_endpoint()

    async def _dial(self, stage_idx: int, link: Link, limits: FrameLimits) -> SecureChannel:
        name = f"stage {stage_idx}'s {link.kind.name.lower()} channel"
        what = ""

        def where() -> Endpoint:
            nonlocal what
            endpoint = self._where(stage_idx, link.kind)
            if what != (now := f"{name} at {endpoint}"):
                what = now
                self.pending[name] = f"{what} does not answer the handshake"
            return endpoint

        def on_wait(error: TransportError) -> None:
            if what not in self._announced:
                self._progress(f"waiting for {what}")
            self._announced.add(what)
            self.absent.add(stage_idx)
            self.pending[name] = f"{what} is not up ({error})"

        measurements = self._manifest.stage(stage_idx).measurements()
        credentials = self._trust.toward(link.responder, measurements)
        try:
            channel = await connect_retrying(
                where, link, credentials, limits, on_wait, times=self._times
            )
        except trio.TooSlowError as error:
            raise StageSilent(stage_idx, f"{what}: {describe(error)}") from error
        except AttestationError as error:
            raise StageMismatch(f"{what}: {describe(error)}", stage_idx) from error
        except HandshakeError as error:
            is_own = bool(self._manifest.stage(stage_idx).machine_keys)
            remedy = "; `pipeline-orch push` has it serve this manifest" if is_own else ""
            raise StageMismatch(f"{what}: {describe(error)}{remedy}", stage_idx) from error
        except AttemptsSpent as error:
            raise StageAbsent(f"{what} is not up: {describe(error)}") from error
        except (TransportError, trio.EndOfChannel) as error:
            raise SessionError(f"{what}: {describe(error)}") from error
        finally:
            self.absent.discard(stage_idx)
        del self.pending[name]
        self._announced.discard(what)
        self.num_handshakes += 1
        return channel

    def _data_link(self, initiator: Role, responder: Role, epoch: bytes) -> Link:
        return Link(LinkKind.DATA, initiator, responder, self._manifest.core_hash(), epoch)

    def _expect(self, header: StepHeader, specs: tuple[TensorSpec, ...]) -> None:
        """What the last stage may return for a step; how many tokens, the scheduler checks."""
        expected = expected_results(header, self.vocab_size, self._limits.codec.hidden_dim)
        if specs != expected or len(header.timings) != len(self._manifest.stages):
            raise MessageError(
                f"step {header.step} returned {told(specs)} of {len(header.timings)} stages, "
                f"expected {told(expected)} of {len(self._manifest.stages)}"
            )


def _stage_role(stage_idx: int) -> Role:
    return Role(RoleKind.STAGE, stage_idx)
