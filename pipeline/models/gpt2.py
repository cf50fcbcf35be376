"""GPT-2. Attribute names are the checkpoint's; its Conv1D weights are stored [in, out]."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pipeline.dtypes import Array
from pipeline.kernels.base import Activation, Norm
from pipeline.models.ends import Names
from pipeline.models.family import Family
from pipeline.models.layer_parts import LayerMaker
from pipeline.models.model_config import (
    Epsilon,
    Fields,
    Heads,
    Inner,
    JsonFields,
    ModelConfig,
    NumLayers,
    Width,
    eos_token_ids_of,
    head_dim_of,
)
from pipeline.models.residual import ResidualStream
from pipeline.models.rope_config import Positions
from pipeline.models.shard_model import Layer, Shard, ShardSpec
from pipeline.models.workspace import ForwardPass
from pipeline.weights.tensor_sinks import CopySink, Sink
from transport.frozen import frozen

NAMES = Names(embedding="wte", layers="h", norm="ln_f", head="lm_head")
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@frozen(kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2: learned positions, LayerNorm, one activation between two linears."""

    activation_function: str


class GPT2Json(JsonFields):
    """Its config.json."""

    n_layer: NumLayers
    n_embd: Width
    n_head: Heads
    n_positions: Positions
    n_inner: Inner | None = None
    layer_norm_epsilon: Epsilon = 1e-5
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"] = "gelu_new"
    tie_word_embeddings: bool = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False


def read(fields: Fields, generation: Fields) -> GPT2Config:
    """The configuration that a config.json says. Raises ModelError, ValidationError."""
    raw = GPT2Json.model_validate(fields)
    return GPT2Config(
        architecture="gpt2",
        num_layers=raw.n_layer,
        hidden_dim=raw.n_embd,
        num_heads=raw.n_head,
        num_kv_heads=raw.n_head,
        head_dim=head_dim_of(raw.n_embd, raw.n_head, "n_embd/n_head"),
        vocab_size=raw.vocab_size,
        max_positions=raw.n_positions,
        eos_token_ids=eos_token_ids_of(raw.eos_token_id, generation.get("eos_token_id")),
        intermediate_size=raw.n_inner or 4 * raw.n_embd,
        norm_eps=raw.layer_norm_epsilon,
        tie_word_embeddings=raw.tie_word_embeddings,
        activation_function=raw.activation_function,
    )


class GPT2Layer:
    """Pre-norm attention and MLP, both with biases."""

    def __init__(self, config: GPT2Config, make: LayerMaker) -> None:
        hidden, inner, eps = config.hidden_dim, config.intermediate_size, config.norm_eps
        activation = ACTIVATIONS[config.activation_function]

        # rotated weights have centring, gain and shift in them: see planning/rotated_weights.py
        norm = make.layer_norm if config.rotation is None else make.rms_norm

        self.ln_1 = norm(hidden, eps)
        self.attn_c_attn = make.linear("attn.c_attn", hidden, 3 * hidden, bias=True)
        self.attn_c_proj = make.linear("attn.c_proj", hidden, hidden, bias=True)
        self.ln_2 = norm(hidden, eps)
        self.mlp_c_fc = make.linear("mlp.c_fc", hidden, inner, bias=True, activation=activation)
        self.mlp_c_proj = make.linear("mlp.c_proj", inner, hidden, bias=True)

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""
        return (
            self.ln_1.sinks("ln_1")
            | self.attn_c_attn.sinks("attn.c_attn", is_in_out=True)
            | self.attn_c_proj.sinks("attn.c_proj", is_in_out=True)
            | self.ln_2.sinks("ln_2")
            | self.mlp_c_fc.sinks("mlp.c_fc", is_in_out=True)
            | self.mlp_c_proj.sinks("mlp.c_proj", is_in_out=True)
        )

    def __call__(self, hidden: Array, step: ForwardPass, keys: Array, values: Array) -> None:
        """Transform hidden [rows, hidden] in place, appending to this layer's cache."""
        qkv = self.attn_c_attn(self.ln_1(hidden, step.normed), step.qkv)
        mixed = step.attention(qkv, keys, values, step.mixed)
        self.attn_c_proj(mixed, hidden, residual=hidden)
        for block in step.blocks:
            inner = self.mlp_c_fc(self.ln_2(block.hidden, block.normed), block.inner)
            self.mlp_c_proj(inner, block.hidden, residual=block.hidden)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        linears = (self.attn_c_attn, self.attn_c_proj, self.mlp_c_fc, self.mlp_c_proj)
        return sum(each.num_bytes for each in (self.ln_1, self.ln_2, *linears))


class GPT2Shard(Shard):
    """A range of GPT-2's layers."""

    def __init__(self, config: GPT2Config, spec: ShardSpec) -> None:
        is_rotated = config.rotation is not None
        super().__init__(config, spec, NAMES, is_gated=False, has_head_bias=is_rotated)
        kernels = spec.kernels
        self.wpe: Array | None = None
        if self.is_first:
            self.wpe = kernels.weights(config.max_positions, config.hidden_dim)
        self.h = [GPT2Layer(config, make) for make in self.layer_makers()]
        norm = kernels.layer_norm if config.rotation is None else kernels.rms_norm
        self.ln_f = norm(config.hidden_dim, config.norm_eps) if self.is_last else None

    def destinations(self) -> Mapping[str, Sink]:
        """Tensor name in the checkpoint (unprefixed) -> where it goes."""
        found = dict(super().destinations())
        if self.wpe is not None:
            found["wpe.weight"] = CopySink(self.wpe, fill=self.kernels.fill)
        return found

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of this shard's weights in memory."""
        return super().num_weight_bytes + (0 if self.wpe is None else self.wpe.nbytes)

    @property
    def _layers(self) -> Sequence[Layer]:
        return self.h

    @property
    def _norm(self) -> Norm | None:
        return self.ln_f

    def _place(self, hidden: Array, positions: Array) -> None:
        if self.wpe is not None:
            self.kernels.lookup(self.wpe, positions, hidden, adds=True)


FAMILY = Family(
    read=read,
    build=GPT2Shard,
    names=NAMES,
    stream=ResidualStream(
        readers={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
        writers=("attn.c_proj", "mlp.c_proj"),
        is_centred=True,
        is_in_out=True,
        positions="wpe.weight",
    ),
    prefix="transformer.",
)
