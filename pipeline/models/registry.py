"""From a model directory and a layer range to a shard that computes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from pipeline.dtypes import Array, Floats, HostArray, Precision
from pipeline.errors import ModelError
from pipeline.kernels.base import Kernels, Rows
from pipeline.kernels.kept_weights import KeptWeights, keep_weights
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.runtime import reading_threads, return_freed_blocks
from pipeline.kernels.sealed_memory import SealedMemory
from pipeline.kernels.session_memory import KeptSlots
from pipeline.kernels.shape_only_kernels import Outline
from pipeline.models.ends import BOTH_ENDS, Ends
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.models.model_config import ModelConfig
from pipeline.models.older_client_part import HEAD, is_older_layout, older_name
from pipeline.models.shard_model import Shard, ShardSpec
from pipeline.models.stored_model import as_stored, build, family_of, names_in_files
from pipeline.progress import Progress
from pipeline.protocol.batch import Batch
from pipeline.protocol.tide_window import TideWindow
from pipeline.weights.checkpoint import (
    NO_PIECES,
    load_tensors,
    stage_files,
    stored_names,
    tensor_sizes,
)
from pipeline.weights.file_pieces import Pieces, pins_of
from pipeline.weights.quantization import to_precision
from pipeline.weights.tensor_sinks import Sink, shared_sinks

logger = logging.getLogger(__name__)

Tensor = TypeVar("Tensor")


class ModelShard(Protocol):
    """What a stage needs of a model."""

    config: ModelConfig
    layer_start: int
    layer_end: int
    is_first: bool
    is_last: bool
    kernels: Kernels
    precision: Precision

    @property
    def has_decode_steps(self) -> bool:
        """Whether kernels can record all of a step."""

    def decodes(self, count: int) -> bool:
        """Whether `decode` may be called for so many segments."""

    @property
    def is_row_exact(self) -> bool:
        """Whether a row depends on itself and its own cache alone, bit for bit."""

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of weights held."""

    def kv_bytes(self, num_slots: int, max_seq_len: int) -> int:
        """Bytes such a cache reserves."""

    def step_bytes(self, num_rows: int) -> int:
        """About what a step of that many rows takes beside weights and caches."""

    def check_window(self, window: TideWindow) -> None:
        """Raises InputError saying why the model cannot be served so, if it cannot."""

    def new_cache(
        self,
        num_slots: int,
        max_seq_len: int,
        window: TideWindow | None = None,
        kept: KeptSlots | None = None,
    ) -> KVCache:
        """KV memory for this shard's layers, with what `kept` slots hold."""

    def forward(self, inputs: HostArray, batch: Batch, cache: KVCache) -> Array:
        """[rows] int64 ids (first stage) or [rows, hidden] -> [rows, hidden].

        Raises MessageError when the batch does not fit the inputs or the cache.
        """

    def embed(self, token_ids: HostArray, batch: Batch) -> Array:
        """With an embedding: [rows] int64 ids of the vocabulary -> [rows, hidden]."""

    def logits(self, hidden: Array) -> Array:
        """Last stage: [n, hidden] -> [n, vocab]."""

    def results(self, hidden: Array) -> tuple[Array, Array]:
        """Last stage: [n, hidden] -> greedy tokens [n], logits until the next call [n, vocab]."""

    def decode(self, rows: Rows, batch: Batch, cache: KVCache) -> tuple[bytearray, Floats | None]:
        """A step of one token for each segment, as the wire has it: see `Shard.decode`."""

    def wipe(self) -> None:
        """Zero what steps have left in memory that outlives their session."""


class Beside(NamedTuple):
    """Layers of another stage that is of the same files, and where its weights may be left."""

    layers: range
    memory: SealedMemory


