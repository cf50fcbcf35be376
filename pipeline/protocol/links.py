"""Control and data links: typed messages over secure channels."""

from collections.abc import Callable

import trio

from pipeline.errors import MessageError
from pipeline.protocol.messages import MAX_CONTROL_BYTES, Message, decode_message, encode_message
from pipeline.protocol.step_header import StepHeader, decode_step, encode_step
from pipeline.protocol.step_limits import SessionLimits, check_header
from pipeline.protocol.step_results import MAX_RESULT_TENSORS
from transport.channel import SecureChannel
from transport.errors import FrameError
from transport.tensor_frames import Frame, FrameForm, FrameKind, FrameLimits, Tensor, TensorSpec

CONTROL_LIMITS = FrameLimits(
    max_header_bytes=MAX_CONTROL_BYTES, max_tensors=0, max_tensor_bytes=0, check=None
)
# Room for MAX_SEGMENTS segments and MAX_STAGES timings.
MAX_STEP_HEADER_BYTES = 32 << 10

Expect = Callable[[StepHeader, tuple[TensorSpec, ...]], None]


class ControlLink:
    """Control messages over a channel; any number of tasks may send."""

    def __init__(self, channel: SecureChannel) -> None:
        self.channel = channel
        # When the peer last said something, by trio's clock.
        self.heard_at = trio.current_time()
        self._send_lock = trio.Lock()

    async def send(self, message: Message) -> None:
        """Send one message."""
        async with self._send_lock:
            await self.channel.send(Frame(FrameKind.CONTROL, encode_message(message)))

    async def receive(self) -> Message:
        """Receive one message. Raises MessageError when an authentic peer sends nonsense."""
        frame = await self.channel.receive()
        self.heard_at = trio.current_time()
        if frame.kind is not FrameKind.CONTROL:
            raise MessageError("a data frame arrived on a control channel")
        return decode_message(frame.header)

    async def aclose(self) -> None:
        """Close with notice, without waiting for whoever is still sending."""
        await self.channel.aclose()


class StepGate:
    """Holds every declared step against what is expected, before any of its tensor is stored."""

    def __init__(self, limits: SessionLimits, expect: Expect) -> None:
        self._limits = limits
        self._expect = expect
        self._header: StepHeader | None = None

    def check(self, data: bytes, specs: tuple[TensorSpec, ...]) -> None:
        """Raise FrameError for a step this end would not take."""
        try:
            header = decode_step(data)
            check_header(header, self._limits)
            self._expect(header, specs)
        except MessageError as error:
            raise FrameError(str(error)) from error
        self._header = header

    def take(self) -> StepHeader:
        """The header checked last: a frame is only delivered after that. Raises MessageError."""
        header, self._header = self._header, None
        if header is None:
            raise MessageError("a control frame arrived on a data channel")
        return header

    def frame_limits(self, max_tensor_bytes: int) -> FrameLimits:
        """Limits for the channel that this gate guards."""
        return FrameLimits(
            max_header_bytes=MAX_STEP_HEADER_BYTES,
            max_tensors=MAX_RESULT_TENSORS,
            max_tensor_bytes=max_tensor_bytes,
            check=self.check,
        )


# For the end of a data channel that only sends.
SEND_ONLY_LIMITS = FrameLimits(max_header_bytes=0, max_tensors=0, max_tensor_bytes=0, check=None)


async def send_step(
    channel: SecureChannel, header: StepHeader, tensors: tuple[Tensor, ...]
) -> None:
    """Send one step on a data channel."""
    await channel.send(Frame(FrameKind.DATA, encode_step(header), tensors))


def step_form(header: StepHeader, specs: tuple[TensorSpec, ...]) -> FrameForm:
    """A step's frame, laid out to be filled in. Raises MisuseError where it is too large."""
    tensors = tuple([Tensor(spec, memoryview(bytes(spec.nbytes))) for spec in specs])
    return FrameForm(Frame(FrameKind.DATA, encode_step(header), tensors))


async def receive_step(
    channel: SecureChannel, gate: StepGate
) -> tuple[StepHeader, tuple[Tensor, ...]]:
    """Receive one step; its tensors are valid until the next call on the same channel."""
    frame = await channel.receive()
    return gate.take(), frame.tensors
