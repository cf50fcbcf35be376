"""The trio shell: a SecureChannel of frames over a connected socket, and how to make one."""

import socket
from collections.abc import Callable, Sequence

import trio

from transport.blocking_channel import BlockingChannel
from transport.compiled_records import Inlet, Outlet
from transport.errors import ConnectionLost
from transport.frame_stream import FrameReceiver, FrameSender
from transport.frozen import frozen
from transport.handshake import Credentials, Link, Peer, Session
from transport.handshake_io import run_initiator, run_responder
from transport.nonblocking_socket import Wire
from transport.records import OVERHEAD_BYTES
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import INLINE_BYTES, Frame, FrameForm, FrameLimits


@frozen
class ChannelStats:
    """What a channel has done so far; subtract two of them to measure what lies between."""

    bytes_sent: int
    bytes_received: int
    frames_sent: int
    frames_received: int
    encrypt_ns: int
    decrypt_ns: int
    send_ns: int  # system calls only, waiting excluded
    recv_ns: int
    rekeys: int  # both directions


class SecureChannel(trio.abc.Channel[Frame]):
    """Frames to and from an authenticated peer, each whole and in order or not at all.

    One task may send while another receives. After any failure, and when cancelled with part of a
    frame under way, the channel is closed for good. Cancelled before that, it is as it was.
    """

    def __init__(self, wire: Wire, session: Session, limits: FrameLimits) -> None:
        """Use `connect_channel` or `accept_channel`."""
        self.peer: Peer = session.peer
        self._session = session
        self.handshake_hash = session.handshake_hash
        self._wire = wire
        self._sealer = session.sealer
        self._opener = session.opener
        # What holds the times of `stats`, for whoever reads them often.
        self.clocks = (session.sealer, session.opener, wire)
        self._sender = FrameSender(session.sealer)
        self._receiver = receiver = FrameReceiver(session.opener, limits)
        self._inlet = Inlet(wire, receiver.reader, session.opener, receiver.buffer)
        self._outlet = Outlet(wire, session.sealer, INLINE_BYTES + OVERHEAD_BYTES)
        self._is_sending = False
        self._is_receiving = False
        self._frames_sent = 0
        self._frames_received = 0

    @property
    def stats(self) -> ChannelStats:
        """Cumulative counters and times."""
        wire = self._wire
        return ChannelStats(
            bytes_sent=wire.bytes_sent,
            bytes_received=wire.bytes_received,
            frames_sent=self._frames_sent,
            frames_received=self._frames_received,
            encrypt_ns=self._sealer.cipher_ns,
            decrypt_ns=self._opener.cipher_ns,
            send_ns=wire.send_ns,
            recv_ns=wire.recv_ns,
            rekeys=self._sealer.num_rekeys + self._opener.num_rekeys,
        )

    @property
    def is_closed(self) -> bool:
        """Whether the channel has been closed, here or by a failure."""
        return self._wire.is_closed

    def wait_in_place(self, patience_ms: int) -> None:
        """Let `receive` first wait that long itself, and only then through the event loop.

        That saves the loop's work for each frame, of which there is one for every token. Meanwhile
        all other tasks stand still, so it is for processes that have nothing better to do.
        """
        self._wire.patience_ms = patience_ms

    async def send(self, frame: Frame) -> None:
        """Send one frame.

        Raises: MisuseError for a frame that cannot travel, ConnectionLost,
        trio.BusyResourceError while another task sends, trio.ClosedResourceError.
        """
        wire = self._wire
        if wire.is_closed or self._is_sending:
            raise self._unusable()
        self._is_sending = True
        try:
            await wire.turn()  # cancelled here, or with a misused frame, nothing has been sealed
            data, pieces = self._sender.begin(frame)
            try:
                num_sent = wire.try_send(data)
                if pieces or num_sent < len(data):
                    await self._send_rest(data[num_sent:], pieces)
            except BaseException:
                # Half a record must never be followed by another: the channel ends here.
                wire.close()
                raise
        finally:
            self._is_sending = False
        self._frames_sent += 1

    async def receive(self) -> Frame:
        """Return the next frame; its tensors are views, valid until the next call.

        Raises: trio.EndOfChannel after the peer's close, ConnectionLost where the connection ends
        without one, RecordError, FrameError, trio.BusyResourceError, trio.ClosedResourceError.
        """
        wire, receiver = self._wire, self._receiver
        if wire.is_closed or self._is_receiving:
            raise self._unusable()
        self._is_receiving = True
        num_received = None  # nothing tried yet: cancelled now, what has arrived stays for later
        try:
            frame, is_checked = None, True  # a wait is a checkpoint
            if receiver.is_idle:
                await wire.readable()  # seldom there by now: trying first costs a call in vain
            else:
                await wire.turn()
                frame = receiver.next_frame_untrusted()
            while frame is None and not receiver.is_ended:
                while not (num_received := wire.try_receive(receiver.space())):
                    await wire.readable()
                    is_checked = True
                receiver.wrote(num_received)
                if not is_checked:
                    await wire.turn()
                is_checked = False
                frame = receiver.next_frame_untrusted()
        except trio.Cancelled:
            if not receiver.is_idle and num_received is not None:
                wire.close()
            raise
        except BaseException:
            wire.close()
            raise
        finally:
            self._is_receiving = False
        if frame is None:
            raise trio.EndOfChannel
        self._frames_received += 1
        return frame

    async def wait_readable(self) -> None:
        """Wait, letting other tasks run, until something has come for `peek`, or the end has.

        Cancelled, the channel is as it was. Raises: trio.ClosedResourceError,
        trio.BusyResourceError.
        """
        wire = self._wire
        if wire.is_closed or self._is_receiving:
            raise self._unusable()
        if not self._receiver.is_idle:
            return
        self._is_receiving = True
        try:
            await wire.readable()
        finally:
            self._is_receiving = False

    async def peek(self) -> memoryview | None:
        """The plaintext of the next frame's head, waited for in place; the frame is still next.

        None where nothing has come, or something else: `receive` has a look. Whoever has dealt with
        the frame, of which the head must be all, calls `drop`. The view is valid until either.
        Raises: as `receive`, but for the end of the channel.
        """
        wire, receiver = self._wire, self._receiver
        if wire.is_closed or self._is_receiving:
            raise self._unusable()
        if wire.is_turn_due:
            self._is_receiving = True
            try:
                await wire.fair_turn()
            finally:
                self._is_receiving = False
        try:
            if not receiver.is_idle:
                return receiver.peek()  # a peer may send faster than its frames are dealt with
            return receiver.peek(self._inlet.receive(wire.patience_ms))
        except EOFError as error:
            raise wire.ended() from error
        except OSError as error:
            raise wire.lost(error) from error
        except BaseException:
            wire.close()
            raise

    def drop(self) -> None:
        """Take the frame that `peek` showed for received."""
        self._receiver.drop()
        self._frames_received += 1

    async def send_form(self, form: FrameForm) -> None:
        """Send a frame as it is laid out, with no turn for other tasks. Raises: as `send`."""
        wire = self._wire
        if wire.is_closed or self._is_sending:
            raise self._unusable()
        self._is_sending = True
        try:
            rest = self._outlet.send(form.plain)
            if rest is None:
                data = self._sender.seal_head(form.plain)
                rest = data[wire.try_send(data) :]
            if rest:
                await wire.send_all(rest)
        except OSError as error:
            raise wire.lost(error) from error
        except BaseException:
            wire.close()
            raise
        finally:
            self._is_sending = False
        self._frames_sent += 1

    def taken_over(self, patience_seconds: float) -> BlockingChannel:
        """The rest of this channel, for threads that wait themselves; this object is closed.

        Nothing may be under way in it. Raises: trio.ClosedResourceError, trio.BusyResourceError.
        """
        if self._wire.is_closed or self._is_sending or self._is_receiving:
            raise self._unusable()
        sock = self._wire.give_up()
        return BlockingChannel(sock, self._session, self._sender, self._receiver, patience_seconds)

    async def aclose(self) -> None:
        """Tell the peer that nothing follows, then close the socket.

        Unsent frames of another task are cut off, which the peer sees as a lost connection. Waits
        only while the peer does not read; cancelled, it closes the socket all the same.
        """
        try:
            if self._wire.is_closed or self._is_sending:
                await trio.lowlevel.checkpoint()
            else:
                self._is_sending = True
                await self._wire.send_all(self._sender.close())
        except (ConnectionLost, trio.ClosedResourceError):
            pass  # the peer has gone already, and learns nothing from us
        finally:
            self._wire.close()

    def _unusable(self) -> Exception:
        if self._wire.is_closed:
            return trio.ClosedResourceError("this channel is closed")
        return trio.BusyResourceError("another task uses this direction of the channel")

    async def _send_rest(self, data: memoryview, pieces: list[memoryview]) -> None:
        if data:
            await self._wire.send_all(data)
        for piece in pieces:
            await self._wire.send_all(self._sender.seal_piece(piece))


