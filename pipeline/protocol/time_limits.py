"""How long one waits for what, and how a peer that is not up is tried again: one value for both."""

import math
from dataclasses import field

from pipeline.errors import InputError
from transport.frozen import frozen
from transport.retries import RetryPolicy

__all__ = ["DEFAULT_TIMES", "RetryPolicy", "TimeLimits"]


@frozen(kw_only=True)
class TimeLimits:
    """Durations in seconds. Raises InputError for what is none.

    `connect_seconds`: for stages that are not up nor come nearer. `handshake_seconds`: for a peer
    whose turn it is in a handshake. `init_seconds`: for an orchestrator that is connected and has
    not begun its session, where another one waits. `idle_seconds`: for a peer that says nothing in
    a session, or a stage with steps under way of which none moves. `request_seconds`: for a whole
    text, after which it ends and nothing else does; None: as long as it takes. `retry`: how peers
    that are not up are dialed again.
    """

    connect_seconds: float = 30.0
    handshake_seconds: float = 10.0
    init_seconds: float = 60.0
    idle_seconds: float = 60.0
    request_seconds: float | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        """Check what cannot be right."""
        for name in ("connect", "handshake", "init", "idle", "request"):
            seconds = getattr(self, f"{name}_seconds")
            if seconds is not None and not (0 < seconds < math.inf):
                raise InputError(f"{name}_seconds is {seconds}; give a number above 0")


DEFAULT_TIMES = TimeLimits()
