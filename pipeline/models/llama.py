"""Llama and relatives: Llama 2 and 3, SmolLM2, TinyLlama, Mistral, Qwen2.

Attribute names are the checkpoint's; q, k, v and gate, up are one matrix each in memory.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.models.base import Shard
from pipeline.models.batch import Batch
from pipeline.models.config import LlamaConfig
from pipeline.models.layers import (
    Step,
    apply_rope,
    attend,
    batch_positions,
    make_spans,
    rope_frequencies,
    rope_rows,
)
from pipeline.models.linear import Linear, MatVec


class RMSNorm:
    """x / rms(x), scaled."""

    __slots__ = ("eps", "shape", "weight")

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        self.weight = torch.empty(size, dtype=dtype)
        self.shape = (size,)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised rows, [rows, size] -> [rows, size]."""
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class LlamaLayer:
    """Pre-norm attention with rotary positions and grouped KV heads, and a gated MLP."""

    __slots__ = (
        "gate_up_proj",
        "head_dim",
        "inner",
        "input_layernorm",
        "mlp_down_proj",
        "num_heads",
        "num_kv_heads",
        "post_attention_layernorm",
        "qkv_proj",
        "self_attn_o_proj",
    )

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, matvec: MatVec) -> None:
        hidden, eps = config.hidden_dim, config.norm_eps

        def linear(num_in: int, num_out: int, bias: bool) -> Linear:
            return Linear(num_in, num_out, bias=bias, dtype=dtype, matvec=matvec)

        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.inner = config.head_dim, config.intermediate_size
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self.input_layernorm = RMSNorm(hidden, eps, dtype)
        self.qkv_proj = linear(hidden, width + 2 * kv_width, config.qkv_bias)
        self.self_attn_o_proj = linear(width, hidden, config.output_bias)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype)
        self.gate_up_proj = linear(hidden, 2 * self.inner, config.mlp_bias)
        self.mlp_down_proj = linear(self.inner, hidden, config.mlp_bias)

    def destinations(self) -> dict[str, torch.Tensor]:
        """Tensor name below the layer's prefix -> memory to load it into."""
        found = {
            "input_layernorm.weight": self.input_layernorm.weight,
            "post_attention_layernorm.weight": self.post_attention_layernorm.weight,
        }
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        whole = (0, None)
        for name, linear, (first, last) in (
            ("self_attn.q_proj", self.qkv_proj, (0, width)),
            ("self_attn.k_proj", self.qkv_proj, (width, width + kv_width)),
            ("self_attn.v_proj", self.qkv_proj, (width + kv_width, None)),
            ("self_attn.o_proj", self.self_attn_o_proj, whole),
            ("mlp.gate_proj", self.gate_up_proj, (0, self.inner)),
            ("mlp.up_proj", self.gate_up_proj, (self.inner, None)),
            ("mlp.down_proj", self.mlp_down_proj, whole),
        ):
            found[f"{name}.weight"] = linear.out_in(first, last)
            if linear.bias is not None:
                found[f"{name}.bias"] = linear.bias[first:last]
        return found

    def __call__(
        self, hidden: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden], appending to this layer's keys and values."""
        assert step.rope is not None, "every step of this family has rotary positions"
        rows, num_rotated = hidden.shape[0], self.num_heads + self.num_kv_heads
        # [rows, (heads + 2 kv_heads) * head_dim] -> [rows, heads + 2 kv_heads, head_dim]
        qkv = self.qkv_proj(self.input_layernorm(hidden)).view(rows, -1, self.head_dim)
        rotated = apply_rope(qkv[:, :num_rotated], step.rope)
        mixed = attend(
            rotated[:, : self.num_heads],
            rotated[:, self.num_heads :],
            qkv[:, num_rotated:],
            step.spans,
            keys,
            values,
        )
        hidden = self.self_attn_o_proj(mixed).add_(hidden)
        gate_up = self.gate_up_proj(self.post_attention_layernorm(hidden))
        inner = F.silu(gate_up[:, : self.inner]).mul_(gate_up[:, self.inner :])
        return self.mlp_down_proj(inner).add_(hidden)


class LlamaShard(Shard):
    """A range of a Llama-like model's layers."""

    def __init__(
        self,
        config: LlamaConfig,
        layer_start: int,
        layer_end: int,
        *,
        dtype: torch.dtype,
        matvec: MatVec,
    ) -> None:
        super().__init__(config, layer_start, layer_end, dtype=dtype, matvec=matvec)
        self.layers = [LlamaLayer(config, dtype, matvec) for _ in range(layer_start, layer_end)]
        self.norm = RMSNorm(config.hidden_dim, config.norm_eps, dtype) if self.is_last else None
        self._frequencies = rope_frequencies(config)
        self._window = config.sliding_window

    def destinations(self) -> Mapping[str, torch.Tensor]:
        """Unprefixed tensor name -> memory to load it into."""
        found = self._vocabulary("model.embed_tokens.weight", "lm_head.weight")
        for index, layer in enumerate(self.layers, self.layer_start):
            prefix = f"model.layers.{index}."
            found |= {f"{prefix}{name}": each for name, each in layer.destinations().items()}
        if self.norm is not None:
            found["model.norm.weight"] = self.norm.weight
        return found

    def _begin(self, inputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Step]:
        positions = batch_positions(batch)
        step = Step(
            make_spans(batch, self._window, self.compute_dtype),
            positions,
            rope_rows(self._frequencies, positions, self.compute_dtype),
        )
        return self._embed(inputs) if self.is_first else inputs.to(self.compute_dtype), step

    def _layer(
        self,
        index: int,
        hidden: torch.Tensor,
        step: Step,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        return self.layers[index](hidden, step, keys, values)

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.norm is not None, "only the last stage has a final norm"
        return self.norm(hidden)
