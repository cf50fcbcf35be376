"""From a model directory and a layer range to a shard that computes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.dtypes import Array, Floats, HostArray, Precision
from pipeline.errors import ModelError
from pipeline.kernels.base import Kernels, Rows
from pipeline.kernels.choice import choose_kernels
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.outline import Outline
from pipeline.models.base import Shard
from pipeline.models.config import GPT2Config, LlamaConfig, ModelConfig
from pipeline.models.gpt2 import GPT2Shard
from pipeline.models.llama import LlamaShard
from pipeline.progress import Progress
from pipeline.protocol.segments import Batch
from pipeline.weights.checkpoint import load_tensors, stage_files, stored_names, tensor_sizes
from pipeline.weights.quant import to_precision
from pipeline.weights.sinks import Sink

GPT2_PREFIX = "transformer."  # some checkpoints carry it, the hub's own gpt2 does not


class ModelShard(Protocol):
    """What a stage needs of a model."""

    config: ModelConfig
    layer_start: int
    layer_end: int
    is_first: bool
    is_last: bool
    kernels: Kernels

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of weights held."""

    def kv_bytes(self, num_slots: int, max_seq_len: int) -> int:
        """Bytes such a cache reserves."""

    def new_cache(self, num_slots: int, max_seq_len: int) -> KVCache:
        """KV memory for this shard's layers."""

    def forward(self, inputs: HostArray, batch: Batch, cache: KVCache) -> Array:
        """[rows] int64 ids (first stage) or [rows, hidden] -> [rows, hidden]."""

    def logits(self, hidden: Array) -> Array:
        """Last stage: [n, hidden] -> [n, vocab]."""

    def results(self, hidden: Array) -> tuple[Array, Array]:
        """Last stage: [n, hidden] -> greedy tokens [n], logits until the next call [n, vocab]."""

    def decode(self, rows: Rows, batch: Batch, cache: KVCache) -> tuple[bytearray, Floats | None]:
        """A step of one token for each segment, as the wire has it: see `Shard.decode`."""

    def wipe(self) -> None:
        """Zero what steps have left in memory that outlives their session."""


def load_shard(
    model_dir: Path,
    config: ModelConfig,
    layer_start: int,
    layer_end: int,
    *,
    dtype: str = "float32",
    kernels: str = "auto",
    device: str = "cpu",
    expected_hashes: Sequence[str] | None,
    progress: Progress | None = None,
) -> ModelShard:
    """Load layers layer_start..layer_end (exclusive), with embedding first and head last.

    `dtype` is what the weights are held in; `kernels` the arithmetic: auto, native or torch,
    all on the CPU; `device` where to compute: cpu, cuda or cuda:N. `expected_hashes`: SHA-256 of
    each of `required_files`, or None to load unverified. Raises ModelError naming file, tensor,
    expected and actual, InputError for kernels that cannot be had.
    """
    precision = to_precision(dtype)
    _check_range(config, layer_start, layer_end)
    chosen = choose_kernels(kernels, config.head_dim, device)
    shard = _allocate(config, layer_start, layer_end, chosen, precision)
    memory = shard.destinations()
    stored = _names_in_files(model_dir, config, memory)
    load_tensors(
        model_dir,
        {stored[name]: tensor for name, tensor in memory.items()},
        expected_hashes=expected_hashes,
        progress=progress,
    )
    return shard


def required_files(model_dir: Path, config: ModelConfig, layer_range: range) -> list[Path]:
    """The weight files a stage with these layers reads, sorted by name."""
    return stage_files(model_dir, required_tensors(model_dir, config, layer_range))


def required_tensors(
    model_dir: Path, config: ModelConfig, layer_range: range
) -> Mapping[str, Sink]:
    """The tensors a stage with these layers loads: name as in the files -> what it would go to."""
    _check_range(config, layer_range.start, layer_range.stop)
    sinks = _plan(config, layer_range.start, layer_range.stop).destinations()
    names = _names_in_files(model_dir, config, sinks)
    return {names[name]: sink for name, sink in sinks.items()}


def layer_bytes(model_dir: Path, config: ModelConfig) -> tuple[int, tuple[int, ...], int]:
    """Stored bytes of (embedding, each layer, final norm and head): what a split balances.

    A tied head counts on both sides, as the stages at both ends hold it.
    """
    sizes = tensor_sizes(model_dir)

    def total(names: Iterable[str]) -> int:
        found = _names_in_files(model_dir, config, names).values()
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


def _check_range(config: ModelConfig, layer_start: int, layer_end: int) -> None:
    if not 0 <= layer_start < layer_end <= config.num_layers:
        raise ModelError(
            f"layers {layer_start}..{layer_end} are not a range of the model's {config.num_layers}"
        )


def _allocate(
    config: ModelConfig, layer_start: int, layer_end: int, kernels: Kernels, precision: Precision
) -> Shard:
    try:
        return _build(config, layer_start, layer_end, kernels, precision)
    except (RuntimeError, MemoryError, ValueError) as error:  # what torch, Python, numpy call it
        planned = _plan(config, layer_start, layer_end)
        raise ModelError(
            f"layers {layer_start}..{layer_end} of this config.json need "
            f"{planned.num_weight_bytes} bytes of memory in float32, more than this machine gives"
        ) from error


def _build(
    config: ModelConfig, layer_start: int, layer_end: int, kernels: Kernels, precision: Precision
) -> Shard:
    match config:
        case GPT2Config():
            return GPT2Shard(config, layer_start, layer_end, kernels=kernels, precision=precision)
        case LlamaConfig():
            return LlamaShard(config, layer_start, layer_end, kernels=kernels, precision=precision)
        case _:
            raise ModelError(f"architecture {config.architecture!r} is not supported")


def _plan(config: ModelConfig, layer_start: int, layer_end: int) -> Shard:
    """The shard's shapes without their memory."""
    return _build(config, layer_start, layer_end, Outline(), "float32")


def _stage_tensors(config: ModelConfig, layer_start: int, layer_end: int) -> list[str]:
    """Names a stage loads; an empty range at either end means that end's embedding or head."""
    return list(_plan(config, layer_start, layer_end).destinations())


def _names_in_files(model_dir: Path, config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Our name -> the name in the files, which may carry the architecture's prefix."""
    is_prefixed = isinstance(config, GPT2Config) and any(
        name.startswith(GPT2_PREFIX) for name in stored_names(model_dir)
    )
    if not is_prefixed:
        return {name: name for name in names}
    return {name: name if name.startswith("lm_head.") else GPT2_PREFIX + name for name in names}
