"""When a direction of a channel changes its key."""

from transport.errors import MisuseError
from transport.frozen import frozen
from transport.record_counters import UseTally

_NEVER = 2**63  # what is counted has 63 bits where it is compiled


@frozen
class RekeyPolicy:
    """When a direction changes its key. Both sides must hold the same policy.

    The defaults keep the data under one key far below where ChaCha20-Poly1305's bounds begin to
    matter, and bound what a key read out of memory can open of the past.
    Raises: MisuseError.
    """

    max_records: int = 2**16
    max_bytes: int = 64 * 2**30

    def __post_init__(self) -> None:
        if not (0 < self.max_records < _NEVER and 0 < self.max_bytes < _NEVER):
            raise MisuseError(f"a rekey policy needs thresholds from 1 to 2**63 - 1, not {self}")


class KeyUse(UseTally):
    """How much one key has done; sender and receiver count alike."""

    __slots__ = ("_policy",)

    def __init__(self, policy: RekeyPolicy) -> None:
        self._policy = policy
        self.num_records = 0
        self.num_bytes = 0

    def is_spent(self, num_bytes: int) -> bool:
        """Whether a record of `num_bytes` needs the next key."""
        return self.num_records > 0 and (
            self.num_records >= self._policy.max_records
            or self.num_bytes + num_bytes > self._policy.max_bytes
        )

    def reset(self) -> None:
        """The next key has done nothing yet."""
        self.num_records = self.num_bytes = 0
