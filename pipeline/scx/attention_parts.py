"""Home: all of a model but the keys and values of earlier tokens, which a stranger holds encoded.

A step's new rows are encoded and sent, together with encoded queries over what the stranger then
holds: one question and one answer a layer, for all requests of the step. Rows of one text that come
together attend to each other here, and what the stranger says of earlier rows is joined with that.
Nothing of it is kept: a worker that is lost takes no key with it, and the texts are encoded anew,
with other keys, from their tokens.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng

from pipeline.dtypes import FLOAT32, HostArray
from pipeline.errors import InputError, MessageError
from pipeline.kernels.base import Attention, HeadShape, Kernels, Linear, LinearSpec
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.kv_storage import LayerKV
from pipeline.models.layer_parts import Reader
from pipeline.models.model_config import ModelConfig
from pipeline.protocol.batch import Batch
from pipeline.remote_parts.parts import RemoteParts, SessionSize
from pipeline.remote_parts.wire import PartRefusal, to_array, to_tensor
from pipeline.scx.asking import Asking
from pipeline.scx.attention_wire import (
    ANSWER_LIMITS,
    Op,
    Opening,
    Span,
    attend_bytes,
    opening_bytes,
    pair_bytes,
)
from pipeline.scx.codec import LayerCodec
from pipeline.scx.errors import AnswerRefused, CacheRefused
from pipeline.scx.held_rows import Answers, HeldElsewhere, HeldRows
from pipeline.scx.keys import KeyGenerator
from pipeline.scx.rows import EncodedRows
from transport.tensor_frames import Tensor

# A query comes once for each segment of rows, and keys of each lie in memory; with more of them all
# rows of a layer are taken back and encoded anew.
_MAX_SEGMENTS = 16


@dataclass(frozen=True, slots=True)
class Encoding:
    """What rows get beside secret keys and orders: see `KeyGenerator`."""

    noise: float = 0.0
    num_decoys: int = 0
    is_one_time: bool = False


class AttentionParts(RemoteParts):
    """Attention over rows that a worker holds, for a shard of all layers, or of these.

    Raises InputError for a model whose layers do not look back to the start, or have sinks.
    """

    are_calls = True
    are_row_exact = False
    are_cached_here = False

    def __init__(
        self,
        config: ModelConfig,
        encoding: Encoding = Encoding(),
        layers: range | None = None,
    ) -> None:
        super().__init__(ANSWER_LIMITS)
        window = config.window
        if window is not None and window < config.max_positions:
            raise InputError(
                f"layers of this model look back {window} tokens only, which whoever holds encoded "
                "rows does not know of"
            )
        if config.has_sinks:
            raise InputError(
                "heads of this model have sinks, which whoever holds encoded rows does not know of"
            )
        self.heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, 0)
        self._layers = layers or range(config.num_layers)
        self._config = config
        self._encoding = encoding
        # Keys and values of other text, of each layer: drawn anew for each session.
        self._decoys: list[tuple[HostArray, HostArray]] | None = None
        self._seed = os.urandom(32)
        self._epoch = 0
        # By slot and layer.
        self._held: dict[int, dict[int, HeldRows]] = {}
        self._answers = Answers()
        self._kernels: Kernels | None = None

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The kernels' own: all products are computed here."""
        self._kernels = kernels
        return super().linear(name, spec, kernels)

    def attention(self, layer: int, batch: Batch, own: Attention) -> Attention:
        """What asks for one step's attention in a layer."""
        del own
        return Asking(self, layer, batch)

    def prepare(self, reader: Reader) -> None:
        """Have decoys read: tokens that nobody else knows, but for the first.

        Every later query attends to a text's first row, so as a decoy it would hide all others.
        """
        if count := self._encoding.num_decoys:
            tokens = default_rng().integers(0, self._config.vocab_size, count + 1)
            layers = reader.keys_and_values(tokens)
            self._decoys = [(each.keys[:, 1:], each.values[:, 1:]) for each in layers]

    def cache(self, own: Callable[[], KVCache], num_slots: int, max_seq_len: int) -> KVCache:
        """A ledger of what is held elsewhere."""
        del own
        return HeldElsewhere(
            len(self._layers), num_slots, max_seq_len, truncate=self.truncate, fetch=self.fetch
        )

    def begin(self, limits: SessionSize) -> None:
        """Another session, and so other keys. Raises PartRefused where it would not fit."""
        self._epoch += 1
        width = self._new_keys().width
        rows = limits.max_seq_len + self._encoding.num_decoys
        opening = Opening(self._layers.stop, self.heads.num_kv_heads, width, limits.num_slots, rows)
        self.link.ask(opening_bytes(opening))

    def end(self) -> None:
        """What the worker holds is of no use any more."""
        self._held.clear()
        self._answers.forget()

    def held(self, slot: int, layer: int, *, is_new: bool) -> HeldRows:
        """What is known of a slot's rows; a new text gets keys of its own. Raises AnswerRefused."""
        if is_new and layer == self._layers.start:
            keys = self._new_keys()
            self._held[slot] = {
                each: HeldRows(self._codec(keys, each), self._answers) for each in self._layers
            }
        held = self._held[slot][layer]
        if self._encoding.is_one_time and not is_new and held.num_segments > _MAX_SEGMENTS:
            codec = self._codec(self._new_keys(), layer)
            try:
                held = self._held[slot][layer] = held.renew(codec, self._fetched(slot, layer))
            except CacheRefused as error:
                raise AnswerRefused(
                    f"the attention worker gives other rows back: {error}"
                ) from error
        return held

    def _codec(self, keys: KeyGenerator, layer: int) -> LayerCodec:
        decoys = None if self._decoys is None else self._decoys[layer]
        return LayerCodec(keys, layer, self.heads.num_kv_heads, decoys=decoys)

    def truncate(self, slot: int, length: int) -> None:
        """Have the worker forget all but a slot's first rows.

        Raises MessageError where those have come in one step with others: they are not in order.
        """
        layers = self._held.get(slot)
        if layers is None:
            return
        if length == 0:
            del self._held[slot]
        else:
            for held in layers.values():
                if not held.take_back(length):
                    raise MessageError(f"slot {slot} cannot go back to {length} encoded rows")
            length += self._encoding.num_decoys
        self.link.ask(pair_bytes(Op.TRUNCATE, slot, length))

    def fetch(self, slot: int) -> list[LayerKV]:
        """A slot's rows as they come back, checked and decoded. Raises CacheRefused."""
        return [
            LayerKV(*held.codec.decode(self._fetched(slot, layer), held.receipt))
            for layer, held in self._held[slot].items()
        ]

    def _fetched(self, slot: int, layer: int) -> EncodedRows:
        _, tensors = self.link.ask(pair_bytes(Op.FETCH, slot, layer))
        if len(tensors) != 2:
            raise AnswerRefused("encoded rows came back without keys or values")
        return EncodedRows(*_arrays(tensors))

    def ask(
        self, layer: int, spans: list[Span], rows: list[EncodedRows], queries: list[HostArray]
    ) -> tuple[HostArray, HostArray]:
        """What is asked of all spans together: see `say`."""
        nothing = np.empty((self.heads.num_kv_heads, 0, rows[0].keys.shape[2]), FLOAT32)
        # [KV heads, queries, segments, width] each
        flat = [each.reshape(len(each), -1, each.shape[-1]) for each in queries]
        asked = np.concatenate(flat, 1) if len(flat) > 1 else flat[0] if flat else nothing
        keys, values = (
            np.concatenate(each, 1) if len(each) > 1 else each[0]
            for each in ([part.keys for part in rows], [part.values for part in rows])
        )
        return self.say(layer, spans, (keys, values, asked))

    def say(
        self,
        layer: int,
        spans: list[Span],
        rows: tuple[HostArray, HostArray, HostArray],
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[HostArray, HostArray]:
        """New keys, new values and queries -> outputs of the queries, and their log-sums.

        Raises AnswerRefused for an answer to something else, PartLost, PartRefused.
        """
        asked = rows[2]
        tensors = tuple(to_tensor(each) for each in rows)
        _, answered = self.link.ask(attend_bytes(layer, spans), tensors, meanwhile)
        arrays = _arrays(answered)
        if [each.shape for each in arrays] != [asked.shape, asked.shape[:2]]:
            raise AnswerRefused("an answer about encoded rows has another shape")
        return arrays[0], arrays[1]

    @property
    def kernels(self) -> Kernels:
        """What layers are computed with."""
        assert self._kernels is not None, "layers are made before they compute"
        return self._kernels

    def _new_keys(self) -> KeyGenerator:
        return KeyGenerator(
            0,
            self._config.hidden_dim,
            self.heads.head_dim,
            self._encoding.num_decoys,
            self._encoding.noise,
            seed=self._seed,
            session=os.urandom(16),
            epoch=self._epoch,
            one_time=self._encoding.is_one_time,
        )


def _arrays(tensors: tuple[Tensor, ...]) -> tuple[HostArray, ...]:
    try:
        return tuple(to_array(each) for each in tensors)
    except PartRefusal as error:
        raise AnswerRefused(f"an answer about encoded rows: {error}") from error
