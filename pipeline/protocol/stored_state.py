"""What home knows of a session's stored keys and values, and tells the stages that stored them."""

from collections.abc import Sequence
from dataclasses import field
from typing import NamedTuple

from transport.frozen import frozen

KEY_BYTES = 32
ROOT_BYTES = 32
SESSION_BYTES = 32
# Most chunks that one order has stored: their roots come back in one message.
MAX_SAVED_CHUNKS = 1024


class Mark(NamedTuple):
    """The end of a stored chunk: the position behind it, and a hash of all that lies before."""

    position: int
    root: bytes


@frozen
class StoredPart:
    """One stage's part of a session: its key, and the last of so many chunks."""

    key: bytes = field(repr=False)
    num_chunks: int
    # Of no root where there is no chunk.
    last: Mark


@frozen
class StoredSlot:
    """A session as stages store it, each a part; `epoch` grows by one with every save."""

    session: bytes
    epoch: int
    parts: Sequence[StoredPart]
