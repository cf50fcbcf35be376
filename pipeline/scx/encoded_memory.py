"""A stage whose keys and values lie encoded in its own memory, with keys that it has been handed.

That is where the design's paper puts the middle layers: whoever runs such a stage has the keys, and
the rows that come in. What lies in its memory is encoded; what that stage can know is not.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np

from pipeline.dtypes import FLOAT32, Array, HostArray
from pipeline.errors import PartRefused, SessionRefused
from pipeline.kernels.base import Attention, Kernels, Linear, LinearSpec
from pipeline.models.layer_parts import LayerParts
from pipeline.models.model_config import ModelConfig
from pipeline.protocol.batch import Batch
from pipeline.protocol.step_limits import SessionLimits
from pipeline.remote_parts.wire import Message, PartRefusal
from pipeline.scx.attention_parts import AttentionParts
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker
from pipeline.scx.keys import KeyGenerator
from transport.tensor_frames import Tensor

SEED_BYTES = 32
_NO_KEYS = "the orchestrator hands over no keys to encode with"


class EncodedMemory(LayerParts):
    """The kernels' own attention, over rows that are encoded before they are cached."""

    are_row_exact = False

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._kernels: Kernels | None = None
        self._keys: KeyGenerator | None = None
        self._matrices: dict[int, tuple[Array, Array, Array]] = {}

    @asynccontextmanager
    async def session(
        self, limits: SessionLimits, on_waiting: Callable[[str], None], seed: bytes | None
    ) -> AsyncIterator[None]:
        """Encode by keys of a seed that the orchestrator hands over. Raises SessionRefused."""
        del limits, on_waiting
        if seed is None:
            raise SessionRefused(_NO_KEYS)
        self.use(seed)
        try:
            yield
        finally:
            self._keys = None
            self._matrices.clear()

    def use(self, seed: bytes) -> None:
        """Encode by these keys, and others for each session that they are handed over for."""
        config = self._config
        self._matrices.clear()
        self._keys = KeyGenerator(
            0, config.hidden_dim, config.head_dim, seed=seed, session=os.urandom(16)
        )

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """The kernels' own."""
        self._kernels = kernels
        return super().linear(name, spec, kernels)

    def attention(self, layer: int, batch: Batch, own: Attention) -> Attention:
        """Encode, have the kernels attend, decode."""
        del batch
        return _Encoded(self, layer, own)

    def matrices(self, layer: int) -> tuple[Array, Array, Array]:
        """R, S and its transpose of each KV head, where the kernels compute."""
        found = self._matrices.get(layer)
        if found is None:
            assert self._keys is not None, "steps come in sessions"
            derived = self._keys.segment(layer, self._config.num_kv_heads, 0)
            found = self._matrices[layer] = (
                self._to_device(derived.keys),
                self._to_device(derived.values),
                self._to_device(derived.values.mT),
            )
        return found

    @property
    def kernels(self) -> Kernels:
        """What layers are computed with."""
        assert self._kernels is not None, "layers are made before they compute"
        return self._kernels

    def _to_device(self, matrices: HostArray) -> Array:
        return self.kernels.to_device(np.ascontiguousarray(matrices, FLOAT32))


class EncodedRowByRow(AttentionParts):
    """The same with noise, and keys of each step's own: by what an attention worker does, here."""

    are_cached_here = True

    @asynccontextmanager
    async def with_seed(
        self, limits: SessionLimits, on_waiting: Callable[[str], None], seed: bytes | None
    ) -> AsyncIterator[None]:
        """As `EncodedMemory.session`. Raises SessionRefused."""
        del on_waiting
        if seed is None:
            raise SessionRefused(_NO_KEYS)
        self._seed = seed
        worker = AttentionWorker(AttentionMemory(None))
        try:
            self.attach(LocalLink(worker), limits)
            yield
        finally:
            self.end()
            worker.close()


class LocalLink:
    """A worker in this process, as whoever asks it sees it."""

    def __init__(self, worker: AttentionWorker) -> None:
        self._worker = worker

    def ask(
        self,
        header: bytes,
        tensors: tuple[Tensor, ...] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> Message:
        """Raises PartRefused."""
        if meanwhile is not None:
            meanwhile()
        try:
            return self._worker.answer(header, tensors)
        except PartRefusal as error:
            raise PartRefused(f"keys and values cannot be held: {error}") from error


class _Encoded:
    """One step's attention in one layer."""

    def __init__(self, parts: EncodedMemory, layer: int, own: Attention) -> None:
        self._parts = parts
        self._layer = layer
        self._own = own

    def __call__(
        self, qkv: Array, keys: Array, values: Array, out: Array, sinks: Array | None = None
    ) -> Array:
        """As the kernels', with K' = K R, q' = q R and V' = V S: out = (out' of these) S^-1."""
        by_keys, by_values, back = self._parts.matrices(self._layer)
        turn = self._parts.kernels.turn
        heads, width, _ = by_keys.shape
        keys_from, values_from = out.shape[1], out.shape[1] + heads * width
        groups = keys_from // (heads * width)
        turn(qkv[:, :keys_from], by_keys, groups)
        turn(qkv[:, keys_from:values_from], by_keys)
        turn(qkv[:, values_from:], by_values)
        found = self._own(qkv, keys, values, out, sinks)
        turn(found, back, groups)
        return found
