"""A decode step of the native kernels: recorded once, then made by a single call.

Between two tokens all of a model's weights pass through the processor's caches, so that whatever
Python runs next finds its own code gone: a call costs tens of microseconds, and hundreds
of them a fifth of a small model's token. So a step in which each request takes one token is
computed once with the kernels only recording (`_native.Program`). From then on it is one call: rows
in as they came over the wire, rows or tokens out, and between them nothing but the kernels.

What is recorded must consist of native calls alone; what else Python does there happens once.
The recorded calls are those that any other step makes, so a row's bits are the same.
"""

from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.dtypes import FLOAT32, Floats, HostArray
from pipeline.kernels import _native
from pipeline.kernels.base import FramePlace, HeadShape, Rows, Serve, StepWork
from pipeline.kernels.huge_pages import aligned
from pipeline.kernels.kv_cache import KVCache
from pipeline.protocol.batch import Batch, Segment

# A span is the rows of one slot: (slot, first row, number of rows, first position).
SPAN = 4
POSITION = 3
# What the segments of a served step may want: a token of those with logits, their row, or whatever
# comes with no tensor of its own. As a header has it: the result, and in the upper half how many
# rows.
ANY, TOKEN, ROW = 0, 1 << 16 | 1, 1 << 16 | 3


def spans_of(batch: Batch) -> HostArray:
    """Where a step's rows belong, [segments, SPAN]."""
    spans, offset = array("q"), 0
    for segment in batch:
        spans.extend((segment.slot, offset, segment.num_tokens, segment.position))
        offset += segment.num_tokens
    return np.frombuffer(spans, np.int64).reshape(-1, SPAN)


class NativeAttention:
    """One step's attention; it reads the spans whenever it is called, or run in a program."""

    def __init__(self, spans: HostArray, shape: HeadShape, max_seq_len: int) -> None:
        self._width = shape.qkv_width
        self._shape = (
            spans,
            len(spans),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            max_seq_len,
            shape.window,
        )

    def __call__(
        self,
        qkv: Floats,
        keys: Floats,
        values: Floats,
        out: Floats,
        sinks: Floats | None = None,
    ) -> Floats:
        """Append k and v of each row to its slot, then attend."""
        _native.attend(qkv, self._width, out, keys, values, *self._shape, keys.itemsize, sinks)
        return out


class _Placed(Sequence[Segment]):
    """The batch of whichever step is made: what is recorded lasts longer than one."""

    def __init__(self, spans: HostArray) -> None:
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as the base class's, in one
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        slot, _, count, position = self._spans[index].tolist()
        return Segment(slot, position, count)


class NativeStep:
    """A step of so many requests over one cache; its program keeps the memory it works on."""

    def __init__(self, work: StepWork, batch: Batch) -> None:
        """Record it for batches like this."""
        count, spans, cache = len(batch), spans_of(batch), work.cache
        attend = partial(NativeAttention, spans, max_seq_len=cache.capacity)
        self.logits: Floats | None = None
        self._program = _native.Program()
        with self._program:
            if work.width is None:
                rows = np.empty(count, np.uint32)
                inputs = np.empty(count, np.int64)
                _native.widen(rows, inputs, count)
            else:
                rows = inputs = aligned(np.empty, (count, work.width), FLOAT32)
            outputs = work.compute(_Placed(spans), inputs, spans[:, POSITION], attend)
            if work.finish is not None:
                chosen, self.logits = work.finish(outputs)
                outputs = np.empty(count, np.uint32)
                _native.narrow(chosen, outputs, count)
        self._program.connect(spans, count, rows, rows.nbytes, outputs, outputs.nbytes)

    def __call__(self, batch: Batch, rows: Rows) -> bytearray:
        """Compute the step: U32 [n] or F32 [n, hidden] in, F32 [n, hidden] or U32 [n] out."""
        return self._program.step(batch, rows)

    def server(
        self, form: FramePlace, out: FramePlace, cache: KVCache, *, all_rows: bool = False
    ) -> Serve:
        """What computes the steps of frames like `form`, and lays out those that go on in `out`."""
        want = TOKEN if self.logits is not None else ROW if all_rows else ANY
        ledger = cache.ledger
        lengths = (ledger.held, ledger.rows, ledger.reach)
        return partial(self._program.serve, *form, *out, *lengths, want)
