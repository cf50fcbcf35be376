"""A door whose every failure is a refusal that its client may read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    Door,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
)

logger = logging.getLogger(__name__)


class GuardedDoor:
    """Tells the log what kind any other failure than a refusal is; its text may quote content."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one step of a session. Raises DoorError."""
        with _only_refusals("infer"):
            return await self._door.infer(request)

    async def attest(self, request: AttestRequest) -> AttestResponse:
        """Show which key to seal to. Raises DoorError."""
        with _only_refusals("attest"):
            return await self._door.attest(request)


@contextmanager
def _only_refusals(call: str) -> Iterator[None]:
    try:
        yield
    except DoorError as error:
        logger.debug("event=door_refused call=%s fault=%s", call, error.fault.value)
        raise
    except Exception as error:
        logger.error("event=door_failed call=%s error=%s", call, type(error).__name__)
        raise DoorError(DoorFault.UNAVAILABLE, "the door failed; try again") from None
