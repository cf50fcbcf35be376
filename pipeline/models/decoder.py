"""The layers of decoders with rotary positions, RMSNorm and gated MLPs, as a configuration says.

Names are the checkpoints'; q, k, v and gate, up are one matrix each in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from pipeline.dtypes import Array
from pipeline.kernels.base import HeadShape, Norm, RMSNorm
from pipeline.models.decoder_config import DecoderConfig
from pipeline.models.ends import Names
from pipeline.models.layer_parts import LayerMaker
from pipeline.models.residual import ResidualStream
from pipeline.models.routed_mlp import RoutedMLP
from pipeline.models.shard_model import Layer, Shard, ShardSpec
from pipeline.models.workspace import Block, ForwardPass
from pipeline.weights.tensor_sinks import CopySink, Sink

NAMES = Names(
    embedding="model.embed_tokens", layers="model.layers", norm="model.norm", head="lm_head"
)
# Of those that norm rows in front of a branch only.
STREAM = ResidualStream(
    readers={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    writers=("self_attn.o_proj", "mlp.down_proj"),
)


class MLP(Protocol):
    """What comes behind attention."""

    # Whether it is the same calls whatever the rows.
    is_fixed: bool

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""

    def __call__(self, rows: Array, block: Block, out: Array, residual: Array | None) -> None:
        """What it makes of rows [n, hidden], and the residual, into out [n, hidden]."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""


class GatedMLP:
    """down(gate(x) * up(x))."""

    is_fixed = True

    def __init__(self, config: DecoderConfig, make: LayerMaker) -> None:
        hidden, inner = config.hidden_dim, config.intermediate_size
        bias = config.mlp_bias
        self._inner, self._is_fused = inner, config.is_fused
        self._gate = make.gate(config.gate)
        self.gate_up_proj = make.linear("mlp.gate_up_proj", hidden, 2 * inner, bias=bias)
        self.down_proj = make.linear("mlp.down_proj", inner, hidden, bias=bias)

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""
        found = self.down_proj.sinks("mlp.down_proj")
        if self._is_fused:
            return found | self.gate_up_proj.sinks("mlp.gate_up_proj")
        return (
            found
            | self.gate_up_proj.sinks("mlp.gate_proj", 0, self._inner)
            | self.gate_up_proj.sinks("mlp.up_proj", self._inner)
        )

    def __call__(self, rows: Array, block: Block, out: Array, residual: Array | None) -> None:
        """What it makes of rows [n, hidden], and the residual, into out [n, hidden]."""
        inner = self._gate(self.gate_up_proj(rows, block.gate_up), block.inner)
        self.down_proj(inner, out, residual=residual)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        return self.gate_up_proj.num_bytes + self.down_proj.num_bytes


