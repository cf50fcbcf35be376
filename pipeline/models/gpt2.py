"""GPT-2. Attribute names are the checkpoint's; its Conv1D weights are stored [in, out]."""

from collections.abc import Mapping, Sequence

from pipeline.dtypes import Array, Precision
from pipeline.kernels.base import Activation, Kernels, Norm
from pipeline.models.config import GPT2Config
from pipeline.models.layer_parts import OWN, LayerMaker, LayerParts
from pipeline.models.residual import ResidualStream
from pipeline.models.shard_model import Ends, Layer, Names, Shard
from pipeline.models.workspace import ForwardPass
from pipeline.weights.tensor_sinks import CopySink, Sink

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


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

    NAMES = Names(embedding="wte", layers="h", norm="ln_f", head="lm_head")
    STREAM = ResidualStream(
        readers={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
        writers=("attn.c_proj", "mlp.c_proj"),
        is_centred=True,
        is_in_out=True,
        positions="wpe.weight",
    )

    def __init__(
        self,
        config: GPT2Config,
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
            is_gated=False,
            has_head_bias=config.rotation is not None,
        )
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

    def _place(self, hidden: Array, positions: Array, end: int) -> None:
        del end
        if self.wpe is not None:
            self.kernels.lookup(self.wpe, positions, hidden, adds=True)