def load_shard(
    model_dir: Path,
    config: ModelConfig,
    layer_start: int,
    layer_end: int,
    *,
    dtype: str = "float32",
    kernels: str = "auto",
    device: str = "cpu",
    parts: LayerParts = OWN,
    ends: Ends | None = None,
    expected_hashes: Sequence[str] | None,
    pieces: Mapping[str, Pieces] = NO_PIECES,
    progress: Progress | None = None,
    memory: SealedMemory | None = None,
    beside: Sequence[Beside] = (),
) -> ModelShard:
    """Load layers layer_start..layer_end (exclusive), with embedding first and head last.

    `ends`: which of these to hold instead; both may come without layers.

    `dtype` is what the weights are held in; `kernels` the arithmetic: auto, native or torch,
    all on the CPU; `device` where to compute: cpu, cuda or cuda:N; `parts` what does the work
    of linears and attention. `expected_hashes`: SHA-256 of each of `required_files`, or None to
    load unverified; `pieces` of files, by these. `memory`: where to leave verified weights for
    others, or to find what they left, of which nothing is read then; native kernels alone use it,
    where no part has weights of its own. What is `beside` is left in its own memory in the same
    pass, where that is of use. Raises ModelError naming file, tensor, expected and actual,
    InputError for kernels that cannot be had.
    """
    precision = to_precision(dtype)
    _check_range(config, layer_start, layer_end, ends)
    is_tied, config = config.tie_word_embeddings, as_stored(model_dir, config, precision)

    def allocate(layers: range, memory: SealedMemory | None) -> tuple[Shard, KeptWeights | None]:
        chosen, kept = choose_kernels(kernels, config.head_dim, device), None
        if memory is not None and expected_hashes is not None and parts.hold_weights_in_kernels:
            kept = keep_weights(
                chosen,
                memory,
                {
                    "config": repr(config),
                    "layers": [layers.start, layers.stop],
                    "ends": ends,
                    "hashes": [pin.name for pin in pins_of(expected_hashes, pieces)],
                    "precision": precision,
                },
            )
        return _allocate(config, ShardSpec(layers, chosen, precision, parts, ends)), kept

    shard, kept = allocate(range(layer_start, layer_end), memory)
    if kept is not None and kept.is_found:
        kept.check_layout()
        return shard
    if (
        config.tie_word_embeddings != is_tied
        and shard.is_last
        and not is_older_layout(stored_names(model_dir, config.packing))
    ):
        logger.warning(
            "event=own_head model=%s: config.json ties the head to the embedding, but there is "
            "a head of its own in the weights, which is used",
            model_dir.name,
        )
    loaded = [(shard, kept)]
    if kept is not None:
        loaded += [allocate(each.layers, each.memory) for each in beside]
    with ExitStack() as filling:
        for _, kept in loaded:
            if kept is not None:
                filling.enter_context(kept.filling())
        load_tensors(
            model_dir,
            shared_sinks(_sinks_in_files(model_dir, config, each) for each, _ in loaded),
            expected_hashes=expected_hashes,
            pieces=pieces,
            progress=progress,
            packing=config.packing,
            num_threads=reading_threads(),
        )
    return_freed_blocks()  # a file's names, and what went through while it was read
    return shard


def _sinks_in_files(model_dir: Path, config: ModelConfig, shard: Shard) -> dict[str, Sink]:
    """What a shard takes, by the names in the files."""
    sinks = shard.destinations()
    stored = names_in_files(model_dir, config, sinks)
    return {stored[name]: sink for name, sink in sinks.items()}


def outline(
    config: ModelConfig, layer_range: range, precision: Precision, ends: Ends | None = None
) -> ModelShard:
    """A stage's sizes without its memory: weights, cache, steps. `ends` as for `load_shard`.

    Raises ModelError for a range outside the model.
    """
    _check_range(config, layer_range.start, layer_range.stop, ends)
    return build(config, ShardSpec(layer_range, Outline(), precision, ends=ends))


def required_files(
    model_dir: Path, config: ModelConfig, layer_range: range, ends: Ends | None = None
) -> list[Path]:
    """The weight files a stage with these layers reads, sorted by name. Raises ModelError."""
    tensors = required_tensors(model_dir, config, layer_range, ends)
    return stage_files(model_dir, tensors, config.packing)


