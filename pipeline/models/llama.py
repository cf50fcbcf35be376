"""Llama and relatives: Llama 2 and 3, SmolLM2, TinyLlama, Mistral, Qwen2.

Attribute names are the checkpoint's; q, k, v and gate, up are one matrix each in memory.
"""

from collections.abc import Sequence

from pipeline.dtypes import Array, Precision
from pipeline.kernels.base import HeadShape, Kernels, Norm
from pipeline.models.config import LlamaConfig
from pipeline.models.layer_parts import OWN, LayerMaker, LayerParts
from pipeline.models.residual import ResidualStream
from pipeline.models.rope import RopeTable, rope_frequencies
from pipeline.models.shard_model import Ends, Layer, Names, Shard
from pipeline.models.workspace import ForwardPass
from pipeline.weights.tensor_sinks import Sink


class LlamaLayer:
    """Pre-norm attention with rotary positions and grouped KV heads, and a gated MLP."""

    def __init__(self, config: LlamaConfig, heads: HeadShape, make: LayerMaker) -> None:
        hidden, eps = config.hidden_dim, config.norm_eps
        self._kernels, self._heads = make.kernels, heads
        self._width = heads.num_heads * heads.head_dim
        self._kv_width = heads.num_kv_heads * heads.head_dim
        self._inner = config.intermediate_size

        self.input_layernorm = make.rms_norm(hidden, eps)
        self.qkv_proj = make.linear(
            "self_attn.qkv_proj", hidden, heads.qkv_width, bias=config.qkv_bias
        )
        self.self_attn_o_proj = make.linear(
            "self_attn.o_proj", self._width, hidden, bias=config.output_bias
        )
        self.post_attention_layernorm = make.rms_norm(hidden, eps)
        self.gate_up_proj = make.linear(
            "mlp.gate_up_proj", hidden, 2 * self._inner, bias=config.mlp_bias
        )
        self.mlp_down_proj = make.linear("mlp.down_proj", self._inner, hidden, bias=config.mlp_bias)

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""
        keys_from, values_from = self._width, self._width + self._kv_width
        return (
            self.input_layernorm.sinks("input_layernorm")
            | self.qkv_proj.sinks("self_attn.q_proj", 0, keys_from)
            | self.qkv_proj.sinks("self_attn.k_proj", keys_from, values_from)
            | self.qkv_proj.sinks("self_attn.v_proj", values_from)
            | self.self_attn_o_proj.sinks("self_attn.o_proj")
            | self.post_attention_layernorm.sinks("post_attention_layernorm")
            | self.gate_up_proj.sinks("mlp.gate_proj", 0, self._inner)
            | self.gate_up_proj.sinks("mlp.up_proj", self._inner)
            | self.mlp_down_proj.sinks("mlp.down_proj")
        )

    def __call__(self, hidden: Array, step: ForwardPass, keys: Array, values: Array) -> None:
        """Transform hidden [rows, hidden] in place, appending to this layer's cache."""
        assert step.rope is not None, "every step of this family has rotary positions"
        kernels = self._kernels
        qkv = self.qkv_proj(self.input_layernorm(hidden, step.normed), step.qkv)
        kernels.rope(qkv, self._heads, *step.rope)
        mixed = step.attention(qkv, keys, values, step.mixed)
        self.self_attn_o_proj(mixed, hidden, residual=hidden)
        for block in step.blocks:
            normed = self.post_attention_layernorm(block.hidden, block.normed)
            inner = kernels.silu_mul(self.gate_up_proj(normed, block.gate_up), block.inner)
            self.mlp_down_proj(inner, block.hidden, residual=block.hidden)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        norms = (self.input_layernorm, self.post_attention_layernorm)
        linears = (self.qkv_proj, self.self_attn_o_proj, self.gate_up_proj, self.mlp_down_proj)
        return sum(each.num_bytes for each in (*norms, *linears))


class LlamaShard(Shard):
    """A range of a Llama-like model's layers."""

    NAMES = Names(
        embedding="model.embed_tokens", layers="model.layers", norm="model.norm", head="lm_head"
    )
    STREAM = ResidualStream(
        readers={
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        },
        writers=("self_attn.o_proj", "mlp.down_proj"),
    )

    def __init__(
        self,
        config: LlamaConfig,
        layer_start: int,
        layer_end: int,
        *,
        kernels: Kernels,
        precision: Precision,
        parts: LayerParts = OWN,
        ends: Ends | None = None,
    ) -> None:
        super().__init__(
            config,
            layer_start,
            layer_end,
            kernels=kernels,
            precision=precision,
            parts=parts,
            ends=ends,
            is_gated=True,
            window=config.sliding_window,
        )
        self.layers = [LlamaLayer(config, self.heads, make) for make in self.layer_makers()]
        self.norm = kernels.rms_norm(config.hidden_dim, config.norm_eps) if self.is_last else None
        self.frequencies = rope_frequencies(config)
        self._table = RopeTable(self.frequencies, kernels, config.max_positions)

    @property
    def _layers(self) -> Sequence[Layer]:
        return self.layers

    @property
    def _norm(self) -> Norm | None:
        return self.norm

    def _place(self, hidden: Array, positions: Array, end: int) -> tuple[Array, Array]:
        del hidden
        return self._table.rows(positions, end)
