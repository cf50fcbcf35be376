"""What home knows of a session's stored keys and values, and tells the stages that stored them."""

from typing import NamedTuple

KEY_BYTES = 32
ROOT_BYTES = 32


class Mark(NamedTuple):
    """The end of a stored chunk: the position behind it, and a hash of all that lies before."""

    position: int
    root: bytes
