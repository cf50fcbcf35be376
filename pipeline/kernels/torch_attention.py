"""Cached attention in plain torch: one scaled_dot_product_attention per request of a step.

Whatever the cache holds, the arithmetic is float32's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.kernels.base import HeadShape
from pipeline.protocol.batch import Batch


@dataclass(frozen=True, slots=True)
class Span:
    """One request's rows in a step: rows offset..offset+count, cache positions start..end.

    `first` is the oldest position it attends to (more than 0 under a sliding window); `mask` is
    [count, end - first], or None where every row sees all of it or the plain triangle.
    """

    slot: int
    offset: int
    count: int
    start: int
    end: int
    first: int
    mask: torch.Tensor | None
    is_causal: bool


class TorchAttention:
    """The spans of one step. Caches are [slots, kv_heads, max_seq, head_dim]."""

    def __init__(self, batch: Batch, shape: HeadShape) -> None:
        self._shape = shape
        self._spans = _make_spans(batch, shape.window)

    def __call__(
        self,
        qkv: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append k and v of each row to its slot, then attend."""
        shape = self._shape
        # [rows, width] -> [rows, heads + 2 kv_heads, head_dim] -> queries, keys, values
        heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
        values_from = shape.num_heads + shape.num_kv_heads
        new_queries, new_values = heads[:, : shape.num_heads], heads[:, values_from:]
        new_keys = heads[:, shape.num_heads : values_from]
        for span in self._spans:
            rows = slice(span.offset, span.offset + span.count)
            slot_keys, slot_values = keys[span.slot], values[span.slot]
            slot_keys[:, span.start : span.end] = to_cache(new_keys[rows].transpose(0, 1), keys)
            slot_values[:, span.start : span.end] = to_cache(
                new_values[rows].transpose(0, 1), values
            )
            out[rows] = _attend_span(
                new_queries[rows],
                slot_keys[:, span.first : span.end].unsqueeze(0).float(),
                slot_values[:, span.first : span.end].unsqueeze(0).float(),
                span,
                sinks,
            )
        return out


def to_cache(rows: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Rows as a cache holds them; what halves have no number for becomes their greatest."""
    if cache.dtype == rows.dtype:
        return rows
    most = torch.finfo(cache.dtype).max
    return rows.clamp(-most, most).to(cache.dtype)


def _make_spans(batch: Batch, window: int) -> list[Span]:
    """Spans of a batch, in the order of its rows."""
    spans, offset = [], 0
    for segment in batch:
        start, count = segment.position, segment.num_tokens
        end = start + count
        first = max(0, start - window + 1) if window else 0
        is_windowed = 0 < window < end
        is_causal = count > 1 and start == 0 and not is_windowed
        mask = None
        if count > 1 and not is_causal:
            mask = _mask(start, end, first, window)
        spans.append(Span(segment.slot, offset, count, start, end, first, mask, is_causal))
        offset += count
    return spans


def _mask(start: int, end: int, first: int, window: int) -> torch.Tensor:
    """0 where query start..end may see key first..end, -inf elsewhere."""
    queries = torch.arange(start, end).unsqueeze(1)
    keys = torch.arange(first, end).unsqueeze(0)
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def _attend_span(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    span: Span,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Shapes: queries [count, heads, head_dim]; keys, values [1, kv_heads, seen, head_dim]."""
    count, num_heads, head_dim = queries.shape
    if sinks is not None:
        hidden = span.mask
        if span.is_causal:
            hidden = _mask(span.start, span.end, span.first, 0).to(queries.device)
        heads = queries.transpose(0, 1).unsqueeze(0)
        mixed = attend_with_sinks(heads, keys, values, hidden, sinks)
        return mixed[0].transpose(0, 1).reshape(count, num_heads * head_dim)
    num_kv_heads = keys.shape[1]
    if count == 1:
        # the heads of a group are rows over the same keys: [1, kv_heads, group, head_dim]
        grouped = queries.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        mixed = F.scaled_dot_product_attention(grouped, keys, values)
        return mixed.reshape(1, num_heads * head_dim)
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),  # [1, heads, count, head_dim]
        keys,
        values,
        attn_mask=span.mask,
        is_causal=span.is_causal,
        enable_gqa=num_heads != num_kv_heads,
    )
    return mixed[0].transpose(0, 1).reshape(count, num_heads * head_dim)


def attend_with_sinks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attention in which each head's sink takes a share as well.

    Shapes: queries [n, heads, count, head_dim]; keys, values [n, kv_heads, seen, head_dim]; mask,
    added to scores, as these or broadcast to them; sinks [heads]; returns as queries.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, 1) for each in (keys, values))
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores + mask
    ends = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, ends), -1).softmax(-1)[..., :-1] @ values
