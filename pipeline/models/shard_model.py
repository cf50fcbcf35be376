"""The part of a shard that no architecture changes: its range, its names, its cache, its step."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from pipeline.dtypes import FLOAT32, KV_DTYPES, Array, Floats, HostArray, Precision
from pipeline.errors import InputError, MessageError
from pipeline.kernels.base import (
    Attend,
    DecodeStep,
    HeadShape,
    Kernels,
    Linear,
    Norm,
    Rows,
    StepWork,
)
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.kv_storage import LayerKV, kv_bytes
from pipeline.kernels.session_memory import KeptSlots
from pipeline.models.ends import Ends, Names
from pipeline.models.layer_parts import OWN, LayerMaker, LayerParts, Overlap
from pipeline.models.model_config import ModelConfig
from pipeline.models.own_embedding import Embedding
from pipeline.models.rope import Angles
from pipeline.models.window_check import check_window
from pipeline.models.workspace import ForwardPass, Room, round_up
from pipeline.protocol.batch import Batch, Segment, first_rows, num_tokens, positions_of
from pipeline.protocol.tide_window import TideWindow
from pipeline.weights.quantization import ends_precision
from pipeline.weights.tensor_sinks import Sink
from transport.frozen import frozen

LOGIT_ROWS = 64  # as many as are expected of a step


class Layer(Protocol):
    """One decoder layer."""

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""

    def __call__(self, hidden: Array, step: ForwardPass, keys: Array, values: Array) -> None:
        """Transform hidden [rows, hidden] in place, appending to this layer's cache."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""


@frozen
class ShardSpec:
    """Which part of a model is held, what computes it and in which precision."""

    layers: range
    kernels: Kernels
    precision: Precision
    parts: LayerParts = OWN
    # None: those that the range of layers reaches.
    ends: Ends | None = None


