"""What each record needs and counts, as bases of the classes whose it is.

Compiled, the compiled functions find these at once: where a model's weights have just passed
through the processor's caches, an attribute takes a Python object's whole way to it, microseconds.
"""

try:
    from transport._native import (
        CipherTally,
        HalfTally,
        PlainTally,
        ReaderTally,
        UseTally,
        WireTally,
    )

    IS_COMPILED = True
except ImportError:  # there is none, or it was built from other sources: the same in Python
    IS_COMPILED = False

    class CipherTally:  # type: ignore[no-redef]
        """A key, and the number of the next message under it."""

        __slots__ = ("_cipher", "nonce")

    class UseTally:  # type: ignore[no-redef]
        """How much one key has done."""

        __slots__ = ("num_bytes", "num_records")

    class HalfTally:  # type: ignore[no-redef]
        """One direction of a record layer."""

        __slots__ = ("_cipher", "cipher_ns")

    class ReaderTally:  # type: ignore[no-redef]
        """Received bytes, and how far they have been read."""

        __slots__ = ("_end", "_header", "_last", "_start", "_store")

    class PlainTally:  # type: ignore[no-redef]
        """Storage for plaintexts."""

        __slots__ = ("storage",)

    class WireTally:  # type: ignore[no-redef]
        """A socket."""

        __slots__ = ("bytes_received", "bytes_sent", "fd", "recv_ns", "send_ns")


__all__ = ["CipherTally", "HalfTally", "PlainTally", "ReaderTally", "UseTally", "WireTally"]
