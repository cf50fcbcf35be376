"""Records between socket and plaintext in one call each; sources in transport/native/.

Optional: installing without a C compiler leaves the module out, and everything runs without it.
Keys, counters and received bytes stay in the objects given, as members of the bases that these have
here. What is not plainly the record expected is left to them as it came.
"""

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from transport.cipher import CipherState
from transport.frame_stream import PlainBuffer
from transport.records import RecordHeader, RecordOpener, RecordReader, RecordSealer

class CipherTally:
    """A key, and the number of the next message under it."""

    _cipher: ChaCha20Poly1305 | AESGCM
    nonce: int

class UseTally:
    """How much one key has done."""

    num_records: int
    num_bytes: int

class HalfTally:
    """One direction of a record layer; no cipher once it has failed."""

    _cipher: CipherState | None
    cipher_ns: int

class ReaderTally:
    """Received bytes, and how far they have been read: `_store[_start:_end]` has not been."""

    _store: bytearray
    _start: int
    _end: int
    _header: RecordHeader | None
    _last: RecordHeader

class PlainTally:
    """Storage for plaintexts."""

    storage: memoryview

class WireTally:
    """A socket; system calls only, waiting excluded."""

    fd: int
    bytes_sent: int
    bytes_received: int
    send_ns: int
    recv_ns: int

class Inlet:
    """Takes a frame's head that has the size of the last one, where it comes alone and whole."""

    def __new__(
        cls, wire: WireTally, reader: RecordReader, opener: RecordOpener, buffer: PlainBuffer, /
    ) -> Inlet: ...
    def receive(self, patience_ms: int, /) -> memoryview | None:
        """Wait that long; return the plaintext, a view of the buffer's storage, else None.

        With None, received bytes are in the reader. Raises OSError, EOFError at the end.
        """

class Outlet:
    """Sends frames' heads of up to `room` bytes, sealed."""

    def __new__(cls, wire: WireTally, sealer: RecordSealer, room: int, /) -> Outlet: ...
    def send(self, plain: memoryview, /) -> memoryview | None:
        """Seal a FRAME record and send what the socket takes of it; return the rest.

        None where nothing has been sealed, because a new key is due first. Raises OSError.
        """
