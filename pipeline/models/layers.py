"""What both families share: a step's spans and masks, cached attention, rotary positions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.models.batch import Batch
from pipeline.models.config import LlamaConfig, RopeScaling


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


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward share; `rope` is (cos, signed sin): [rows, 1, head_dim]."""

    spans: Sequence[Span]
    positions: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor] | None = None


def make_spans(batch: Batch, window: int | None, dtype: torch.dtype) -> list[Span]:
    """Spans of a batch, in the order of its rows."""
    spans, offset = [], 0
    for segment in batch:
        start, count = segment.position, segment.num_tokens
        end = start + count
        first = 0 if window is None else max(0, start - window + 1)
        is_windowed = window is not None and end > window
        is_causal = count > 1 and start == 0 and not is_windowed
        mask = None
        if count > 1 and not is_causal:
            mask = _mask(start, end, first, window).to(dtype)
        spans.append(Span(segment.slot, offset, count, start, end, first, mask, is_causal))
        offset += count
    return spans


def _mask(start: int, end: int, first: int, window: int | None) -> torch.Tensor:
    """0 where query start..end may see key first..end, -inf elsewhere."""
    queries = torch.arange(start, end).unsqueeze(1)
    keys = torch.arange(first, end).unsqueeze(0)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def batch_positions(batch: Batch) -> torch.Tensor:
    """Position of every row, [rows]."""
    if len(batch) == 1:
        segment = batch[0]
        return torch.arange(segment.position, segment.position + segment.num_tokens)
    return torch.cat([torch.arange(s.position, s.position + s.num_tokens) for s in batch])


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: Sequence[Span],
    cached_keys: torch.Tensor,
    cached_values: torch.Tensor,
) -> torch.Tensor:
    """Append keys and values to the cache, then attend each span to its own slot.

    Shapes: queries [rows, heads, head_dim]; keys, values [rows, kv_heads, head_dim]; cached
    [slots, kv_heads, max_seq, head_dim]. Returns [rows, heads * head_dim].
    """
    outputs = []
    for span in spans:
        rows = slice(span.offset, span.offset + span.count)
        slot_keys, slot_values = cached_keys[span.slot], cached_values[span.slot]
        slot_keys[:, span.start : span.end].copy_(keys[rows].transpose(0, 1))
        slot_values[:, span.start : span.end].copy_(values[rows].transpose(0, 1))
        outputs.append(
            _attend_span(
                queries[rows],
                slot_keys[:, span.first : span.end].unsqueeze(0),
                slot_values[:, span.first : span.end].unsqueeze(0),
                span,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_span(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span
) -> torch.Tensor:
    """Shapes: queries [count, heads, head_dim]; keys, values [1, kv_heads, seen, head_dim]."""
    count, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    if count == 1:
        # the heads of a group are rows over the same keys: [1, kv_heads, group, head_dim]
        grouped = queries.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
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


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    ramp = (context / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < context / high, frequencies, scaled)


def rope_rows(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, signed sin) of each row, [rows, 1, head_dim]; the first half of sin is negated."""
    angles = torch.outer(positions.float(), frequencies).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def apply_rope(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each (j, j + head_dim/2) pair of x [rows, heads, head_dim]."""
    cos, signed_sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)
