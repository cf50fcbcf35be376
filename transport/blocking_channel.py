"""A channel for threads that wait themselves: what computes between two frames is no task.

A model's layer cannot give way to an event loop in its midst. So the socket of a channel that
has been made as any other is taken over, and read and written in the calling thread: one may send
while another receives.
"""

import select
import socket
from contextlib import suppress
from time import monotonic

from transport.compiled_records import Inlet, Outlet
from transport.errors import ConnectionLost, TransportError
from transport.frame_stream import FrameReceiver, FrameSender
from transport.handshake import Peer, Session
from transport.record_counters import WireTally
from transport.records import OVERHEAD_BYTES
from transport.tensor_frames import INLINE_BYTES, Frame, encode_frame

# For the last record to a peer that may not be reading.
_GOODBYE_SECONDS = 1.0


class _BlockingWire(WireTally):
    """A socket as inlets and outlets see it."""

    __slots__ = ("_sock",)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fd = sock.fileno()
        self.bytes_sent = self.bytes_received = self.send_ns = self.recv_ns = 0

    def has_come(self, patience_ms: int) -> bool:
        """Wait that long at most; whether there is something to receive."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(patience_ms))

    def try_receive(self, into: memoryview) -> int:
        """Receive what has come. Raises: EOFError at the end, OSError."""
        count = self._sock.recv_into(into)
        if count == 0:
            raise EOFError
        self.bytes_received += count
        return count

    def send_all(self, data: memoryview) -> None:
        """Send all of it. Raises: OSError."""
        self._sock.sendall(data)
        self.bytes_sent += len(data)


class BlockingChannel:
    """Frames to and from an authenticated peer; after any failure it is over.

    patience_seconds: how long a peer may take for a byte.
    """

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        sender: FrameSender,
        receiver: FrameReceiver,
        patience_seconds: float,
    ) -> None:
        """Use `SecureChannel.taken_over`."""
        sock.settimeout(patience_seconds)
        self.peer: Peer = session.peer
        self._sock = sock
        self._wire = wire = _BlockingWire(sock)
        self._sender = sender
        self._receiver = receiver
        self._inlet = Inlet(wire, receiver.reader, session.opener, receiver.buffer)
        self._outlet = Outlet(wire, session.sealer, INLINE_BYTES + OVERHEAD_BYTES)
        self._patience_seconds = patience_seconds

    @property
    def bytes_sent(self) -> int:
        """As they are on the wire."""
        return self._wire.bytes_sent

    @property
    def bytes_received(self) -> int:
        """As they are on the wire."""
        return self._wire.bytes_received

    def send(self, frame: Frame) -> None:
        """Send one frame. Raises: MisuseError for one that cannot travel, ConnectionLost."""
        plain, pieces = encode_frame(frame)
        try:
            if pieces:
                rest, pieces = self._sender.begin(frame)
            else:
                head = memoryview(plain)
                sealed = self._outlet.send(head)
                rest = self._sender.seal_head(head) if sealed is None else sealed
            if rest:
                self._wire.send_all(rest)
            for piece in pieces:
                self._wire.send_all(self._sender.seal_piece(piece))
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> Frame:
        """Return the next frame; its tensors are views, valid until the next call.

        Raises: ConnectionLost, also after the peer's close, RecordError, FrameError.
        """
        receiver = self._receiver
        try:
            if receiver.is_idle:
                self._wait()
            frame = receiver.next_frame_untrusted()
            while frame is None:
                if receiver.is_ended:
                    raise EOFError
                receiver.wrote(self._wire.try_receive(receiver.space()))
                frame = receiver.next_frame_untrusted()
        except EOFError as error:
            self.interrupt()
            raise ConnectionLost("the peer ended the connection") from error
        except OSError as error:
            raise self._lost(error) from error
        except TransportError:
            self.interrupt()
            raise
        return frame

    def _wait(self) -> None:
        """Until something has come. Raises: EOFError, OSError."""
        until = monotonic() + self._patience_seconds
        while self._receiver.is_idle:  # a signal may have cut it short
            left_ms = int(1000 * (until - monotonic()))
            if left_ms < 0:
                raise TimeoutError
            if self._wire.fd < 0:
                raise EOFError
            self._receiver.peek(self._inlet.receive(left_ms))

    def interrupt(self) -> None:
        """End it for both sides; whoever waits in another thread is told at once."""
        with suppress(OSError):  # it has ended already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Tell the peer that nothing follows, if it still reads, and close the socket."""
        try:
            self._sock.settimeout(_GOODBYE_SECONDS)
            self._wire.send_all(self._sender.close())
        except OSError:
            pass  # the peer has gone already, and learns nothing from us
        self._wire.fd = -1  # the number may be another socket's from now on
        self._sock.close()

    def _lost(self, error: OSError) -> ConnectionLost:
        # Half a record must never be followed by another: the channel ends here.
        self.interrupt()
        if isinstance(error, TimeoutError):
            return ConnectionLost(f"the peer was silent for {self._patience_seconds:g} s")
        return ConnectionLost(f"the connection broke: {error.strerror or error}")
