"""What a client says of a door far away that fails, or answers what it should not."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.doors.messages import DoorError
from pipeline.errors import SessionError

_MAX_TEXT = 300


@contextmanager
def reading_answers_of(door: str) -> Iterator[None]:
    """What raises DoorError meanwhile is what the door sent. Raises SessionError instead."""
    try:
        yield
    except DoorError as error:
        raise SessionError(f"{door} answers what cannot be read: {error}") from error


def unreachable(door: str, error: BaseException) -> SessionError:
    """The network's failure in words."""
    cause = error
    # Libraries wrap what the system or TLS said, some without naming it as their cause.
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    reason = getattr(cause, "verify_message", None) or getattr(cause, "strerror", None)
    return SessionError(f"cannot reach {door}: {reason or str(cause) or type(cause).__name__}")


def brief(text: object) -> str:
    """What a door says, at a length that a line can have."""
    return str(text)[:_MAX_TEXT]
