"""How a dialect tells of one answer: events while it comes, or all of it at its end."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from pipeline.gateway.continuations import TextPiece
from pipeline.gateway.errors import ApiError

# One message of a stream, as JSON.
Event = Mapping[str, Any]


class Telling(Protocol):
    """One answer's; sans-IO. Calls come in this order, of the last two the one or the other."""

    def begin(self) -> Iterator[Event]:
        """What comes before any text."""
        ...

    def more(self, piece: TextPiece) -> Iterator[Event]:
        """What the next piece adds."""
        ...

    def end(self) -> Iterator[Event]:
        """What comes last."""
        ...

    def fail(self, error: ApiError) -> Iterator[Event]:
        """What comes last of an answer that will not be whole."""
        ...

    def whole(self) -> Event:
        """All of an answer that has ended, for who wants no stream."""
        ...
