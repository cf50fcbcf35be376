"""What a store of sealed sessions is, wherever it keeps them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import StoreError
from transport.frozen import frozen

if TYPE_CHECKING:  # who only asks for limits carries no ciphers
    from pipeline.sessions.sealing import Chunk

DEFAULT_TTL_SECONDS = 3600.0
DEFAULT_MAX_BYTES = 2 << 30
DEFAULT_MAX_SESSIONS = 10_000


@frozen
class StoreLimits:
    """How long a session is kept that nobody uses, and how much of all of them.

    Over the limits those go first that were used longest ago.
    """

    ttl_seconds: float = DEFAULT_TTL_SECONDS
    max_bytes: int = DEFAULT_MAX_BYTES
    max_sessions: int = DEFAULT_MAX_SESSIONS


@frozen
class StoredSession:
    """What a store can tell of a session: its bytes, its chunks, and when it was last used."""

    name: bytes
    num_bytes: int
    num_chunks: int
    used_at: float


class KVStore(Protocol):
    """Chunks by session and number. Whatever it gives back is held against a seal.

    Everything raises StoreError where the store cannot be used.
    """

    async def write(self, name: bytes, index: int, chunk: "Chunk") -> None:
        """Make this a session's chunk `index`, its last one: what lay there and behind is gone.

        All of it or none, and it is there for good once this returns. Raises MissingChunk when a
        chunk before it is not there.
        """
        ...

    async def read(self, name: bytes, index: int) -> "Chunk | None":
        """A session's chunk, if it is there; the session counts as used."""
        ...

    async def forget(self, name: bytes) -> None:
        """Be rid of a session, if it is there."""
        ...

    async def sessions(self) -> Sequence[StoredSession]:
        """All that are kept, the one used longest ago first."""
        ...


class MissingChunk(StoreError):
    """A chunk cannot be written, since one before it is gone: all of them have to be."""

    def __init__(self) -> None:
        super().__init__("what this would go on from is no longer stored")


class TooLarge(StoreError):
    """A session alone is more than a store may keep."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(f"the session takes {num_bytes} bytes, the store keeps {max_bytes}")


def chunk_bytes(chunk: "Chunk") -> int:
    """Bytes of a chunk's blobs."""
    return sum(map(len, chunk))


def surplus(
    others: Iterable[StoredSession], num_bytes: int, limits: StoreLimits
) -> Iterator[bytes]:
    """Who of the others, in this order, has to go so that a session of so many bytes fits."""
    left = list(others)
    total = num_bytes + sum(each.num_bytes for each in left)
    for index, each in enumerate(left):
        if total <= limits.max_bytes and len(left) - index < limits.max_sessions:
            return
        total -= each.num_bytes
        yield each.name
