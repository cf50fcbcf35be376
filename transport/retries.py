"""How a peer that is not up is tried again: at once when it may be back, and never all together."""

import random

import trio

from transport.errors import AttemptsSpent, MisuseError, TransportError
from transport.frozen import frozen


@frozen
class RetryPolicy:
    """Pauses between attempts grow with the time a peer has been away. Raises: MisuseError.

    `first_s`: the shortest, for a peer started in the same moment is up within a few of these;
    `last_s`: the longest; `share`: of the time that it has been away, so that it is found soon
    after it is back; `jitter`: what chance takes off each at most, as a share, so that those who
    wait for one peer do not all come at once. `attempts`: how many there are; None: no end.
    """

    first_s: float = 0.05
    last_s: float = 2.0
    share: float = 0.05
    jitter: float = 0.25
    attempts: int | None = None

    def __post_init__(self) -> None:
        """Check what cannot be right."""
        if not (0 < self.first_s <= self.last_s and self.share >= 0 and 0 <= self.jitter < 1):
            raise MisuseError(f"{self} has no pauses between attempts")
        if self.attempts is not None and self.attempts < 1:
            raise MisuseError(f"{self.attempts} attempts are none")


class Retries:
    """The attempts to reach one peer, from now on."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._began = trio.current_time()
        self._num_failed = 0

    async def pause(self, error: TransportError, at_least_s: float = 0.0) -> None:
        """Wait before the next attempt; `error` is why one is needed.

        Raises: AttemptsSpent where there is none.
        """
        policy = self._policy
        self._num_failed += 1
        if self._num_failed == policy.attempts:
            raise AttemptsSpent(f"{error}; attempts made: {self._num_failed}") from error
        away_s = trio.current_time() - self._began
        longest_s = min(max(policy.first_s, at_least_s, policy.share * away_s), policy.last_s)
        await trio.sleep(longest_s * random.uniform(1 - policy.jitter, 1))  # noqa: S311  (no secret)
