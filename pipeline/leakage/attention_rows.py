"""Keys and values of a layer as anybody computes them of rows, and as a holder has them encoded.

Of Llama's relatives: what reads a row is one norm and two matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dtypes import Floats
from pipeline.errors import InputError
from pipeline.models.decoder import STREAM
from pipeline.models.decoder_config import DecoderConfig
from pipeline.models.ends import NO_ENDS
from pipeline.models.model_config import ModelConfig
from pipeline.models.registry import required_tensors, stored_as
from pipeline.models.rope import rope_frequencies
from pipeline.models.rope_config import Rope
from pipeline.models.stored_model import family_of
from pipeline.scx.codec import LayerCodec
from pipeline.scx.keys import KeyGenerator
from pipeline.weights.checkpoint import load_tensors
from pipeline.weights.tensor_sinks import CopySink

NORM = "input_layernorm"
KEYS, VALUES = "self_attn.k_proj", "self_attn.v_proj"


@dataclass(frozen=True, slots=True)
class LayerReaders:
    """What a layer reads rows by: [KV heads, tokens, head_dim] of rows [tokens, hidden]."""

    config: DecoderConfig
    rope: Rope
    gain: Floats
    keys: Floats  # [KV heads * head_dim, hidden]
    values: Floats

    @classmethod
    def load(cls, model_dir: Path, config: ModelConfig, layer: int) -> "LayerReaders":
        """Raises InputError for other families, ModelError."""
        rope = config.shape(layer).rope
        if (
            not isinstance(config, DecoderConfig)
            or family_of(config).stream is not STREAM
            or config.qkv_bias
            or config.qk_norm is not None
            or rope is None
        ):
            raise InputError(
                f"{config.architecture}: encoded rows are measured of Llama-like models without "
                "biases and norms of queries and keys"
            )
        names = [f"{family_of(config).names.layers}.{layer}.{each}.weight"
                 for each in (NORM, KEYS, VALUES)]  # fmt: skip
        files = stored_as(model_dir, config, range(layer, layer + 1), NO_ENDS)
        planned = required_tensors(model_dir, config, range(layer, layer + 1), NO_ENDS)
        arrays = [np.empty(planned[files[name]].shape, np.float32) for name in names]
        sinks = {files[name]: CopySink(each) for name, each in zip(names, arrays, strict=True)}
        load_tensors(model_dir, sinks, expected_hashes=None, packing=config.packing)
        return cls(config, rope.within(config.max_positions), *arrays)

    def keys_of(self, rows: Floats) -> Floats:
        """Before RoPE."""
        return self._read(self.keys, rows)

    def values_of(self, rows: Floats) -> Floats:
        """As they are cached."""
        return self._read(self.values, rows)

    def turned(self, keys: Floats, positions: Sequence[int] | np.ndarray) -> Floats:
        """Keys at positions, one of each or the same of all, as they are cached."""
        angles = np.outer(positions, rope_frequencies(self.rope).astype(np.float64))
        cos, sin = (
            np.hstack((each, each)).astype(np.float32) for each in (np.cos(angles), np.sin(angles))
        )
        half = keys.shape[-1] // 2
        crossed = np.concatenate((-keys[..., half:], keys[..., :half]), -1)
        turned: Floats = keys * cos + crossed * sin
        return turned

    def _read(self, matrix: Floats, rows: Floats) -> Floats:
        squares = np.einsum("ij,ij->i", rows, rows)[:, None] / rows.shape[1]
        read = (rows / np.sqrt(squares + self.config.norm_eps) * self.gain) @ matrix.T
        heads = self.config.num_kv_heads
        found: Floats = read.reshape(len(rows), heads, -1).transpose(1, 0, 2)
        return found


@dataclass(frozen=True, slots=True)
class HeldText:
    """A text's rows in a layer as their holder has them: [KV heads, tokens, width].

    `keys`, `values`: row after row, as they come while a text is decoded. `mixed`: keys and values
    of a prompt that came at once, in a secret order of each head.
    """

    keys: Floats
    values: Floats
    mixed: tuple[Floats, Floats]

    @classmethod
    def encode(cls, readers: LayerReaders, rows: Floats, seed: bytes, layer: int) -> "HeldText":
        """With keys that are derived from a seed."""
        keys = readers.turned(readers.keys_of(rows), np.arange(len(rows)))
        values = readers.values_of(rows)
        config = readers.config
        made = KeyGenerator(len(rows), config.hidden_dim, config.head_dim, seed=seed)
        codec = LayerCodec(made, layer, config.num_kv_heads)
        first = codec.encode(keys, values)
        sealed, keys_held, values_held = codec.seal(first), [], []
        for row in range(len(rows)):  # what came together would be in a secret order
            later = codec.append(keys[:, row : row + 1], values[:, row : row + 1], sealed)
            keys_held.append(later.keys)
            values_held.append(later.values)
        return cls(
            np.concatenate(keys_held, 1),
            np.concatenate(values_held, 1),
            (first.keys, first.values),
        )
