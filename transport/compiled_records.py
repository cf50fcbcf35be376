"""Single records between socket and plaintext: one compiled call each, or none.

What an inlet or an outlet does not do is left to the record layer's ordinary way: without a
compiled one, all but the waiting.
"""

from typing import TYPE_CHECKING

from transport.frame_stream import PlainBuffer
from transport.nonblocking_socket import Wire
from transport.record_counters import IS_COMPILED
from transport.records import RecordOpener, RecordReader, RecordSealer


class PlainInlet:
    """Waits and takes what comes; opens nothing."""

    def __init__(
        self, wire: Wire, reader: RecordReader, _opener: RecordOpener, _buffer: PlainBuffer
    ) -> None:
        self._wire = wire
        self._reader = reader

    def receive(self, patience_ms: int) -> memoryview | None:
        """Wait that long at most. Received bytes are in the reader. Raises: ConnectionLost."""
        if self._wire.has_come(patience_ms):
            self._reader.wrote(self._wire.try_receive(self._reader.space()))
        return None


class PlainOutlet:
    """Seals and sends nothing."""

    def __init__(self, _wire: Wire, _sealer: RecordSealer, _room: int) -> None:
        pass

    def send(self, _plain: memoryview) -> memoryview | None:
        """Return None: nothing has been sealed."""
        return None


if TYPE_CHECKING or IS_COMPILED:
    from transport._native import Inlet, Outlet
else:
    Inlet, Outlet = PlainInlet, PlainOutlet

__all__ = ["Inlet", "Outlet"]
