"""Bytes made uniform by a key: their number is turned round the circle of all of their length."""

import hashlib
from dataclasses import dataclass

_LABEL = b"veilpipe stego: rotation\0"


@dataclass(frozen=True, slots=True)
class Rotation:
    """Adds a number, modulo 256**num_bytes.

    Under a key that is secret and used once, bytes of any kind become uniform; uniform bytes stay
    so under any key.
    """

    num_bytes: int
    amount: int

    @classmethod
    def of(cls, key: bytes, num_bytes: int) -> "Rotation":
        """As much as the key says, to be drawn from it again by whoever has it."""
        amount = hashlib.shake_256(_LABEL + key).digest(num_bytes)
        return cls(num_bytes, int.from_bytes(amount))

    def apply(self, payload: bytes) -> int:
        """The number to carry for these bytes."""
        return (int.from_bytes(payload) + self.amount) % (1 << 8 * self.num_bytes)

    def undo(self, number: int) -> bytes:
        """The bytes for which `apply` gives a number."""
        return ((number - self.amount) % (1 << 8 * self.num_bytes)).to_bytes(self.num_bytes)
