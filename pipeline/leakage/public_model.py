"""The public model as an attacker runs it: hidden states of any tokens at any layer.

Rows "at layer l" are what layer l takes: at 0 the embeddings, at the number of layers what the
final norm takes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dtypes import Floats
from pipeline.errors import ModelError
from pipeline.kernels.kv_cache import KVCache
from pipeline.models.config import load_config
from pipeline.models.ends import Ends
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.models.model_config import ModelConfig
from pipeline.models.registry import (
    ModelShard,
    load_shard,
    required_tensors,
    stored_as,
)
from pipeline.models.stored_model import family_of
from pipeline.progress import Progress, part_of
from pipeline.protocol.batch import Batch, Segment
from pipeline.weights.checkpoint import load_tensors
from pipeline.weights.tensor_sinks import CopySink, WeightSink


@dataclass(frozen=True, slots=True)
class PublicModel:
    """Weights that everybody has, cut at the layers that are looked at."""

    config: ModelConfig
    embedding: Floats  # [vocab, hidden]
    positions: Floats | None  # [positions, hidden], of models that learn them
    readers: Floats  # [outputs, hidden]: what layer 0 multiplies normed rows with, gain included
    is_centred: bool  # whether norms drop a row's mean (LayerNorm), so that it says nothing
    cuts: tuple[int, ...]  # 0, the layers looked at, the number of layers
    shards: tuple[ModelShard, ...]  # between the cuts, from rows to rows

    @classmethod
    def load(
        cls,
        model_dir: Path,
        layers: Sequence[int],
        progress: Progress | None = None,
        parts: LayerParts = OWN,
    ) -> "PublicModel":
        """`parts`: what does the work of its layers. Raises ModelError."""
        config = load_config(model_dir)
        cuts = tuple(sorted({0, *layers, config.num_layers}))
        shards = tuple(
            load_shard(
                model_dir,
                config,
                start,
                end,
                ends=Ends(embedding=False, head=end == config.num_layers),
                parts=parts,
                expected_hashes=None,
                progress=part_of(progress, index, len(cuts) - 1),
            )
            for index, (start, end) in enumerate(itertools.pairwise(cuts))
        )
        family = family_of(config)
        names, stream = family.names, family.stream
        if stream is None:
            raise ModelError(f"what reads the rows of {config.architecture} models is not known")
        norm, linears = next(iter(stream.readers.items()))
        gain, reader = (f"{names.layers}.0.{each}.weight" for each in (norm, linears[0]))
        embedding = f"{names.embedding}.weight"
        positions = [] if stream.positions is None else [stream.positions]
        found = _read(model_dir, config, [embedding, gain, reader, *positions])
        matrix = found[reader].T if stream.is_in_out else found[reader]
        is_centred = stream.is_centred and config.rotation is None
        readers = matrix * found[gain]
        return cls(
            config,
            found[embedding],
            None if stream.positions is None else found[stream.positions],
            without_mean(readers) if is_centred else readers,
            is_centred,
            cuts,
            shards,
        )

    def embed(self, token_ids: Sequence[int] | slice, position: int = 0) -> Floats:
        """Rows at layer 0 of consecutive tokens, the first at `position`: [tokens, hidden]."""
        rows = self.embedding[token_ids if isinstance(token_ids, slice) else list(token_ids)]
        if self.positions is not None:
            rows = rows + self.positions[position : position + len(rows)]
        return rows

    def vocabulary(self, position: int) -> Floats:
        """Row at layer 0 of every token there is, all at `position`: [vocab, hidden]."""
        if self.positions is None:
            return self.embedding
        placed: Floats = self.embedding + self.positions[position]
        return placed

    def rows_at_cuts(self, embedded: Floats) -> dict[int, Floats]:
        """One text's rows at every cut, from those at layer 0."""
        batch = (Segment(0, 0, len(embedded)),)
        found = {0: embedded}
        for shard, end in zip(self.shards, self.cuts[1:], strict=True):
            cache = shard.new_cache(1, len(embedded))
            embedded = forward(shard, embedded, batch, cache)
            found[end] = embedded
        return found

    def logits(self, rows: Floats) -> Floats:
        """Of rows at the last cut: [n, hidden] -> [n, vocab]."""
        last = self.shards[-1]
        (found,) = last.kernels.to_host(last.logits(last.kernels.to_device(rows)))
        logits: Floats = found
        return logits


def forward(shard: ModelShard, rows: Floats, batch: Batch, cache: KVCache) -> Floats:
    """Rows through a shard's layers, on the host: [rows, hidden] to the same."""
    (found,) = shard.kernels.to_host(shard.forward(rows, batch, cache))
    hidden: Floats = found
    return hidden


def without_mean(rows: Floats) -> Floats:
    """Each row less its mean."""
    centred: Floats = rows - rows.mean(axis=-1, keepdims=True)
    return centred


def _read(model_dir: Path, config: ModelConfig, names: Sequence[str]) -> Mapping[str, Floats]:
    """Tensors of the first layer and what lies before it, as float32."""
    layers, ends = range(1), Ends(embedding=True, head=False)
    files = stored_as(model_dir, config, layers, ends)
    planned = required_tensors(model_dir, config, layers, ends)
    sinks: dict[str, CopySink] = {}
    for name in names:
        sink = planned[files[name]]
        is_in_out = isinstance(sink, WeightSink) and sink.is_in_out
        sinks[name] = CopySink(np.empty(sink.shape, np.float32), is_in_out=is_in_out)
    own = {files[name]: sink for name, sink in sinks.items()}
    load_tensors(model_dir, own, expected_hashes=None, packing=config.packing)
    return {name: sink.target for name, sink in sinks.items()}
