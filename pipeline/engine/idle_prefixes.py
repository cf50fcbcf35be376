"""Texts that slots still hold though nobody owns them: which begins as a prompt does, which goes.

Pure: no torch, no I/O, and time as a clock that is handed in.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pipeline.errors import InputError
from pipeline.protocol.replay_history import SlotPart
from transport.frozen import frozen

# Token ids compared at once: by slices, in a tenth of the time that one by one takes.
_BLOCK = 64


@frozen
class PrefixOptions:
    """How much of the stages' KV memory idle prefixes may take, and for how long each stays.

    `share` of what all slots may hold, 0 to 1; 0: whatever a request leaves is cleared at once.
    Raises InputError.
    """

    share: float = 0.0
    ttl_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Check what cannot be right."""
        if not 0 <= self.share <= 1:
            raise InputError(f"a prefix share of {self.share:g}: give a number from 0 to 1")
        if not 0 < self.ttl_seconds < math.inf:
            raise InputError(f"prefixes kept for {self.ttl_seconds:g} s: give a number above 0")


NO_PREFIXES = PrefixOptions()


@frozen
class IdlePrefix:
    """What a slot holds of a request that has left: for whom, which tokens, in which steps sent."""

    slot: int
    salt: bytes
    token_ids: tuple[int, ...]
    pieces: tuple[SlotPart, ...]


class IdlePrefixes:
    """One prefix a slot, the least recently used first: those expire first and go first."""

    def __init__(self, max_tokens: int, ttl_seconds: float, clock: Callable[[], float]) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        # By slot, with the time at which it expires.
        self._prefixes: OrderedDict[int, tuple[IdlePrefix, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each has."""
        return [len(prefix.token_ids) for prefix, _ in self._prefixes.values()]

    @property
    def next_expiry(self) -> float:
        """When the next one expires, by the clock; infinite if there is none."""
        return next((expiry for _, expiry in self._prefixes.values()), math.inf)

    def longest(self, salt: bytes, token_ids: Sequence[int]) -> tuple[IdlePrefix | None, int]:
        """What begins with most of these tokens, and with how many; the latest of equal ones.

        Attack: who is answered sooner learns what others have asked. So nothing of another salt is
        even looked at.
        """
        found, length = None, 0
        for prefix, _ in reversed(self._prefixes.values()):
            if prefix.salt == salt:
                common = common_length(prefix.token_ids, token_ids)
                if common > length:
                    found, length = prefix, common
        return found, length

    def keep(self, prefix: IdlePrefix) -> list[int]:
        """Add one, of `max_tokens` at most; the slots of those that have to go for it."""
        evicted = []
        while self.num_tokens + len(prefix.token_ids) > self.max_tokens:
            evicted.append(self.evict())
        self._prefixes[prefix.slot] = prefix, self._clock() + self._ttl_seconds
        self.num_tokens += len(prefix.token_ids)
        return evicted

    def take(self, slot: int) -> IdlePrefix:
        """The prefix in a slot, which is no longer idle."""
        prefix, _ = self._prefixes.pop(slot)
        self.num_tokens -= len(prefix.token_ids)
        return prefix

    def evict(self, but: int | None = None) -> int:
        """Let the least recently used go, of all slots `but` one; its slot."""
        slot = next(slot for slot in self._prefixes if slot != but)
        self.take(slot)
        return slot

    def expire(self) -> list[int]:
        """Let all go whose time has come; their slots."""
        expired = []
        while self.next_expiry <= self._clock():
            expired.append(self.evict())
        return expired

    def clear(self) -> list[int]:
        """Let all go; their slots."""
        slots = list(self._prefixes)
        self._prefixes.clear()
        self.num_tokens = 0
        return slots


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    count, limit = 0, min(len(first), len(second))
    while count < limit and first[count : count + _BLOCK] == second[count : count + _BLOCK]:
        count += _BLOCK
    while count < limit and first[count] == second[count]:
        count += 1
    return min(count, limit)