class DecoderLayer:
    """Attention and an MLP, each with a norm in front of it or behind, or both."""

    def __init__(
        self, config: DecoderConfig, index: int, heads: HeadShape, make: LayerMaker
    ) -> None:
        hidden, names = config.hidden_dim, config.norms
        self._kernels, self._heads, self._is_fused = make.kernels, heads, config.is_fused
        self._width = heads.num_heads * heads.head_dim
        self._kv_width = heads.num_kv_heads * heads.head_dim
        self._norms: dict[str, Norm] = {}

        def norm(name: str | None, size: int = hidden, scale: float = 1.0) -> RMSNorm | None:
            if name is None:
                return None
            gain = replace(config.gain, scale=scale)
            self._norms[name] = made = make.rms_norm(size, config.norm_eps, gain)
            return made

        self._before_attention = norm(names.before_attention)
        self.qkv_proj = make.linear(
            "self_attn.qkv_proj", hidden, heads.qkv_width, bias=config.qkv_bias
        )
        self._q_norm, self._k_norm = None, None
        if config.qk_norm is not None:
            is_whole = config.qk_norm == "width"
            sizes = (self._width, self._kv_width) if is_whole else (heads.head_dim,) * 2
            self._q_norm = norm("self_attn.q_norm", sizes[0], config.query_scale)
            self._k_norm = norm("self_attn.k_norm", sizes[1])
        self._sinks: Array | None = None
        if config.has_sinks:
            self._sinks = make.kernels.weights(heads.num_heads)
        self.o_proj = make.linear("self_attn.o_proj", self._width, hidden, bias=config.output_bias)
        self._after_attention = norm(names.after_attention)
        self._before_mlp = norm(names.before_mlp)
        is_routed = config.experts is not None and index in config.experts.layers
        self.mlp: MLP = RoutedMLP(config, make) if is_routed else GatedMLP(config, make)
        self._after_mlp = norm(names.after_mlp)

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""
        keys_from, values_from = self._width, self._width + self._kv_width
        found = self.o_proj.sinks("self_attn.o_proj") | self.mlp.sinks()
        for name, norm in self._norms.items():
            found |= norm.sinks(name)
        if self._sinks is not None:
            found["self_attn.sinks"] = CopySink(self._sinks, fill=self._kernels.fill)
        if self._is_fused:
            return found | self.qkv_proj.sinks("self_attn.qkv_proj")
        return (
            found
            | self.qkv_proj.sinks("self_attn.q_proj", 0, keys_from)
            | self.qkv_proj.sinks("self_attn.k_proj", keys_from, values_from)
            | self.qkv_proj.sinks("self_attn.v_proj", values_from)
        )

    def __call__(self, hidden: Array, step: ForwardPass, keys: Array, values: Array) -> None:
        """Transform hidden [rows, hidden] in place, appending to this layer's cache."""
        before, after = self._before_attention, self._after_attention
        rows = hidden if before is None else before(hidden, step.normed)
        qkv = self._turned(self.qkv_proj(rows, step.qkv), step)
        mixed = step.attention(qkv, keys, values, step.mixed, self._sinks)
        if after is None:
            self.o_proj(mixed, hidden, residual=hidden)
        else:
            after.add(self.o_proj(mixed, step.branch), hidden)
        for block in step.blocks:
            self._transform(block)

    def _turned(self, qkv: Array, step: ForwardPass) -> Array:
        """Queries and keys in place: normed where they are, and told their positions."""
        if self._q_norm is not None and self._k_norm is not None:
            self._q_norm.within(qkv[:, : self._width])
            self._k_norm.within(qkv[:, self._width : self._width + self._kv_width])
        if step.rope is not None:
            self._kernels.rope(qkv, self._heads, *step.rope)
        return qkv

    def _transform(self, block: Block) -> None:
        """Some rows by the MLP."""
        before, after = self._before_mlp, self._after_mlp
        rows = block.hidden if before is None else before(block.hidden, block.normed)
        if after is None:
            self.mlp(rows, block, block.hidden, block.hidden)
        else:
            self.mlp(rows, block, block.branch, None)
            after.add(block.branch, block.hidden)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        linears = self.qkv_proj.num_bytes + self.o_proj.num_bytes + self.mlp.num_bytes
        sinks = 0 if self._sinks is None else int(self._sinks.nbytes)
        return linears + sinks + sum(each.num_bytes for each in self._norms.values())


class DecoderShard(Shard):
    """A range of such a model's layers."""

    def __init__(self, config: DecoderConfig, spec: ShardSpec) -> None:
        super().__init__(config, spec, NAMES, is_gated=True)
        self.layers = [
            DecoderLayer(config, index, config.shape(index).heads, make)
            for index, make in zip(spec.layers, self.layer_makers(), strict=True)
        ]
        self.has_fixed_steps = all(layer.mlp.is_fixed for layer in self.layers)
        self.norm: Norm | None = None
        if self.is_last:
            self.norm = self._make.rms_norm(config.hidden_dim, config.norm_eps, config.gain)

    @property
    def _layers(self) -> Sequence[Layer]:
        return self.layers

    @property
    def _norm(self) -> Norm | None:
        return self.norm
