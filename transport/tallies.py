"""What records count, as bases of the classes that count it.

Compiled, the compiled functions find the numbers at once: where a model's weights have just passed
through the processor's caches, an attribute takes a Python object's whole way to it, microseconds.
"""

try:
    from transport._native import CipherTally, HalfTally, UseTally, WireTally
except ImportError:  # the same in Python

    class CipherTally:  # type: ignore[no-redef]
        """A key, and the number of the next message under it."""

        __slots__ = ("_cipher", "nonce")

    class UseTally:  # type: ignore[no-redef]
        """How much one key has done."""

        __slots__ = ("num_bytes", "num_records")

    class HalfTally:  # type: ignore[no-redef]
        """One direction of a record layer."""

        __slots__ = ("cipher_ns",)

    class WireTally:  # type: ignore[no-redef]
        """A socket."""

        __slots__ = ("bytes_received", "bytes_sent", "fd", "recv_ns", "send_ns")


__all__ = ["CipherTally", "HalfTally", "UseTally", "WireTally"]
