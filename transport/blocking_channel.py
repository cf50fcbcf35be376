"""A channel for threads that wait themselves: what computes between two frames is no task.

A model's layer cannot give way to an event loop in its midst. So the socket of a channel that
has been made as any other is taken over, and read and written in the calling thread: one may send
while another receives.
"""

import socket
from contextlib import suppress

from transport.errors import ConnectionLost, TransportError
from transport.frame_stream import FrameReceiver, FrameSender
from transport.handshake import Peer
from transport.tensor_frames import Frame

# For the last record to a peer that may not be reading.
_GOODBYE_SECONDS = 1.0


class BlockingChannel:
    """Frames to and from an authenticated peer; after any failure it is over.

    patience_seconds: how long a peer may take for a byte.
    """

    def __init__(
        self,
        sock: socket.socket,
        sender: FrameSender,
        receiver: FrameReceiver,
        peer: Peer,
        patience_seconds: float,
    ) -> None:
        """Use `SecureChannel.taken_over`."""
        sock.settimeout(patience_seconds)
        self.peer = peer
        self.bytes_sent = self.bytes_received = 0
        self._sock = sock
        self._sender = sender
        self._receiver = receiver
        self._patience_seconds = patience_seconds

    def send(self, frame: Frame) -> None:
        """Send one frame. Raises: MisuseError for one that cannot travel, ConnectionLost."""
        data, pieces = self._sender.begin(frame)
        try:
            self._write(data)
            for piece in pieces:
                self._write(self._sender.seal_piece(piece))
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> Frame:
        """Return the next frame; its tensors are views, valid until the next call.

        Raises: ConnectionLost, also after the peer's close, RecordError, FrameError.
        """
        receiver = self._receiver
        try:
            frame = receiver.next_frame_untrusted()
            while frame is None:
                count = 0 if receiver.is_ended else self._sock.recv_into(receiver.space())
                if count == 0:
                    raise ConnectionLost("the peer ended the connection")
                self.bytes_received += count
                receiver.wrote(count)
                frame = receiver.next_frame_untrusted()
        except OSError as error:
            raise self._lost(error) from error
        except TransportError:
            self.interrupt()
            raise
        return frame

    def interrupt(self) -> None:
        """End it for both sides; whoever waits in another thread is told at once."""
        with suppress(OSError):  # it has ended already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Tell the peer that nothing follows, if it still reads, and close the socket."""
        try:
            self._sock.settimeout(_GOODBYE_SECONDS)
            self._write(self._sender.close())
        except OSError:
            pass  # the peer has gone already, and learns nothing from us
        self._sock.close()

    def _write(self, data: memoryview) -> None:
        self._sock.sendall(data)
        self.bytes_sent += len(data)

    def _lost(self, error: OSError) -> ConnectionLost:
        # Half a record must never be followed by another: the channel ends here.
        self.interrupt()
        if isinstance(error, TimeoutError):
            return ConnectionLost(f"the peer was silent for {self._patience_seconds:g} s")
        return ConnectionLost(f"the connection broke: {error.strerror or error}")
