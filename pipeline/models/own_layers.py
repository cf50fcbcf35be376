"""Layers of anybody's own in the place of a model's: what they have to do, and what a stage sees.

A stage hands an executor a step's rows and takes others; which requests these are of, a batch says.
What an executor keeps of a request, as a transformer does its keys and values, it keeps by slot.
"""

from typing import Protocol

import numpy as np

from pipeline.dtypes import FLOAT32, Floats, HostArray, Precision
from pipeline.errors import InputError, MessageError, ModelError
from pipeline.kernels.base import Kernels, Rows
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.session_memory import KeptSlots
from pipeline.kernels.shape_only_kernels import Outline
from pipeline.models.model_config import ModelConfig
from pipeline.protocol.batch import Batch, num_tokens
from pipeline.protocol.tide_window import TideWindow


class SlotStates(Protocol):
    """What one session's requests have left in their slots. No two of its calls overlap."""

    def forward(self, rows: HostArray, batch: Batch) -> Floats:
        """Compute a step, and keep of each request what its later rows need.

        Shapes: rows [rows] int64 token ids on the first stage, else [rows, hidden] float32, one
        segment of `batch` after another; returns [rows, hidden]. Each segment begins where its slot
        ends. Whatever this raises ends the session, and the stage serves the next one.
        """
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget what a slot holds behind its first `length` tokens; 0: the request is over."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give an empty slot the first `length` tokens of another."""
        ...

    def close(self) -> None:
        """Forget all: the session is over."""
        ...


class Executor(Protocol):
    """Layers of one's own, and with them the ends of the model that lie in their stage."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the model, which all its stages have to say alike."""
        ...

    @property
    def is_row_exact(self) -> bool:
        """Whether a row is the same, bit for bit, in steps of any size, beside any others."""
        ...

    def state_bytes(self, num_slots: int, max_seq_len: int) -> int:
        """What a session of so many requests and tokens each takes of memory."""
        ...

    def open(self, num_slots: int, max_seq_len: int) -> SlotStates:
        """Begin a session, with empty slots. Raises MemoryError."""
        ...

    def logits(self, rows: Floats) -> Floats:
        """On the last stage: rows of `forward` [n, hidden] -> [n, vocab] float32."""
        ...


class _Host(Outline):
    """This machine's memory; what computes there is the executor's own."""

    name = "own"

    def __init__(self, *, is_row_exact: bool) -> None:
        self.is_row_exact = is_row_exact  # type: ignore[misc]  # of these layers, not of a class


class _States(KVCache):
    """A ledger of what slots hold, before states that keep it."""

    __slots__ = ("_num_bytes", "states")

    def __init__(self, executor: Executor, kernels: Kernels, num_slots: int, length: int) -> None:
        super().__init__(
            kernels,
            num_layers=0,
            num_slots=num_slots,
            num_kv_heads=1,
            max_seq_len=length,
            head_dim=1,
            dtype=FLOAT32,
        )
        self.states = executor.open(num_slots, length)
        self._num_bytes = executor.state_bytes(num_slots, length)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def truncate(self, slot: int, length: int) -> None:
        super().truncate(slot, length)
        self.states.truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        super().copy(source, target, length)
        self.states.copy(source, target, length)

    def release(self) -> None:
        super().release()
        self.states.close()


class OwnShard:
    """An executor as a stage takes it: a `ModelShard`."""

    has_decode_steps = False
    num_weight_bytes = 0
    precision: Precision = "float32"

    def __init__(
        self,
        executor: Executor,
        layers: range,
        num_layers: int,
        hidden_dim: int,
        max_seq_len: int,
        *,
        has_ends: bool = True,
    ) -> None:
        """`layers` of a model of `num_layers`; `has_ends`: the first and last hold its ends."""
        self.layer_start, self.layer_end = layers.start, layers.stop
        self.is_first = has_ends and layers.start == 0
        self.is_last = has_ends and layers.stop == num_layers
        self.kernels: Kernels = _Host(is_row_exact=executor.is_row_exact)
        self.config = ModelConfig(
            architecture=_Host.name,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            num_heads=1,
            num_kv_heads=1,
            head_dim=hidden_dim,
            vocab_size=executor.vocab_size,
            max_positions=max_seq_len,
            eos_token_ids=(),
            intermediate_size=hidden_dim,
            norm_eps=0.0,
            tie_word_embeddings=False,
        )
        self._executor = executor

    @property
    def is_row_exact(self) -> bool:
        """As the executor says."""
        return self._executor.is_row_exact

    def kv_bytes(self, num_slots: int, max_seq_len: int) -> int:
        """As the executor says."""
        return self._executor.state_bytes(num_slots, max_seq_len)

    def step_bytes(self, num_rows: int) -> int:
        """Rows in and out; what the executor makes in between, it alone knows."""
        return 2 * num_rows * self.config.hidden_dim * FLOAT32.itemsize

    def check_window(self, window: TideWindow) -> None:
        """Raises InputError: none can be had."""
        raise InputError(f"a window of {window.size} positions: layers of one's own keep all")

    def new_cache(
        self,
        num_slots: int,
        max_seq_len: int,
        window: TideWindow | None = None,
        kept: KeptSlots | None = None,
    ) -> KVCache:
        """A session's states. Raises MemoryError."""
        assert window is None, "check_window has refused it"
        assert kept is None, "native kernels' alone are kept"
        return _States(self._executor, self.kernels, num_slots, max_seq_len)

    def forward(self, inputs: HostArray, batch: Batch, cache: KVCache) -> Floats:
        """A step's rows. Raises MessageError, and ModelError where the executor gives others."""
        assert isinstance(cache, _States), "from `new_cache`"
        rows = num_tokens(batch)
        if inputs.shape[0] != rows or not batch:
            raise MessageError(f"a step of {rows} tokens came with {inputs.shape[0]} rows")
        cache.reserve(batch)
        hidden = _checked(cache.states.forward(inputs, batch), rows, self.config.hidden_dim)
        cache.advance(batch)
        return hidden

    def embed(self, token_ids: HostArray, batch: Batch) -> Floats:
        """Of whoever holds the ends of a model alone."""
        raise NotImplementedError("layers of one's own are a stage's, and embed in `forward`")

    def logits(self, hidden: HostArray) -> Floats:
        """[n, hidden] -> [n, vocab]. Raises ModelError."""
        return _checked(self._executor.logits(hidden), len(hidden), self.config.vocab_size)

    def results(self, hidden: HostArray) -> tuple[HostArray, Floats]:
        """Greedy tokens [n], -1 where there is none, and logits."""
        logits = self.logits(hidden)
        greatest = np.argmax(logits, axis=1)
        is_sound = ~np.isnan(logits).any(axis=1) & np.isfinite(logits.max(axis=1))
        return np.where(is_sound, greatest, -1), logits

    def decodes(self, count: int) -> bool:
        """Of kernels that can record all of a step."""
        del count
        return False

    def decode(self, rows: Rows, batch: Batch, cache: KVCache) -> tuple[bytearray, Floats | None]:
        """Of kernels that can record all of a step."""
        raise NotImplementedError("has_decode_steps is false")

    def wipe(self) -> None:
        """What is left of a session, its states forget when they are closed."""


def _checked(found: Floats, num_rows: int, width: int) -> Floats:
    rows = np.ascontiguousarray(found, np.float32)
    if rows.shape != (num_rows, width):
        raise ModelError(f"own layers returned {list(rows.shape)}, expected {[num_rows, width]}")
    return rows
