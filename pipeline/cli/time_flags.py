"""Flags that say how long one waits for what."""

from typing import Annotated

from pydantic import Field

from pipeline.cli.settings import Finite, Flag, Settings
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits

HandshakeTimeoutFlag = Annotated[
    Finite, Field(ge=0.1), Flag("SECONDS", "Patience with who is silent in a handshake.")
]
RequestTimeoutFlag = Annotated[
    Annotated[Finite, Field(ge=0.1)] | None,
    Flag("SECONDS", "For a whole text; then it ends, and nothing else [as long as it takes]."),
]


class StageTimes(Settings):
    """How long a stage waits for its orchestrator and its neighbours."""

    handshake_timeout: HandshakeTimeoutFlag = DEFAULT_TIMES.handshake_seconds
    init_timeout: Annotated[
        Finite, Field(ge=0.1), Flag("SECONDS", "For one to begin its session, if others wait.")
    ] = DEFAULT_TIMES.init_seconds
    idle_timeout: Annotated[
        Finite, Field(ge=1), Flag("SECONDS", "Patience with a silent orchestrator.")
    ] = DEFAULT_TIMES.idle_seconds

    @property
    def limits(self) -> TimeLimits:
        """As a stage takes them."""
        return TimeLimits(
            handshake_seconds=self.handshake_timeout,
            init_seconds=self.init_timeout,
            idle_seconds=self.idle_timeout,
        )