class Shard(ABC):
    """A range of a decoder's layers, with the embedding first and the head last."""

    # Whether all of a step is a fixed sequence of calls, which kernels may record.
    has_fixed_steps: bool = True

    def __init__(
        self,
        config: ModelConfig,
        spec: ShardSpec,
        names: Names,
        *,
        is_gated: bool,
        has_head_bias: bool = False,
    ) -> None:
        self.config: ModelConfig = config
        self.names = names
        self.layer_start, self.layer_end = spec.layers.start, spec.layers.stop
        reached = Ends(self.layer_start == 0, self.layer_end == config.num_layers)
        self.is_first, self.is_last = reached if spec.ends is None else spec.ends
        self.kernels = kernels = spec.kernels
        self.precision: Precision = spec.precision
        self.parts = spec.parts
        shapes = [config.shape(index) for index in spec.layers]
        # The different ones, and which of them each layer has.
        self._shapes = list(dict.fromkeys(shapes))
        self._shape_of = [self._shapes.index(each) for each in shapes]
        ropes = [each.rope for each in self._shapes]
        self._angles = Angles(ropes, kernels, config.head_dim, config.max_positions)
        self._make = LayerMaker(
            kernels, spec.precision, spec.parts, int8_linears=frozenset(config.int8_linears)
        )
        self._kv_dtype = KV_DTYPES[spec.precision]
        size, hidden, inner = config.vocab_size, config.hidden_dim, config.intermediate_size
        at_ends = ends_precision(spec.precision)
        self._head = (
            replace(self._make, precision=at_ends).linear(
                names.head, hidden, size, bias=has_head_bias
            )
            if self.is_last
            else None
        )
        # where embedding and head are one matrix in one stage it is held once, as the head
        is_shared = self.is_first and self.is_last and config.tie_word_embeddings
        self._embedding = (
            Embedding(size, hidden, kernels=kernels, precision=at_ends)
            if self.is_first and not is_shared
            else None
        )
        heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self._new_room = partial(Room, kernels, heads, hidden, inner, 2 * inner if is_gated else 0)
        self._room = self._new_room()
        # The same layers with room of their own, for halves of a step side by side.
        self._others: list[Shard] = []
        self._logits: Array = kernels.empty(0, size)

    @property
    @abstractmethod
    def _layers(self) -> Sequence[Layer]:
        """This shard's layers, under the name its checkpoints give them."""

    @property
    @abstractmethod
    def _norm(self) -> Norm | None:
        """The norm in front of the head, on the last stage."""

    def _place(self, hidden: Array, positions: Array) -> None:  # noqa: B027 - by default there is nothing
        """Tell embedded rows where they stand, where layers are not told so by rotary angles."""

    def layer_makers(self) -> Iterator[LayerMaker]:
        """What makes each of this shard's layers, first to last."""
        for index in range(self.layer_start, self.layer_end):
            yield replace(self._make, prefix=f"{self.names.layers}.{index}.")

    @property
    def has_decode_steps(self) -> bool:
        """Whether `decode` may be called: whether kernels can record all of a step."""
        return self.kernels.has_decode_steps and self._is_recordable

    @property
    def _is_recordable(self) -> bool:
        parts = self.parts
        is_fixed = parts.are_recordable or (parts.are_calls and self.kernels.has_decode_steps)
        return self.has_fixed_steps and is_fixed

    def decodes(self, count: int) -> bool:
        """Whether `decode` may be called for so many segments."""
        return self.has_decode_steps and (count == 1 or self.parts.overlap is None)

    @property
    def is_row_exact(self) -> bool:
        """Whether a row depends on itself and its own cache alone, bit for bit."""
        return self.kernels.is_row_exact and self.parts.are_row_exact

    def destinations(self) -> Mapping[str, Sink]:
        """Tensor name in the checkpoint (unprefixed) -> where it goes."""
        found: dict[str, Sink] = {}
        names = self.names
        if self._embedding is not None:
            found |= self._embedding.sinks(f"{names.embedding}.weight")
        if self._head is not None:
            found |= self._head.sinks(
                names.embedding if self.config.tie_word_embeddings else names.head
            )
        for index, layer in enumerate(self._layers, self.layer_start):
            prefix = f"{names.layers}.{index}."
            found |= {prefix + name: sink for name, sink in layer.sinks().items()}
        if self._norm is not None:
            found |= self._norm.sinks(names.norm)
        return found

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of this shard's weights in memory."""
        ends = (self._embedding, self._head, self._norm)
        return sum(each.num_bytes for each in (*self._layers, *ends) if each is not None)

    def kv_bytes(self, num_slots: int, max_seq_len: int) -> int:
        """What a cache of that size would reserve."""
        num_layers = self.layer_end - self.layer_start if self.parts.are_cached_here else 0
        slots, block = num_slots + self.kernels.scratch_slots, self.kernels.key_block
        config = self.config
        return num_layers * kv_bytes(
            slots, config.num_kv_heads, max_seq_len, config.head_dim, block, self._kv_dtype
        )

    def step_bytes(self, num_rows: int) -> int:
        """About what a step of that many rows takes beside weights and caches, at its widest."""
        logits = LOGIT_ROWS * self.config.vocab_size if self.is_last else 0
        return self._room.num_bytes(num_rows) + logits * FLOAT32.itemsize

    def check_window(self, window: TideWindow) -> None:
        """Raises InputError saying why this model cannot be served so, if it cannot."""
        if not self.parts.attend_in_cache:
            raise InputError("a window moves cached keys, which what attends here does not know of")
        check_window(window, self.config, self._angles.frequencies(window.size))

    def new_cache(
        self,
        num_slots: int,
        max_seq_len: int,
        window: TideWindow | None = None,
        kept: KeptSlots | None = None,
    ) -> KVCache:
        """A cache for this shard's layers, empty but for `kept` slots. Raises MemoryError."""
        own = partial(
            KVCache,
            self.kernels,
            num_layers=self.layer_end - self.layer_start,
            num_slots=num_slots,
            num_kv_heads=self.config.num_kv_heads,
            max_seq_len=max_seq_len,
            head_dim=self.config.head_dim,
            key_block=self.kernels.key_block,
            scratch_slots=self.kernels.scratch_slots,
            dtype=self._kv_dtype,
            window=window,
            frequencies=None if window is None else self._angles.frequencies(window.size),
            kept=kept,
        )
        self._angles.prepare(max_seq_len)
        self.parts.prepare(self)
        return self.parts.cache(own, num_slots, max_seq_len)

    def keys_and_values(self, token_ids: HostArray) -> list[LayerKV]:
        """Of a text, in each layer of a first stage, as the kernels' own attention has them."""
        plain = copy.copy(self)
        plain.parts, plain._room = OWN, self._new_room()
        cache = plain.new_cache(1, len(token_ids))
        plain.forward(token_ids, (Segment(0, 0, len(token_ids)),), cache)
        return cache.export(0, range(len(token_ids)))

    def forward(self, inputs: HostArray, batch: Batch, cache: KVCache) -> Array:
        """Run a step's rows through the shard's layers and append them to the cache.

        Shapes: inputs [rows] int64 token ids on the first stage, else [rows, hidden], a host's;
        returns [rows, hidden], the caller's own, where the kernels compute. Rows follow each other
        as the batch's segments do. Raises MessageError when the batch does not fit the inputs or
        the cache.
        """
        rows = num_tokens(batch)
        if inputs.shape[0] != rows or not batch:
            raise MessageError(f"a step of {rows} tokens came with {inputs.shape[0]} rows")
        cache.reserve(batch)
        parts, overlap = cache.parts(batch), self.parts.overlap
        if len(parts) == 1 and (overlap is None or len(batch) == 1):
            return self._forward(inputs, batch, cache)
        starts = dict(zip((each.slot for each in batch), first_rows(batch), strict=True))
        hidden = self.kernels.empty(rows, self.config.hidden_dim)
        if len(parts) == 1 and overlap is not None:
            self._forward_side_by_side(inputs, batch, cache, hidden, overlap)
            return hidden
        for part in parts:
            places = []
            for slot, _, count in part:
                places.append(slice(starts[slot], starts[slot] + count))
                starts[slot] += count
            outputs = self._forward(np.concatenate([inputs[each] for each in places]), part, cache)
            for place, first in zip(places, first_rows(part), strict=True):
                hidden[place] = outputs[first : first + place.stop - place.start]
        return hidden

    def _forward_side_by_side(
        self, inputs: HostArray, batch: Batch, cache: KVCache, out: Array, overlap: Overlap
    ) -> None:
        """Two halves of a step, each with room of its own."""
        if not self._others:
            self._others.append(copy.copy(self))
            self._others[0]._room = self._new_room()
        middle = len(batch) // 2
        row = num_tokens(batch[:middle])
        works = [
            partial(self._forward, inputs[:row], batch[:middle], cache),
            partial(self._others[0]._forward, inputs[row:], batch[middle:], cache),
        ]
        out[:row], out[row:] = overlap(works)

    def _forward(self, inputs: HostArray, part: Batch, cache: KVCache) -> Array:
        """A step, or a part of one, for which each slot drops rows before it or not at all."""
        placed = self._placed(part, cache)
        compute = partial(self._compute, cache.keys, cache.values, cache.ledger.max_rows)
        work = StepWork(compute, cache, is_recordable=self._is_recordable)
        hidden = self.kernels.run(work, inputs, placed)
        cache.advance(part)
        return hidden

    def _placed(self, part: Batch, cache: KVCache) -> Batch:
        """Where a part's rows lie, with the angles there; recorded steps hear how far these go."""
        placed, ledger = cache.place(part), cache.ledger
        end = max(segment.position + segment.num_tokens for segment in placed)
        ledger.reach[0] = min(ledger.max_rows, self._angles.reach(ledger.max_rows, end))
        return placed

    def decode(self, rows: Rows, batch: Batch, cache: KVCache) -> tuple[bytearray, Floats | None]:
        """Run a step of one token for each segment from the wire to the wire.

        Only where it `decodes` so many. Shapes: rows U32 [n] token ids on the first stage,
        else F32 [n, hidden]; returns such rows, and from the last stage U32 [n] greedy tokens, with
        logits that the next step overwrites. Raises MessageError when the batch does not fit the
        cache, ValueError when the rows do not fit the batch or an id the vocabulary.
        """
        if num_tokens(batch) != len(batch):
            raise MessageError(f"a decode step of {num_tokens(batch)} tokens for {len(batch)}")
        cache.reserve(batch)
        placed = self._placed(batch, cache)
        step = cache.recordings.get(len(batch), partial(self._decode_step, placed, cache))
        outputs = step(placed, rows)
        cache.advance(batch)
        return outputs, step.logits

    def _decode_step(self, batch: Batch, cache: KVCache) -> DecodeStep:
        # not the cache itself: what is kept there would keep it
        compute = partial(self._compute, cache.keys, cache.values, cache.ledger.max_rows)
        finish = self.results if self.is_last else None
        width = None if self.is_first else self.config.hidden_dim
        return self.kernels.decode_step(StepWork(compute, cache, finish, width), batch)

    def _compute(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        num_positions: int,
        batch: Batch,
        inputs: Array,
        positions: Array,
        attend: Attend,
    ) -> Array:
        """Rows through all layers, where the kernels compute, in a session of `num_positions`."""
        hidden = self.kernels.empty(positions.shape[0], self.config.hidden_dim)
        if self.is_first:
            self._embed(inputs, positions, hidden)
        else:
            self.kernels.copy(inputs, hidden)
        angles = self._angles.rows(num_positions, positions)
        steps = [
            self._room.forward_pass(hidden, attend(shape.heads), each)
            for shape, each in zip(self._shapes, angles, strict=True)
        ]
        layers = zip(self._layers, self._shape_of, keys, values, strict=True)
        for index, (layer, shape, own_keys, own_values) in enumerate(layers, self.layer_start):
            step = steps[shape]
            attention = self.parts.attention(index, batch, step.attention)
            own = step if attention is step.attention else replace(step, attention=attention)
            layer(hidden, own, own_keys, own_values)
        return hidden

    def _embed(self, token_ids: Array, positions: Array, out: Array) -> None:
        (self._embedding or self._tied_head()).gather(token_ids, out)
        if self.config.embedding_scale != 1:
            self.kernels.scale(out, self.config.embedding_scale)
        self._place(out, positions)

    def embed(self, token_ids: HostArray, batch: Batch) -> Array:
        """Rows as layers take them: [rows] int64 ids of the vocabulary -> [rows, hidden]."""
        kernels = self.kernels
        hidden = kernels.empty(len(token_ids), self.config.hidden_dim)
        positions = kernels.to_device(positions_of(batch))
        self._embed(kernels.to_device(token_ids), positions, hidden)
        return hidden

    def logits(self, hidden: Array) -> Array:
        """Final norm and head of rows of the last stage's output: [n, hidden] -> [n, vocab]."""
        return self._to_logits(hidden, self.kernels.empty(len(hidden), self.config.vocab_size))

    def results(self, hidden: Array) -> tuple[Array, Array]:
        """Greedy token of each row, [n], and logits as above, which the next call overwrites."""
        rows, size = len(hidden), self.config.vocab_size
        if len(self._logits) < rows:
            self._logits = self.kernels.empty(round_up(rows), size)
        logits = self._to_logits(hidden, self._logits[:rows])
        return self.kernels.argmax(logits), logits

    def wipe(self) -> None:
        """Zero what steps have left in memory that outlives their session."""
        for shard in (self, *self._others):
            shard._room.wipe()
        self._logits[...] = 0
        self.kernels.wipe()

    def _to_logits(self, hidden: Array, out: Array) -> Array:
        assert self._norm is not None, "only the last stage has a norm"
        assert self._head is not None, "only the last stage has a head"
        return self._head(self._norm(hidden, self.kernels.empty(*hidden.shape)), out)

    def _tied_head(self) -> Linear:
        assert self._head is not None, "the first stage has an embedding or shares the head's"
        return self._head
