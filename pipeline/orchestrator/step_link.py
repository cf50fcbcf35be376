"""The data channels of one epoch: steps go in, their results come out in order."""

from collections import deque
from dataclasses import dataclass
from time import perf_counter_ns

import trio

from pipeline.engine.home_times import Times
from pipeline.engine.step import FollowUp, Step
from pipeline.errors import LinkLost, MessageError
from pipeline.orchestrator.model_ends import REMOTE_ENDS, ModelEnds
from pipeline.orchestrator.step_ahead import Ahead
from pipeline.protocol.links import StepGate, receive_step, send_step
from pipeline.protocol.peer_connections import close_quietly, describe, hang_up, hear_out
from pipeline.protocol.result_kinds import NO_TOKEN
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_results import StepResult
from transport.channel import SecureChannel
from transport.errors import TransportError


@dataclass(slots=True)
class _Due:
    """A step under way; what it has cost here so far, if ends are held here, and when it left."""

    step: Step
    times: Times | None = None
    left_ns: int = 0


class StepLink:
    """To the first stage and from the last one, for as long as nothing is lost."""

    def __init__(
        self,
        data_in: SecureChannel,
        data_out: SecureChannel,
        gate: StepGate,
        num_stages: int,
        vocab_size: int,
        patience_ms: int = 0,
        ends: ModelEnds = REMOTE_ENDS,
    ) -> None:
        """`gate` guards `data_out`; results are held against `vocab_size`.

        `patience_ms`: how long to wait for a result in place (`SecureChannel.wait_in_place`).
        """
        self._patience_ms = patience_ms
        self._ends = ends
        # Steps under way that will have a result.
        self._due: deque[_Due] = deque()
        self._data_in = data_in
        self._data_out = data_out
        self._gate = gate
        self._ahead = Ahead(num_stages)
        self._last = num_stages - 1
        self._vocab_size = vocab_size

    @property
    def num_due(self) -> int:
        """How many steps are under way that will have a result."""
        return len(self._due)

    async def send(self, step: Step) -> None:
        """Send a step to the first stage. Raises LinkLost."""
        due = _Due(step)
        is_sent = self._ahead.has_sent(step.header)
        # Before the step counts as due: what cannot be embedded has no result.
        header, tensors = (step.header, ()) if is_sent else self._ends.begin(step)
        if step.header.kind is not StepKind.REPLAY:
            self._due.append(due)
        if is_sent:
            return
        times = self._ends.take_times()
        sealed_ns = 0 if times is None else self._data_in.clocks[0].cipher_ns
        due.left_ns = perf_counter_ns()  # the stages may be at it before `send` is done
        try:
            await send_step(self._data_in, header, tensors)
        except (TransportError, trio.ClosedResourceError) as error:
            raise LinkLost(0, f"its data channel broke: {describe(error)}") from error
        if times is not None:
            times["seal"] = self._data_in.clocks[0].cipher_ns - sealed_ns
            due.times = times

    def prepare(self, follow_up: FollowUp | None) -> None:
        """What to send the moment the next result comes, before that is even looked at whole."""
        if self._ends.are_remote:  # else the token has to be found here first
            self._ahead.prepare(follow_up)

    async def receive(self) -> StepResult:
        """The oldest outstanding step's result, the stages' timings in its header.

        Raises LinkLost, or MessageError for a result that cannot be.
        """
        try:
            if self._ahead.is_prepared:
                await self._send_ahead()
            is_timed = not self._ends.are_remote
            opened_ns = self._data_out.clocks[1].cipher_ns if is_timed else 0
            header, tensors = await receive_step(self._data_out, self._gate)
        except (TransportError, trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise LinkLost(self._last, f"its data channel broke: {describe(error)}") from error
        if not self._due:
            raise MessageError(f"stage {self._last} answered step {header.step}, which is not due")
        due = self._due[0]
        if due.times is not None:
            due.times["open"] = open_ns = self._data_out.clocks[1].cipher_ns - opened_ns
            stages_ns = sum(each.compute_ns + each.crypto_ns for each in header.timings)
            way_ns = perf_counter_ns() - due.left_ns - due.times["seal"] - open_ns - stages_ns
            due.times["network"] = max(0, way_ns)
        result = self._ends.end(due.step, header, tensors)
        if due.times is not None:
            result = result._replace(home_times=due.times | (self._ends.take_times() or {}))
        for token_id in result.all_ids():
            if token_id >= self._vocab_size and token_id != NO_TOKEN:
                raise MessageError(
                    f"stage {self._last} returned a token outside the vocabulary of "
                    f"{self._vocab_size}"
                )
        self._due.popleft()
        return result

    async def aclose(self) -> None:
        """Tell the first stage that nothing follows, and hear the last one out."""
        await close_quietly(self._data_in)
        with trio.CancelScope(shield=True):
            await hear_out(self._data_out)
        await close_quietly(self._data_out)

    async def hang_up(self) -> None:
        """Close both channels at once: what was on its way is void."""
        await hang_up(self._data_in)
        await hang_up(self._data_out)

    async def _send_ahead(self) -> None:
        """Wait for the next result, and send the step that has been prepared for it."""
        if not self._patience_ms:
            await self._data_out.wait_readable()
        plain = await self._data_out.peek()
        form = None if plain is None else self._ahead.follow(plain, self._vocab_size)
        if form is not None:
            try:
                await self._data_in.send_form(form)
            except (TransportError, trio.ClosedResourceError) as error:
                raise LinkLost(0, f"its data channel broke: {describe(error)}") from error
