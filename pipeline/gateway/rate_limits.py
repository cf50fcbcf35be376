"""What clients may take of the server, and how many requests a minute."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.gateway.errors import ApiError, Kind


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What one client may take from the others; durations in seconds.

    `max_choices` bounds a request's continuations, `max_open_choices` those of all clients that are
    under way or wait. `max_buffered_bytes` bounds what is held of all requests that are not
    understood yet, beyond the little that each connection may send. `header_seconds` bounds a
    request's headers and how long an idle connection is kept, `body_seconds` its body,
    `write_seconds` how long a client may read nothing of a response, and `request_seconds` how long
    its last token may take to come, if anything does.
    Attacks: slow-loris, sockets left half closed, clients that never read, or ask for everything.
    """

    max_connections: int = 1024
    max_body_bytes: int = 4 << 20
    max_buffered_bytes: int = 64 << 20
    max_choices: int = 128
    max_open_choices: int = 1024
    requests_per_minute: int | None = None
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    write_seconds: float = 30.0
    request_seconds: float | None = None


class RateLimiter:
    """A bucket that refills evenly and holds one minute's worth. None: no limit."""

    def __init__(self, requests_per_minute: int | None, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self._capacity = requests_per_minute
        self._clock = clock
        self._level = float(requests_per_minute or 0)
        self._updated: float | None = None

    def admit(self) -> None:
        """Count a request. Raises ApiError, which says when to come back."""
        if self._capacity is None:
            return
        now = self._clock()
        rate = self._capacity / 60
        elapsed = 0.0 if self._updated is None else now - self._updated
        self._level = min(float(self._capacity), self._level + elapsed * rate)
        self._updated = now
        if self._level < 1:
            seconds = math.ceil((1 - self._level) / rate)
            raise ApiError(
                Kind.TOO_MANY,
                f"Rate limit of {self._capacity} requests a minute reached; "
                f"try again in {seconds} s.",
                code="rate_limit_exceeded",
                type="requests",
                retry_seconds=seconds,
            )
        self._level -= 1
