"""What a server's probes are told: how far it is from computing a token."""

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where a server stands between its start and its end."""

    STARTING = "starting"  # no token could be computed yet; requests wait for that
    READY = "ready"
    RECOVERING = "recovering"  # a stage is lost and being replaced; requests wait for that
    AWAY = "away"  # it has been for too long: requests are refused until it is back
    DRAINING = "draining"  # of one pipeline of several: what runs is finished, others take more
    LEAVING = "leaving"  # told to stop: what runs is finished, and no more is taken


@dataclass(frozen=True, slots=True)
class Awaited:
    """A stage that is not there, and for how long. Never an address or a path: anybody may ask."""

    stage: int
    seconds: float
    # How much of its weights has been read, of how much; None where nobody can tell.
    loaded_bytes: int | None = None
    total_bytes: int | None = None
    problem: str | None = None
    # Which pipeline's it is, where there are several.
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """A server's phase, and the stages that it waits for."""

    phase: Phase
    awaited: tuple[Awaited, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether a request would be served at once."""
        return self.phase is Phase.READY


READY = Readiness(Phase.READY)
