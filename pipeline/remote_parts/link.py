"""The asking side: one question and its answer at a time, or two of lanes that take turns."""

from collections.abc import Callable
from threading import Condition

from pipeline.errors import PartLost, PartRefused
from pipeline.remote_parts.lanes import Lanes
from pipeline.remote_parts.wire import Message, PartRefusal, read_answer_untrusted
from transport.blocking_channel import BlockingChannel
from transport.errors import TransportError
from transport.tensor_frames import Frame, FrameKind, Tensor


class PartLink:
    """Questions to one worker, which answers them in the order in which they come.

    So whoever has asked waits until it is his turn, and reads the answer himself.
    """

    def __init__(self, channel: BlockingChannel, name: str, lanes: Lanes) -> None:
        """`name`: the worker's, for errors."""
        self._channel = channel
        self._name = name
        self._lanes = lanes
        self._turns = Condition()
        self._num_asked = 0
        self._num_answered = 0
        self._failure: str | None = None

    @property
    def num_asked(self) -> int:
        """Questions so far: round trips."""
        return self._num_asked

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far, as they are on the wire."""
        return self._channel.bytes_sent, self._channel.bytes_received

    def ask(
        self,
        header: bytes,
        tensors: tuple[Tensor, ...] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> Message:
        """Ask, and wait for the answer, which is the caller's own; `meanwhile` is called meanwhile.

        Raises PartLost where there is none, PartRefused for one that says no.
        """
        turn, self._num_asked = self._num_asked, self._num_asked + 1
        try:
            self._channel.send(Frame(FrameKind.DATA, header, tensors))
            if meanwhile is not None:
                meanwhile()
            with self._lanes.away():
                frame = self._receive(turn)
        except TransportError as error:
            raise self._lost(str(error)) from error
        try:
            return read_answer_untrusted(frame)
        except PartRefusal as error:
            self._channel.interrupt()
            raise PartRefused(f"{self._name} refuses: {error}") from error

    def close(self) -> None:
        """Tell the worker that this is all."""
        self._channel.close()

    def _receive(self, turn: int) -> Frame:
        with self._turns:
            self._turns.wait_for(lambda: self._num_answered == turn or self._failure is not None)
            if self._failure is not None:
                raise self._lost(self._failure)
        try:
            frame = self._channel.receive()
            # Another lane's answer will be where this one is.
            tensors = tuple(
                Tensor(each.spec, memoryview(bytearray(each.data))) for each in frame.tensors
            )
        except BaseException as error:
            with self._turns:
                self._failure = str(error)
                self._turns.notify_all()
            raise
        with self._turns:
            self._num_answered += 1
            self._turns.notify_all()
        return Frame(frame.kind, frame.header, tensors)

    def _lost(self, reason: str) -> PartLost:
        return PartLost(f"{self._name} is lost: {reason}")