def required_tensors(
    model_dir: Path,
    config: ModelConfig,
    layer_range: range,
    ends: Ends | None = None,
    precision: Precision = "float32",
) -> Mapping[str, Sink]:
    """The tensors a stage with these layers loads: name as in the files -> what it would go to.

    `ends` as for `load_shard`; sinks are those of a stage in `precision`. Raises ModelError for a
    range outside the model, and for files that cannot be read.
    """
    names = stored_as(model_dir, config, layer_range, ends)
    sinks = plan_tensors(as_stored(model_dir, config, precision), layer_range, ends, precision)
    return {own: sinks[name] for name, own in names.items()}


def stored_as(
    model_dir: Path, config: ModelConfig, layer_range: range, ends: Ends | None = None
) -> Mapping[str, str]:
    """The names of those tensors, to what they are called in the files."""
    config = as_stored(model_dir, config)
    return names_in_files(model_dir, config, plan_tensors(config, layer_range, ends))


def plan_tensors(
    config: ModelConfig,
    layer_range: range,
    ends: Ends | None = None,
    precision: Precision = "float32",
) -> Mapping[str, Sink]:
    """The tensors of layers and ends: name -> what it would go to.

    `ends` and `precision` as for `required_tensors`. Raises ModelError for a range outside the
    model.
    """
    _check_range(config, layer_range.start, layer_range.stop, ends)
    return _plan(config, layer_range, ends, precision).destinations()


def in_older_layout(config: ModelConfig, ends: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's ends by the older layout's names, a tied head written out."""
    family = family_of(config)
    names = family.names
    found, heads = {}, {}
    for stored, tensor in ends.items():
        name = stored.removeprefix(family.prefix)
        found[older_name(names, name)] = tensor
        if name.startswith(f"{names.embedding}."):
            heads[HEAD + name.removeprefix(names.embedding)] = tensor
    return heads | found


def layer_bytes(model_dir: Path, config: ModelConfig) -> tuple[int, tuple[int, ...], int]:
    """Stored bytes of (embedding, each layer, final norm and head): what a split balances.

    A tied head counts on both sides, as the stages at both ends hold it. Raises ModelError for a
    tensor that is missing, and for files that cannot be read.
    """
    config = as_stored(model_dir, config)
    sizes = tensor_sizes(model_dir, config.packing)

    def total(names: Iterable[str]) -> int:
        found = names_in_files(model_dir, config, names).values()
        for name in found:
            if name not in sizes:
                raise ModelError(f"{model_dir}: tensor {name} is missing: fetch the model again")
        return sum(sizes[name] for name in found)

    last = config.num_layers
    embedding = _stage_tensors(config, 0, 0)
    head = _stage_tensors(config, last, last)
    ends = set(embedding) | set(head)
    layers = tuple(
        total(name for name in _stage_tensors(config, index, index + 1) if name not in ends)
        for index in range(last)
    )
    return total(embedding), layers, total(head)


def _check_range(config: ModelConfig, layer_start: int, layer_end: int, ends: Ends | None) -> None:
    least = 0 if ends == BOTH_ENDS else 1
    if not 0 <= layer_start <= layer_end - least < config.num_layers:
        raise ModelError(
            f"layers {layer_start}..{layer_end} are not a range of the model's {config.num_layers}"
        )


def _allocate(config: ModelConfig, spec: ShardSpec) -> Shard:
    try:
        return build(config, spec)
    except (RuntimeError, MemoryError, ValueError) as error:  # what torch, Python, numpy call it
        planned = _plan(config, spec.layers, spec.ends)
        raise ModelError(
            f"layers {spec.layers.start}..{spec.layers.stop} of this config.json need "
            f"{planned.num_weight_bytes} bytes of memory in float32, more than this machine gives"
        ) from error


def _plan(
    config: ModelConfig,
    layers: range,
    ends: Ends | None = None,
    precision: Precision = "float32",
) -> Shard:
    """The shard's shapes without their memory."""
    return build(config, ShardSpec(layers, Outline(), precision, ends=ends))


def _stage_tensors(config: ModelConfig, layer_start: int, layer_end: int) -> list[str]:
    """Names a stage loads; an empty range at either end means that end's embedding or head."""
    return list(_plan(config, range(layer_start, layer_end)).destinations())
