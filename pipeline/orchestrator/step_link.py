"""The data channels of one epoch: steps go in, their results come out in order."""

import trio

from pipeline.engine.step import FollowUp, Step
from pipeline.errors import LinkLost, MessageError
from pipeline.orchestrator.step_ahead import Ahead
from pipeline.protocol.links import StepGate, receive_step, send_step
from pipeline.protocol.peer_connections import describe, hang_up
from pipeline.protocol.result_kinds import NO_TOKEN
from pipeline.protocol.step_header import StepKind
from pipeline.protocol.step_limits import step_tensors
from pipeline.protocol.step_results import StepResult, step_result
from transport.channel import SecureChannel
from transport.errors import TransportError


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
    ) -> None:
        """`gate` guards `data_out`; results are held against `vocab_size`.

        `patience_ms`: how long to wait for a result in place (`SecureChannel.wait_in_place`).
        """
        self._patience_ms = patience_ms
        # Steps under way that will have a result.
        self.num_due = 0
        self._data_in = data_in
        self._data_out = data_out
        self._gate = gate
        self._ahead = Ahead(num_stages)
        self._last = num_stages - 1
        self._vocab_size = vocab_size

    async def send(self, step: Step) -> None:
        """Send a step to the first stage. Raises LinkLost."""
        self.num_due += step.header.kind is not StepKind.REPLAY
        if self._ahead.has_sent(step.header):
            return
        tensors = step_tensors(step.header, step.token_ids, step.asked)
        try:
            await send_step(self._data_in, step.header, tensors)
        except (TransportError, trio.ClosedResourceError) as error:
            raise LinkLost(0, f"its data channel broke: {describe(error)}") from error

    def prepare(self, follow_up: FollowUp | None) -> None:
        """What to send the moment the next result comes, before that is even looked at whole."""
        self._ahead.prepare(follow_up)

    async def receive(self) -> StepResult:
        """The oldest outstanding step's result, the stages' timings in its header.

        Raises LinkLost, or MessageError for a result that cannot be.
        """
        try:
            if self._ahead.is_prepared:
                await self._send_ahead()
            header, tensors = await receive_step(self._data_out, self._gate)
        except (TransportError, trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise LinkLost(self._last, f"its data channel broke: {describe(error)}") from error
        result = step_result(header, tensors)
        for token_id in result.all_ids():
            if token_id >= self._vocab_size and token_id != NO_TOKEN:
                raise MessageError(
                    f"stage {self._last} returned a token outside the vocabulary of "
                    f"{self._vocab_size}"
                )
        self.num_due -= 1
        return result

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
