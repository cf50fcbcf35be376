"""A decode step of the native kernels: recorded once, then made by a single call.

Between two tokens all of a model's weights pass through the processor's caches, so that every call
of Python or torch finds its own code gone: hundreds of them cost a fifth of a small model's token.
So a step in which each request takes one token is computed once with the kernels only recording
(`_native.Program`), on memory of its own. From then on a step is: write what differs, which is the
rows that come in and where they belong (`spans`), and run the program.

What is recorded must consist of native calls alone; what else Python does there happens once.
The recorded calls are those that any other step makes, so a row's bits are the same.
"""

from array import array

import torch

from pipeline import _native
from pipeline.models.batch import Batch
from pipeline.models.kernels import Compute, HeadShape
from pipeline.models.kv_cache import KVCache

# A span is the rows of one slot: (slot, first row, number of rows, first position).
SPAN = 4
POSITION = 3


def spans_of(batch: Batch) -> torch.Tensor:
    """Where a step's rows belong, [segments, SPAN]."""
    spans, offset = array("q"), 0
    for segment in batch:
        spans.extend((segment.slot, offset, segment.num_tokens, segment.position))
        offset += segment.num_tokens
    return torch.frombuffer(spans, dtype=torch.int64).view(-1, SPAN)


class NativeAttention:
    """One step's attention; it reads the spans whenever it is called, or run in a program."""

    def __init__(self, spans: torch.Tensor, shape: HeadShape, max_seq_len: int) -> None:
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
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Append k and v of each row to its slot, then attend."""
        _native.attend(qkv, self._width, out, keys, values, *self._shape)
        return out


class DecodeStep:
    """A step of so many requests over one cache, whose memory its program keeps."""

    def __init__(
        self, compute: Compute, batch: Batch, inputs: torch.Tensor, shape: HeadShape, cache: KVCache
    ) -> None:
        """Record it for batches and inputs like these."""
        spans = spans_of(batch)
        self._spans = spans.numpy()
        self._inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        self._program = _native.Program()
        attention = NativeAttention(spans, shape, cache.capacity)
        with self._program:
            self._hidden = compute(self._inputs, spans[:, POSITION], cache.max_seq_len, attention)

    def __call__(self, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the batch's rows [n, hidden], which nothing later writes to."""
        self._inputs.copy_(inputs)
        for span, segment in zip(self._spans, batch, strict=True):
            span[0], span[POSITION] = segment.slot, segment.position
        self._program.run()
        return self._hidden.clone()
