"""One step's attention in one layer, as home asks for it and reads what is answered."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from pipeline.dtypes import FLOAT32, Array, HostArray
from pipeline.errors import SessionError
from pipeline.kernels.base import HeadShape, Kernels
from pipeline.protocol.batch import Batch, Segment, first_rows
from pipeline.scx.attention_wire import Span
from pipeline.scx.errors import ScxError
from pipeline.scx.held_rows import HeldRows
from pipeline.scx.rows import Answer, EncodedRows


class Parts(Protocol):
    """What a step has to know of its session: `AttentionParts`."""

    heads: HeadShape

    @property
    def kernels(self) -> Kernels:
        """What layers are computed with."""
        ...

    def held(self, slot: int, layer: int, *, is_new: bool) -> HeldRows:
        """What is known of a slot's rows."""
        ...

    def ask(
        self, layer: int, spans: list[Span], rows: list[EncodedRows], queries: list[HostArray]
    ) -> tuple[HostArray, HostArray]:
        """What is asked of all spans together."""
        ...

    def say(
        self,
        layer: int,
        spans: list[Span],
        rows: tuple[HostArray, HostArray, HostArray],
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[HostArray, HostArray]:
        """One question of a layer."""
        ...


class Asking:
    """One step's attention in one layer."""

    def __init__(self, parts: Parts, layer: int, batch: Batch) -> None:
        self._parts = parts
        self._layer = layer
        self._batch = batch

    def __call__(
        self, qkv: Array, keys: Array, values: Array, out: Array, sinks: Array | None = None
    ) -> Array:
        """Send what is new, and attend to that and to what was held before."""
        assert sinks is None, "models with these are refused"
        del keys, values
        self._parts.kernels.call(partial(self._attend, qkv, out))
        return out

    def _attend(self, qkv: Array, out: Array) -> None:
        parts, heads = self._parts, self._parts.heads
        slot, position, _ = self._batch[0]
        if position and len(qkv) == 1 and isinstance(qkv, np.ndarray):
            held = parts.held(slot, self._layer, is_new=False)
            if held.codec.turns is not None:
                self._attend_row(slot, held, qkv, out)
                return
        (rows,) = parts.kernels.to_host(qkv)
        width, num_groups = heads.head_dim, heads.num_heads // heads.num_kv_heads
        split = rows.reshape(len(rows), -1, width).transpose(1, 0, 2)  # [heads, rows, head_dim]
        texts = [
            _Text(parts, self._layer, segment, split[:, first : first + segment.num_tokens])
            for segment, first in zip(self._batch, first_rows(self._batch), strict=True)
        ]
        asking = [text.asked for text in texts if text.asked is not None]
        answered = parts.ask(
            self._layer, [text.span for text in texts], [text.rows for text in texts], asking
        )
        at, outputs = 0, []
        for text in texts:
            part = np.s_[:, at : at + text.span.num_asked]
            at += text.span.num_asked
            outputs.append(text.read(*(each[part] for each in answered)))
        # [KV heads, rows * groups, head_dim] each -> [rows, heads * head_dim]
        shape = (heads.num_kv_heads, -1, num_groups, width)
        parted = [each.reshape(shape) for each in outputs]
        mixed = parted[0] if len(parted) == 1 else np.concatenate(parted, 1)
        mixed = mixed.transpose(1, 0, 2, 3).reshape(len(rows), -1)
        out[...] = parts.kernels.to_device(np.ascontiguousarray(mixed, FLOAT32))

    def _attend_row(self, slot: int, held: HeldRows, qkv: HostArray, out: HostArray) -> None:
        """The same for a row behind others, which products alone encode: that is mostly so."""
        heads, turn = self._parts.heads, self._parts.kernels.turn
        width, kv_heads = heads.head_dim, heads.num_kv_heads
        num_groups = heads.num_heads // kv_heads
        keys_from, values_from = heads.num_heads * width, (heads.num_heads + kv_heads) * width
        assert held.codec.turns is not None, "asked before"
        by_keys, by_values, back = held.codec.turns
        turn(qkv[:, :keys_from], by_keys, num_groups, width**-0.5)
        turn(qkv[:, keys_from:values_from], by_keys)
        turn(qkv[:, values_from:], by_values)
        queries, keys, values = (
            each.reshape(kv_heads, -1, width)
            for each in (
                qkv[0, :keys_from], qkv[0, keys_from:values_from], qkv[0, values_from:],
            )
        )  # fmt: skip
        rows = EncodedRows(keys, values)
        num_held = held.receipt.num_rows
        span = Span(slot, num_held, 1, num_groups, (num_held + 1,))
        outputs, log_sums = self._parts.say(
            self._layer, [span], (keys, values, queries), partial(held.add, rows)
        )
        held.check(Answer(outputs[:, :, None], log_sums[:, :, None]))
        out[0] = outputs.reshape(-1)
        turn(out, back, num_groups)


class _Text:
    """One segment of a step in a layer: what is asked of it, and what comes of that."""

    def __init__(self, parts: Parts, layer: int, segment: Segment, qkv: HostArray) -> None:
        """qkv: [heads + 2 KV heads, rows, head_dim], after RoPE."""
        slot, position, num_tokens = segment
        heads = parts.heads
        self._num_tokens = num_tokens
        self._held = parts.held(slot, layer, is_new=position == 0)
        values_from = heads.num_heads + heads.num_kv_heads
        q, k, v = qkv[: heads.num_heads], qkv[heads.num_heads : values_from], qkv[values_from:]
        shape = (heads.num_kv_heads, -1, num_tokens, heads.head_dim)
        # [KV heads, rows * groups, head_dim]
        queries = q.reshape(shape).swapaxes(1, 2).reshape(heads.num_kv_heads, -1, heads.head_dim)
        self._queries = queries * np.float32(heads.head_dim**-0.5)
        self._new = k, v
        # A lone row behind others is attended to where these are. Rows that come together see each
        # other here: whoever holds them does not know their order.
        self._is_joined = num_tokens > 1 or position == 0
        before = None if position == 0 else self._held.receipt
        num_held, self.rows = self._held.append(k, v)
        self._receipt = before if self._is_joined else self._held.receipt
        num_new = self.rows.num_rows
        self.asked = None
        self.span = Span(slot, num_held, num_new, 0)
        if self._receipt is not None:
            codec = self._held.codec
            self.asked = codec.ask(self._queries, self._receipt)
            stops = tuple(stop for _, stop in codec.segments(self._receipt))
            self.span = Span(slot, num_held, num_new, self._queries.shape[1], stops)

    def read(self, outputs: HostArray, log_sums: HostArray) -> HostArray:
        """Answers for each query and segment -> [KV heads, rows * groups, head_dim].

        Raises AnswerRefused, SessionError.
        """
        if self.asked is None:
            return self._own()[0]
        assert self._receipt is not None, "there are rows before"
        shape = self.asked.shape
        answer = Answer(outputs.reshape(shape), log_sums.reshape(shape[:3]))
        self._held.check(answer)
        try:
            outputs, log_sums = self._held.codec.share(answer, self.asked, self._receipt)
        except ScxError as error:  # another session draws other decoys
            raise SessionError(str(error)) from error
        if not self._is_joined:
            return outputs
        own, own_sums = self._own()
        share = 1 / (1 + np.exp(own_sums - log_sums))[..., None]
        joined: HostArray = share * outputs + (1 - share) * own
        return joined

    def _own(self) -> tuple[HostArray, HostArray]:
        """What the new rows give each other, and the log of their sums: each sees those before."""
        keys, values = self._new
        num_groups = self._queries.shape[1] // self._num_tokens
        scores = self._queries @ keys.mT  # [KV heads, rows * groups, rows]
        later = np.triu(np.ones((self._num_tokens, self._num_tokens), bool), 1)
        scores[:, np.repeat(later, num_groups, 0)] = -np.inf
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        sums = weights.sum(-1, keepdims=True)
        mixed: HostArray = weights @ values / sums
        return mixed, (top + np.log(sums))[..., 0].astype(np.float64)
