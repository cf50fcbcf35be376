"""The record layer: authenticated records of up to 512 KiB over an unreliable adversary's wire.

A record is an 8-byte header (kind, three zero bytes, ciphertext length) and its ciphertext; the
whole header is associated data. The sequence number is the cipher's counter and never travels, so
a record that was dropped, repeated, moved or taken from elsewhere does not authenticate.
"""

from enum import IntEnum
from struct import Struct
from time import perf_counter_ns
from typing import NamedTuple

from cryptography.exceptions import InvalidTag

from transport.cipher import TAG_BYTES, Buffer, CipherState
from transport.errors import MisuseError, RecordError
from transport.record_counters import HalfTally, ReaderTally
from transport.rekey_policy import KeyUse, RekeyPolicy

HEADER = Struct(">II")  # kind in the first byte, zeros; ciphertext length (tag included)
HEADER_BYTES = HEADER.size
OVERHEAD_BYTES = HEADER_BYTES + TAG_BYTES
MAX_PLAINTEXT_BYTES = 512 * 1024  # larger ones gain no speed and only delay the first check


class RecordKind(IntEnum):
    """What a record is for. Only FRAME and BODY carry plaintext."""

    ACCEPT = 1  # the responder's first record: keys confirmed, evidence accepted
    FRAME = 2  # the head of a frame, with its tensors where they are small
    BODY = 3  # a piece of one tensor of the frame begun before
    REKEY = 4  # the last record under its key
    CLOSE = 5  # nothing follows; an end without it is a truncation


_KIND_SHIFT = 24
_FULL = (TAG_BYTES + 1, TAG_BYTES + MAX_PLAINTEXT_BYTES)
_EMPTY = (TAG_BYTES, TAG_BYTES)
_SIZES = {
    RecordKind.ACCEPT: _EMPTY,
    RecordKind.FRAME: _FULL,
    RecordKind.BODY: _FULL,
    RecordKind.REKEY: _EMPTY,
    RecordKind.CLOSE: _EMPTY,
}
_KINDS = {kind << _KIND_SHIFT: (kind, *sizes) for kind, sizes in _SIZES.items()}
_REKEY = RecordKind.REKEY  # members of an enumeration are slow to look up


class RecordSealer(HalfTally):
    """The sending half: plaintexts in, records out."""

    __slots__ = ("_use", "num_rekeys")

    def __init__(self, cipher: CipherState, policy: RekeyPolicy) -> None:
        self._cipher: CipherState = cipher
        self._use = KeyUse(policy)
        self.num_rekeys = 0
        self.cipher_ns = 0

    def seal_into(self, kind: RecordKind, plaintext: Buffer, out: memoryview) -> int:
        """Write the record, after a REKEY where one is due, and return the bytes written.

        `out` needs len(plaintext) + 2 * OVERHEAD_BYTES.
        Raises: MisuseError on more than a record holds.
        """
        started_ns = perf_counter_ns()
        num_bytes = len(plaintext)
        if num_bytes > MAX_PLAINTEXT_BYTES:
            raise MisuseError(f"a record holds {MAX_PLAINTEXT_BYTES} bytes, not {num_bytes}")
        use = self._use
        start = 0
        if use.is_spent(num_bytes):
            start = self._rekey(out)
        sealed_bytes = num_bytes + TAG_BYTES
        body = start + HEADER_BYTES
        end = body + sealed_bytes
        out[start:body] = header = HEADER.pack(kind << _KIND_SHIFT, sealed_bytes)
        self._cipher.encrypt_into(header, plaintext, out[body:end])
        use.num_records += 1
        use.num_bytes += num_bytes
        self.cipher_ns += perf_counter_ns() - started_ns
        return end

    def seal(self, kind: RecordKind, plaintext: Buffer = b"") -> bytes:
        """Return the record, after a REKEY where one is due. Raises: as `seal_into`."""
        out = memoryview(bytearray(len(plaintext) + 2 * OVERHEAD_BYTES))
        return bytes(out[: self.seal_into(kind, plaintext, out)])

    def _rekey(self, out: memoryview) -> int:
        header = HEADER.pack(_REKEY << _KIND_SHIFT, TAG_BYTES)
        out[:HEADER_BYTES] = header
        self._cipher.encrypt_into(header, b"", out[HEADER_BYTES:OVERHEAD_BYTES])
        self._cipher.rekey()
        self._use.reset()
        self.num_rekeys += 1
        return OVERHEAD_BYTES


class RecordHeader(NamedTuple):
    """A header that has been parsed but not yet authenticated."""

    kind: RecordKind
    sealed_bytes: int
    plaintext_bytes: int
    raw: Buffer


def parse_header_untrusted(raw: bytes | bytearray) -> RecordHeader:
    """Read a header and check its kind and length. Raises: RecordError."""
    word, sealed_bytes = HEADER.unpack(raw)
    try:
        kind, least, most = _KINDS[word]
    except KeyError as error:
        raise RecordError(f"not a record header: {raw.hex()}") from error
    if not least <= sealed_bytes <= most:
        raise RecordError(
            f"a record of kind {kind.name} and {sealed_bytes} bytes where {least} to {most} are "
            "possible"
        )
    return RecordHeader(kind, sealed_bytes, sealed_bytes - TAG_BYTES, raw)


