"""The part of a shard that no architecture changes: its range, its cache, its step."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from pipeline.errors import MessageError
from pipeline.models.batch import Batch, num_tokens
from pipeline.models.config import ModelConfig
from pipeline.models.kv_cache import KVCache
from pipeline.models.layers import Step
from pipeline.models.linear import Linear, MatVec


class Shard(ABC):
    """Layers layer_start..layer_end of a decoder, with the embedding first and the head last."""

    def __init__(
        self,
        config: ModelConfig,
        layer_start: int,
        layer_end: int,
        *,
        dtype: torch.dtype,
        matvec: MatVec,
    ) -> None:
        self.config: ModelConfig = config
        self.layer_start = layer_start
        self.layer_end = layer_end
        self.is_first = layer_start == 0
        self.is_last = layer_end == config.num_layers
        self.compute_dtype = dtype
        size, hidden = config.vocab_size, config.hidden_dim
        self._head = (
            Linear(hidden, size, bias=False, dtype=dtype, matvec=matvec) if self.is_last else None
        )
        # where embedding and head are one matrix in one stage it is held once, as [hidden, vocab]
        is_shared = self.is_first and self.is_last and config.tie_word_embeddings
        self._embedding = (
            torch.empty(size, hidden, dtype=dtype) if self.is_first and not is_shared else None
        )

    @abstractmethod
    def destinations(self) -> Mapping[str, torch.Tensor]:
        """Tensor name in the checkpoint (unprefixed) -> memory to load it into."""

    @abstractmethod
    def _begin(self, inputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Step]:
        """Inputs of the first layer [rows, hidden], and what all layers share."""

    @abstractmethod
    def _layer(
        self,
        index: int,
        hidden: torch.Tensor,
        step: Step,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """One decoder layer, [rows, hidden] -> [rows, hidden]."""

    @abstractmethod
    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm in front of the head."""

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of this shard's weights in memory."""
        return sum(tensor.nbytes for tensor in self.destinations().values())

    def kv_bytes(self, num_slots: int, max_seq_len: int) -> int:
        """What a cache of that size would reserve."""
        per_position = 2 * self.config.num_kv_heads * self.config.head_dim
        layers = self.layer_end - self.layer_start
        return layers * num_slots * max_seq_len * per_position * self.compute_dtype.itemsize

    def new_cache(self, num_slots: int, max_seq_len: int) -> KVCache:
        """An empty cache for this shard's layers."""
        return KVCache(
            num_layers=self.layer_end - self.layer_start,
            num_slots=num_slots,
            num_kv_heads=self.config.num_kv_heads,
            max_seq_len=max_seq_len,
            head_dim=self.config.head_dim,
            dtype=self.compute_dtype,
        )

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Run a step's rows through the shard's layers and append them to the cache.

        Shapes: inputs [rows] int64 token ids on the first stage, else [rows, hidden]; returns
        [rows, hidden]. Rows follow each other as the batch's segments do. Raises MessageError when
        the batch does not fit the inputs or the cache.
        """
        if inputs.shape[0] != num_tokens(batch) or not batch:
            raise MessageError(
                f"a step of {num_tokens(batch)} tokens came with {inputs.shape[0]} rows"
            )
        cache.reserve(batch)
        hidden, step = self._begin(inputs, batch)
        for index in range(self.layer_end - self.layer_start):
            hidden = self._layer(index, hidden, step, cache.keys[index], cache.values[index])
        cache.advance(batch)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head of rows of the last stage's output: [n, hidden] -> [n, vocab]."""
        assert self._head is not None, "only the last stage has a head"
        return self._head(self._final_norm(hidden))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[rows] -> [rows, hidden], a copy."""
        if self._embedding is not None:
            return self._embedding.index_select(0, token_ids)
        assert self._head is not None, "the first stage has an embedding or shares the head's"
        return self._head.weight.index_select(1, token_ids).t().contiguous()

    def _vocabulary(self, embedding_name: str, head_name: str) -> dict[str, torch.Tensor]:
        """Destinations of embedding and head under the checkpoint's names."""
        found = {}
        if self._embedding is not None:
            found[embedding_name] = self._embedding
        if self._head is not None:
            name = embedding_name if self.config.tie_word_embeddings else head_name
            found[name] = self._head.out_in()
        return found