async def connect_channel(
    sock: socket.socket,
    link: Link,
    credentials: Credentials,
    limits: FrameLimits,
    *,
    rekey: RekeyPolicy | None = None,
) -> SecureChannel:
    """Run the handshake as the link's initiator on a connected socket, which it then owns.

    Raises: HandshakeError, AttestationError, ConnectionLost (NoAnswer where the peer's first byte
    never came); the socket is closed by then.
    """
    wire = Wire(sock)
    try:
        session = await run_initiator(wire, link, credentials, rekey)
        return SecureChannel(wire, session, limits)
    except BaseException:
        wire.close()
        raise


async def accept_channel(
    sock: socket.socket,
    link: Link,
    credentials: Credentials,
    limits: FrameLimits,
    *,
    rekey: RekeyPolicy | None = None,
    on_hello: Callable[[bytes], None] = lambda _: None,
) -> SecureChannel:
    """Run the handshake as the link's responder on a connected socket, which it then owns.

    `on_hello` gets the initiator's ephemeral key once its hello is known to be for this link and
    before any more is done for it; it may raise HandshakeError.
    Raises: HandshakeError, AttestationError, ConnectionLost; the socket is closed by then.
    """
    entrances = [(link, credentials, limits)]
    _, channel = await accept_one_of(sock, entrances, rekey=rekey, on_hello=on_hello)
    return channel


async def accept_one_of(
    sock: socket.socket,
    entrances: Sequence[tuple[Link, Credentials, FrameLimits]],
    *,
    rekey: RekeyPolicy | None = None,
    on_hello: Callable[[bytes], None] = lambda _: None,
) -> tuple[int, SecureChannel]:
    """As `accept_channel`, on whichever of these links the initiator asks for; and which it was."""
    wire = Wire(sock)
    try:
        links = [(link, credentials) for link, credentials, _ in entrances]
        index, session = await run_responder(wire, links, rekey, on_hello)
        return index, SecureChannel(wire, session, entrances[index][2])
    except BaseException:
        wire.close()
        raise
