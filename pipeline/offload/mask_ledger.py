"""Which masks have been given out: none twice, whatever is killed, however many draw at once.

Attack: a mask that hides two rows hides neither, since their difference is seen in the clear. So
masks count as used, on disk, before anybody is told which they are: whoever dies between drawing
and using them has wasted them, and nobody gets them again.
"""

import fcntl
import os
import struct

from pipeline.offload.errors import MasksSpent, MasksUnusable

_COUNT = struct.Struct("<Q")


class MaskLedger:
    """How many of a file's masks are used up: a number in the file itself, which goes with it."""

    def __init__(self, descriptor: int, place: int, num_masks: int) -> None:
        """`place`: where in the open file the number is."""
        self._descriptor, self._place, self._num_masks = descriptor, place, num_masks

    @property
    def num_left(self) -> int:
        """How many nobody has drawn yet."""
        return self._num_masks - self._used()

    def reserve(self, count: int) -> range:
        """The next masks, which are nobody else's any more. Raises MasksSpent, MasksUnusable."""
        try:
            # Others who have opened the file wait; who dies lets go.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                return self._reserve(count)
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        except OSError as error:
            raise MasksUnusable(
                f"cannot note which masks are used, so none is: {error.strerror}"
            ) from error

    def _reserve(self, count: int) -> range:
        first = self._used()
        if count > self._num_masks - first:
            raise MasksSpent(
                f"{max(self._num_masks - first, 0)} of {self._num_masks} masks are left and "
                f"{count} are needed: make a new file of them with `pipeline-orch masks make`"
            )
        os.pwrite(self._descriptor, _COUNT.pack(first + count), self._place)
        os.fdatasync(self._descriptor)
        return range(first, first + count)

    def _used(self) -> int:
        (used,) = _COUNT.unpack(os.pread(self._descriptor, _COUNT.size, self._place))
        return int(used)
