"""Frames to bytes and back, sans-IO: one direction of a channel on either side."""

from transport.errors import FrameError, RecordError
from transport.record_counters import PlainTally
from transport.records import (
    OVERHEAD_BYTES,
    RecordHeader,
    RecordKind,
    RecordOpener,
    RecordReader,
    RecordSealer,
)
from transport.tensor_frames import (
    INLINE_BYTES,
    PADDING,
    PIECE_BYTES,
    Frame,
    FrameLimits,
    Layout,
    Tensor,
    decode_layout_untrusted,
    encode_frame,
)

# Members of an enumeration are slow to look up, and these are needed for every record.
FRAME, BODY, REKEY, CLOSE = RecordKind.FRAME, RecordKind.BODY, RecordKind.REKEY, RecordKind.CLOSE


class PlainBuffer(PlainTally):
    """Storage that frames are decrypted into, kept from frame to frame.

    It grows geometrically with records that have arrived, never with a declared size.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.storage = memoryview(bytearray(INLINE_BYTES))

    def range(self, start: int, stop: int, most: int) -> memoryview:
        """Return writable storage; `most` caps growth at what the frame can still need."""
        if stop > len(self.storage):
            grown = memoryview(bytearray(max(stop, min(2 * len(self.storage), most))))
            held = min(start, len(self.storage))
            grown[:held] = self.storage[:held]
            self.storage = grown
        return self.storage[start:stop]


class FrameReceiver:
    """Received bytes in, frames out; the state of one direction of a channel.

    Fill `space()`, tell `wrote()`, then call `next_frame_untrusted()` until it returns None.
    """

    def __init__(self, opener: RecordOpener, limits: FrameLimits) -> None:
        self.reader = RecordReader(opener)
        self.space = self.reader.space
        self.wrote = self.reader.wrote
        self._limits = limits
        self.buffer = PlainBuffer()
        self._body: _Body | None = None
        # From token to token the heads' fixed parts are the same, and so are the tensors: views of
        # the same storage. What differs by a byte is parsed and held to the limits anew.
        self._fixed = b""
        self._layout: Layout | None = None
        self._storage: memoryview | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._peeked: memoryview | None = None
        self.is_ended = False

    @property
    def is_idle(self) -> bool:
        """Whether a next frame may come and no byte of it has: waiting can be given up."""
        if self._body is not None or self._peeked is not None or self.is_ended:
            return False
        return self.reader.is_empty

    def peek(self, opened: memoryview | None = None) -> memoryview | None:
        """The plaintext of the next frame's head, if that is there; until `drop` it is still next.

        `opened`: that plaintext, where its record has been opened already, into the buffer.
        Raises: RecordError; the channel is then over.
        """
        if opened is not None:
            self._peeked = opened
        elif self._peeked is None and self._body is None and not self.is_ended:
            record = self.reader.ready_untrusted()
            if record is not None and record.kind is FRAME:
                self._peeked = self._open(record)
        return self._peeked

    def drop(self) -> None:
        """The frame whose head was peeked at had no more than that, and has been dealt with."""
        self._peeked = None

    def next_frame_untrusted(self) -> Frame | None:
        """Return the next whole frame, or None while bytes are missing or after the close.

        Raises: RecordError, FrameError; the channel is then over.
        """
        if self._peeked is not None:
            plain, self._peeked = self._peeked, None
            frame = self._take_head(plain)
            if frame is not None:
                return frame
        while not self.is_ended:
            record = self.reader.ready_untrusted()
            if record is None:
                return None
            if self._body is not None and record.kind is BODY:
                frame = self._take_piece(record, self._body)
            elif self._body is None and record.kind is FRAME:
                frame = self._take_head(self._open(record))
            else:
                self._take_empty(record)
                continue
            if frame is not None:
                return frame
        return None

    def _take_empty(self, record: RecordHeader) -> None:
        """Take REKEY anywhere, CLOSE between frames, nothing else."""
        if record.kind is not REKEY and (record.kind is not CLOSE or self._body is not None):
            place = "between frames" if self._body is None else "inside a frame"
            raise RecordError(f"a {record.kind.name} record {place}")
        self.reader.open_into(self.buffer.range(0, 0, 0))
        self.is_ended = record.kind is CLOSE

    def _open(self, record: RecordHeader) -> memoryview:
        num_bytes = record.plaintext_bytes
        storage = self.buffer.storage
        if num_bytes <= len(storage):
            plain = storage[:num_bytes]
        else:
            plain = self.buffer.range(0, num_bytes, num_bytes)
        self.reader.open_into(plain)
        return plain

    def _take_head(self, plain: memoryview) -> Frame | None:
        layout = self._layout_of(plain)
        if len(plain) != layout.record_bytes:
            raise FrameError(f"a FRAME record of {len(plain)} bytes declares {layout.record_bytes}")
        header = plain[layout.header_start : layout.header_stop].tobytes()
        if self._limits.check is not None:
            self._limits.check(header, layout.specs)
        if layout.is_inline:
            for start, stop in layout.gaps:
                if plain[start:stop] != PADDING[stop - start]:
                    raise FrameError("the padding before a tensor is not zero")
            return Frame(layout.kind, header, self._tensors_of(layout))
        self._body = _Body(layout, header)
        return self._finish(self._body) if self._body.advance() else None

    def _layout_of(self, plain: memoryview) -> Layout:
        layout = self._layout
        if layout is None or plain[: len(self._fixed)] != self._fixed:
            self._layout = layout = decode_layout_untrusted(plain, self._limits)
            self._fixed = bytes(plain[: layout.header_start])
            self._storage, self._tensors = None, ()
        return layout

    def _tensors_of(self, layout: Layout) -> tuple[Tensor, ...]:
        storage = self.buffer.storage
        if self._storage is not storage:
            views = [storage[start:stop] for start, stop in layout.places]
            self._tensors = tuple(map(Tensor, layout.specs, views))
            self._storage = storage
        return self._tensors

    def _take_piece(self, record: RecordHeader, body: "_Body") -> Frame | None:
        start, stop = body.due
        if record.plaintext_bytes != stop - start:
            raise RecordError(
                f"a BODY record of {record.plaintext_bytes} bytes where {stop - start} are due"
            )
        self.reader.open_into(self.buffer.range(start, stop, body.layout.storage_bytes))
        return self._finish(body) if body.advance() else None

    def _finish(self, body: "_Body") -> Frame:
        self._body = None
        return Frame(body.layout.kind, body.header, self._tensors_of(body.layout))


class _Body:
    """A frame whose tensors are arriving, and which piece comes next."""

    __slots__ = ("_ranges", "due", "header", "layout")

    def __init__(self, layout: Layout, header: bytes) -> None:
        self.layout = layout
        self.header = header
        self._ranges = (
            (start, min(start + PIECE_BYTES, last))
            for first, last in layout.places
            for start in range(first, last, PIECE_BYTES)
        )
        self.due = (0, 0)

    def advance(self) -> bool:
        """Go on to the next piece; returns whether there is none."""
        following = next(self._ranges, None)
        self.due = following or (0, 0)
        return following is None


class FrameSender:
    """Frames in, bytes to send out, through one reused buffer."""

    def __init__(self, sealer: RecordSealer) -> None:
        self._sealer = sealer
        self._out = memoryview(bytearray(INLINE_BYTES + 2 * OVERHEAD_BYTES))

    def begin(self, frame: Frame) -> tuple[memoryview, list[memoryview]]:
        """Seal the frame's first bytes; returns them and the pieces still to be sealed.

        Raises: MisuseError, with nothing sealed. Otherwise all of the frame must be sent.
        """
        first, pieces = encode_frame(frame)
        out = self._out
        room = len(first) + 2 * OVERHEAD_BYTES
        if pieces:
            room += PIECE_BYTES + 2 * OVERHEAD_BYTES
        if room > len(out):
            self._out = out = memoryview(bytearray(room))
        used = self._sealer.seal_into(FRAME, first, out)
        if not pieces:
            return out[:used], pieces
        # The head travels with the first piece.
        used += self._sealer.seal_into(BODY, pieces[0], out[used:])
        return out[:used], pieces[1:]

    def seal_head(self, plain: memoryview) -> memoryview:
        """Return the record of a frame that `FrameForm` has laid out. Raises: MisuseError."""
        room = len(plain) + 2 * OVERHEAD_BYTES
        if room > len(self._out):
            self._out = memoryview(bytearray(room))
        return self._out[: self._sealer.seal_into(FRAME, plain, self._out)]

    def seal_piece(self, piece: memoryview) -> memoryview:
        """Return the record of one piece, in place of the bytes returned before."""
        return self._out[: self._sealer.seal_into(BODY, piece, self._out)]

    def close(self) -> memoryview:
        """Return the record that ends this direction."""
        return self._out[: self._sealer.seal_into(CLOSE, b"", self._out)]
