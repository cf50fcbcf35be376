"""Decode steps recorded as CUDA graphs: one launch in place of hundreds.

A step in which every request takes one token runs on memory of its own, padded to so many requests
and so long a context, and is recorded once for each such pair. The rows that pad it write to a slot
of the cache that belongs to nobody.

Source: "CUDA Graphs" and "CUDA semantics" in torch's documentation.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.dtypes import HostArray
from pipeline.kernels.base import Compute, HeadShape
from pipeline.kernels.torch_attention import attend_with_sinks, to_cache
from pipeline.kernels.torch_kernels import to_tensor
from pipeline.protocol.batch import Batch


class DecodeAttention:
    """One row for each of `slots` [rows]: the same operations whatever the slots and positions.

    Positions lie below `context`, and so much of every slot is read.
    """

    def __init__(
        self, slots: torch.Tensor, positions: torch.Tensor, context: int, shape: HeadShape
    ) -> None:
        self._slots, self._positions = slots, positions
        self._context, self._shape = context, shape
        seen, last = torch.arange(context, device=slots.device), positions.unsqueeze(1)
        is_seen = seen <= last
        if shape.window:
            is_seen &= seen > last - shape.window
        self._is_seen = is_seen[:, None, None]  # [rows, 1, 1, context]

    def __call__(
        self,
        qkv: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append k and v of each row to its slot, then attend."""
        shape, rows = self._shape, qkv.shape[0]
        values_from = shape.num_heads + shape.num_kv_heads
        heads = qkv.view(rows, -1, shape.head_dim)
        new_keys, new_values = heads[:, shape.num_heads : values_from], heads[:, values_from:]
        keys[self._slots, :, self._positions] = to_cache(new_keys, keys)
        values[self._slots, :, self._positions] = to_cache(new_values, values)
        seen_keys, seen_values = (
            each[:, :, : self._context].index_select(0, self._slots).float()
            for each in (keys, values)
        )
        queries = heads[:, : shape.num_heads]
        if sinks is not None:
            hidden = torch.zeros_like(self._is_seen, dtype=torch.float32)
            hidden = hidden.masked_fill(~self._is_seen, -math.inf)
            mixed = attend_with_sinks(queries.unsqueeze(2), seen_keys, seen_values, hidden, sinks)
            return out.copy_(mixed.reshape(rows, -1))
        # the heads of a group are rows over the same keys: [rows, kv_heads, group, head_dim]
        grouped = queries.reshape(rows, shape.num_kv_heads, -1, shape.head_dim)
        mixed = F.scaled_dot_product_attention(
            grouped, seen_keys, seen_values, attn_mask=self._is_seen
        )
        return out.copy_(mixed.reshape(rows, -1))


class StaticStep:
    """A decode step of at most `rows` requests with contexts of at most `context`."""

    def __init__(
        self,
        compute: Compute,
        example: HostArray,
        *,
        rows: int,
        context: int,
        scratch: int,
        recorder: "Recorder",
    ) -> None:
        """`example`: inputs like those to come; `scratch`: the slot that padding writes to."""
        device = recorder.device
        self._recorder, self._scratch, self._rows = recorder, scratch, rows
        # [slots, positions], [rows]; what the graph reads is changed in place only
        self._places = torch.tensor([[scratch], [0]], device=device).repeat(1, rows)
        dtype = to_tensor(example).dtype
        self._inputs = torch.zeros(rows, *example.shape[1:], dtype=dtype, device=device)

        def step() -> torch.Tensor:
            slots, positions = self._places
            attend = partial(DecodeAttention, slots, positions, context)
            # padded with rows of nobody's, so that nothing recorded may ask whose they are
            result: torch.Tensor = compute((), self._inputs, positions, attend)
            return result

        self._step = recorder.record(step)

    def __call__(self, inputs: HostArray, batch: Batch) -> torch.Tensor:
        """Compute the batch's rows [n, hidden], which nothing later writes to."""
        missing = self._rows - len(batch)
        slots = [segment.slot for segment in batch] + [self._scratch] * missing
        positions = [segment.position for segment in batch] + [0] * missing
        padded = torch.zeros(self._inputs.shape, dtype=self._inputs.dtype)
        padded[: len(batch)] = to_tensor(
            inputs
        )  # zeros below: no request's row lingers in the padding
        self._recorder.refill(self._places, torch.tensor([slots, positions]))
        self._recorder.refill(self._inputs, padded)
        return self._step()[: len(batch)].clone()


class Recorder:
    """The decode steps over one cache by (rows, context); they read its memory and end with it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: dict[tuple[int, int], StaticStep] = {}
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            # Graphs may share memory since one runs at a time and none leaves anything in it.
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """`step` as one launch; its result is the same memory every time.

        It runs once before, so that libraries allocate and choose what they then keep.
        """
        if not self._is_gpu:
            return step
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = step()
        return partial(_replay, graph, result, step)

    def refill(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a host's tensor over one on the device, behind all that reads the old one."""
        # Pinned memory is not handed out again before its copies are done.
        target.copy_(source.pin_memory() if self._is_gpu else source, non_blocking=True)


def _replay(
    graph: torch.cuda.CUDAGraph, result: torch.Tensor, step: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Run a recorded step; holding `step` keeps alive what the graph reads."""
    del step
    graph.replay()
    return result