class RecordOpener(HalfTally):
    """The receiving half: records in, plaintexts out. The first failure is the last call."""

    __slots__ = ("_use", "num_rekeys")

    def __init__(self, cipher: CipherState, policy: RekeyPolicy) -> None:
        self._cipher: CipherState | None = cipher
        self._use = KeyUse(policy)
        self.num_rekeys = 0
        self.cipher_ns = 0

    def open_into(self, header: RecordHeader, sealed: Buffer, out: memoryview) -> None:
        """Authenticate a record and write its plaintext to `out`, exactly its length.

        Raises: RecordError, with `out` wiped.
        """
        started_ns = perf_counter_ns()
        cipher, self._cipher = self._cipher, None
        if cipher is None:
            raise MisuseError("this direction has failed and opens nothing any more")
        use = self._use
        num_bytes = len(out)
        is_rekey = header.kind is _REKEY
        # Hold the peer to the schedule: it neither outlives a key nor burns keys for nothing.
        if is_rekey and use.num_records == 0:
            raise RecordError("a key was replaced before it was used")
        if not is_rekey and use.is_spent(num_bytes):
            raise RecordError("the peer went on under a key that was due for replacement")
        try:
            cipher.decrypt_into(header.raw, sealed, out)
        except InvalidTag as error:
            # The AEAD decrypts before it compares tags: leave nobody forged plaintext to read.
            out[:] = bytes(num_bytes)
            raise RecordError(
                f"record {cipher.nonce} does not authenticate: altered, lost, repeated or foreign"
            ) from error
        if is_rekey:
            cipher.rekey()
            use.reset()
            self.num_rekeys += 1
        else:
            use.num_records += 1
            use.num_bytes += num_bytes
        self._cipher = cipher
        self.cipher_ns += perf_counter_ns() - started_ns

    def open(self, record: Buffer) -> tuple[RecordKind, bytes]:
        """Open one whole record. Raises: RecordError."""
        if len(record) < HEADER_BYTES:
            raise RecordError(f"a record of {len(record)} bytes has no header")
        header = parse_header_untrusted(bytes(record[:HEADER_BYTES]))
        sealed = memoryview(record)[HEADER_BYTES:]
        if len(sealed) != header.sealed_bytes:
            raise RecordError(f"{len(sealed)} bytes follow a header that says {header}")
        out = bytearray(header.plaintext_bytes)
        self.open_into(header, sealed, memoryview(out))
        return header.kind, bytes(out)


class RecordReader(ReaderTally):
    """Received bytes in, one whole record at a time out, through one reused buffer.

    The buffer grows geometrically with bytes really received, never with a declared length.
    """

    FIRST_BYTES = 64 * 1024
    MOST_BYTES = MAX_PLAINTEXT_BYTES + TAG_BYTES + HEADER_BYTES

    __slots__ = ("_first", "_opener", "_view")

    def __init__(self, opener: RecordOpener) -> None:
        self._opener = opener
        self._store = bytearray(self.FIRST_BYTES)
        self._view = memoryview(self._store)
        self._first = self._view[: self.FIRST_BYTES]
        self._start = self._end = 0
        self._header: RecordHeader | None = None
        self._last = RecordHeader(_REKEY, 0, 0, b"")  # from token to token they are the same

    @property
    def is_empty(self) -> bool:
        """Whether no byte of a next record has arrived."""
        return self._start == self._end and self._header is None

    def space(self) -> memoryview:
        """Where the next received bytes go; never empty.

        With a long record under way it ends with that record and the next header, so that the
        bytes of the record after it need no moving.
        """
        if self._start == self._end:
            self._start = self._end = 0
            if self._header is None:
                return self._first
        missing = HEADER_BYTES if self._header is None else self._header.sealed_bytes
        if self._start and self._start + missing + HEADER_BYTES > len(self._store):
            self._move_to_front()
        if self._end == len(self._store):
            self._grow()
        is_long = missing > self.FIRST_BYTES
        limit = self._start + missing + HEADER_BYTES if is_long else self._end + self.FIRST_BYTES
        return self._view[self._end : limit]

    def wrote(self, num_bytes: int) -> None:
        """Tell how much of `space()` was filled."""
        self._end += num_bytes

    def took(self, num_bytes: int) -> None:
        """Tell how much of the buffer was filled from its beginning on, where it `is_empty`."""
        self._start, self._end = 0, num_bytes

    def ready_untrusted(self) -> RecordHeader | None:
        """Return the header of the next record once all of it is there. Raises: RecordError."""
        header = self._header
        if header is None:
            body = self._start + HEADER_BYTES
            if body > self._end:
                return None
            raw = self._store[self._start : body]
            header = self._last
            if raw != header.raw:
                self._last = header = parse_header_untrusted(raw)
            self._header = header
            self._start = body
        return header if self._end - self._start >= header.sealed_bytes else None

    def open_into(self, out: memoryview) -> None:
        """Authenticate the ready record into `out` and go on to the next. Raises: RecordError."""
        header = self._header
        assert header is not None, "callers open only what ready_untrusted() returned"
        end = self._start + header.sealed_bytes
        self._opener.open_into(header, self._view[self._start : end], out)
        self._start = end
        self._header = None

    def _move_to_front(self) -> None:
        held = self._end - self._start
        self._store[:held] = self._view[self._start : self._end]
        self._start, self._end = 0, held

    def _grow(self) -> None:
        """Double the buffer, which bytes received have filled."""
        grown = bytearray(min(2 * len(self._store), self.MOST_BYTES))
        grown[: self._end] = self._view[: self._end]
        self._store, self._view = grown, memoryview(grown)
        self._first = self._view[: self.FIRST_BYTES]
