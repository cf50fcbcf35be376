"""The stranger: holds encoded keys and values, and attends to them. It has no key and no weights.

What it is asked comes from the stage that it has authenticated, which may be mistaken all the same.
"""

import numpy as np

from pipeline.dtypes import FLOAT32, HostArray
from pipeline.remote_parts.wire import Message, PartRefusal, to_array, to_tensor
from pipeline.scx.attention_wire import (
    Op,
    Opening,
    Span,
    attend_untrusted,
    op_untrusted,
    opening_untrusted,
    pair_untrusted,
)
from pipeline.scx.rows import EncodedRows, attend
from transport.tensor_frames import Tensor

_FLOAT64 = np.dtype(np.float64)


class AttentionMemory:
    """What all sessions of a worker may hold together; None: whatever the machine gives."""

    def __init__(self, num_bytes: int | None) -> None:
        self._free = num_bytes

    def take(self, num_bytes: int) -> None:
        """Reserve for a session. Raises PartRefusal."""
        if self._free is None:
            return
        if num_bytes > self._free:
            raise PartRefusal(
                f"the session's keys and values may take {num_bytes} bytes, and {self._free} are "
                "left of its memory; ask for less with --context or --max-batch"
            )
        self._free -= num_bytes

    def give(self, num_bytes: int) -> None:
        """Take back what a session had."""
        if self._free is not None:
            self._free += num_bytes


class AttentionWorker:
    """One session's rows, by layer and slot."""

    def __init__(self, memory: AttentionMemory) -> None:
        self._memory = memory
        self._opening: Opening | None = None
        # [keys and values, KV heads, rows, width] of each layer and slot; reserved, not touched
        self._rows: dict[tuple[int, int], HostArray] = {}
        self._held: dict[tuple[int, int], int] = {}

    def answer(self, header: bytes, tensors: tuple[Tensor, ...]) -> Message:
        """What is asked. Raises PartRefusal."""
        arrays = [to_array(each) for each in tensors]
        try:
            return b"", tuple(map(to_tensor, self._answer(header, arrays)))
        except ValueError as error:
            raise PartRefusal(f"what it was asked makes no sense: {error}") from error
        except MemoryError as error:
            raise PartRefusal("its memory is full") from error

    def close(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._held.clear()
        if self._opening is not None:
            self._memory.give(self._opening.num_bytes)
            self._opening = None

    def _answer(self, header: bytes, arrays: list[HostArray]) -> tuple[HostArray, ...]:
        match op_untrusted(header):
            case Op.OPEN:
                return self._open(opening_untrusted(header))
            case Op.ATTEND:
                layer, spans = attend_untrusted(header)
                return self._attend(layer, spans, arrays)
            case Op.TRUNCATE:
                return self._truncate(*pair_untrusted(header))
            case Op.FETCH:
                slot, layer = pair_untrusted(header)
                keys, values = self._place(layer, slot)[:, :, : self._held.get((layer, slot), 0)]
                return keys, values

    def _open(self, opening: Opening) -> tuple[()]:
        if self._opening is not None:
            raise ValueError("a session is opened once")
        self._memory.take(opening.num_bytes)
        self._opening = opening
        return ()

    def _attend(
        self, layer: int, spans: list[Span], arrays: list[HostArray]
    ) -> tuple[HostArray, ...]:
        keys, values, queries = self._checked(spans, arrays)
        outputs = np.empty_like(queries)
        log_sums = np.empty(queries.shape[:2])
        row = query = 0
        for span in spans:
            slot, num_held, num_new, num_queries, stops = span
            place = self._place(layer, slot)
            held, stop = self._held.get((layer, slot), 0), num_held + num_new
            if num_held not in (0, held) or stop > place.shape[2] or max(stops, default=0) > stop:
                raise ValueError(f"slot {slot} holds {held} rows in layer {layer}, not {num_held}")
            place[0, :, num_held:stop] = keys[:, row : row + num_new]
            place[1, :, num_held:stop] = values[:, row : row + num_new]
            self._held[layer, slot] = stop
            row += num_new
            if num_queries:
                asked = np.s_[:, query : query + span.num_asked]
                shape = (len(queries), num_queries, len(stops), -1)
                answer = attend(queries[asked].reshape(shape), EncodedRows(*place), span.segments)
                outputs[asked] = answer.outputs.reshape(len(queries), span.num_asked, -1)
                log_sums[asked] = answer.log_sums.reshape(len(queries), -1)
                query += span.num_asked
        return outputs, log_sums

    def _checked(self, spans: list[Span], arrays: list[HostArray]) -> list[HostArray]:
        """New keys, new values and queries. Raises ValueError for others than the spans say."""
        opening = self._opened()
        num_new = sum(span.num_new for span in spans)
        num_queries = sum(span.num_asked for span in spans)
        shapes = [
            (opening.num_kv_heads, count, opening.width)
            for count in (num_new, num_new, num_queries)
        ]
        if [array.shape for array in arrays] != shapes:
            raise ValueError("its rows are of other shapes")
        keys, values, queries = arrays
        if {keys.dtype, values.dtype} != {FLOAT32} or queries.dtype not in {FLOAT32, _FLOAT64}:
            raise ValueError("its rows are of other kinds of numbers")
        if any(span.num_queries and not span.stops for span in spans):
            raise ValueError("queries that see no row")
        if any(start >= stop for span in spans for start, stop in span.segments):
            raise ValueError("a segment without rows")
        return arrays

    def _truncate(self, slot: int, num_rows: int) -> tuple[()]:
        for layer in range(self._opened().num_layers):
            held = self._held.get((layer, slot), 0)
            if num_rows > held:
                raise ValueError(f"slot {slot} holds {held} rows in layer {layer}")
            if num_rows == 0:
                self._rows.pop((layer, slot), None)
            if held:
                self._held[layer, slot] = num_rows
        return ()

    def _place(self, layer: int, slot: int) -> HostArray:
        opening = self._opened()
        if not (layer < opening.num_layers and slot < opening.num_slots):
            raise ValueError(f"there is no layer {layer} or no slot {slot}")
        place = self._rows.get((layer, slot))
        if place is None:
            shape = (2, opening.num_kv_heads, opening.max_rows, opening.width)
            place = self._rows[layer, slot] = np.zeros(shape, FLOAT32)
        return place

    def _opened(self) -> Opening:
        if self._opening is None:
            raise ValueError("the session has not been opened")
        return self._opening
