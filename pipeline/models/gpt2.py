"""GPT-2. Attribute names are the checkpoint's; its Conv1D weights are already [in, out]."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.models.base import Shard
from pipeline.models.batch import Batch
from pipeline.models.config import GPT2Config
from pipeline.models.layers import Step, attend, batch_positions, make_spans
from pipeline.models.linear import Linear, MatVec

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


class LayerNorm:
    """(x - mean) / std, scaled and shifted."""

    __slots__ = ("bias", "eps", "shape", "weight")

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        self.weight = torch.empty(size, dtype=dtype)
        self.bias = torch.empty(size, dtype=dtype)
        self.shape = (size,)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised rows, [rows, size] -> [rows, size]."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def destinations(self, name: str) -> dict[str, torch.Tensor]:
        """Tensor name -> memory to load it into."""
        return {f"{name}.weight": self.weight, f"{name}.bias": self.bias}


class GPT2Layer:
    """Pre-norm attention and MLP, both with biases."""

    __slots__ = (
        "activation",
        "attn_c_attn",
        "attn_c_proj",
        "ln_1",
        "ln_2",
        "mlp_c_fc",
        "mlp_c_proj",
        "num_heads",
    )

    def __init__(self, config: GPT2Config, dtype: torch.dtype, matvec: MatVec) -> None:
        hidden, inner, eps = config.hidden_dim, config.intermediate_size, config.norm_eps

        def linear(num_in: int, num_out: int) -> Linear:
            return Linear(num_in, num_out, bias=True, dtype=dtype, matvec=matvec)

        self.num_heads = config.num_heads
        self.activation = ACTIVATIONS[config.activation_function]
        self.ln_1 = LayerNorm(hidden, eps, dtype)
        self.attn_c_attn = linear(hidden, 3 * hidden)
        self.attn_c_proj = linear(hidden, hidden)
        self.ln_2 = LayerNorm(hidden, eps, dtype)
        self.mlp_c_fc = linear(hidden, inner)
        self.mlp_c_proj = linear(inner, hidden)

    def destinations(self) -> dict[str, torch.Tensor]:
        """Tensor name below the layer's prefix -> memory to load it into."""
        found = self.ln_1.destinations("ln_1") | self.ln_2.destinations("ln_2")
        for name, linear in (
            ("attn.c_attn", self.attn_c_attn),
            ("attn.c_proj", self.attn_c_proj),
            ("mlp.c_fc", self.mlp_c_fc),
            ("mlp.c_proj", self.mlp_c_proj),
        ):
            assert linear.bias is not None, "every linear of GPT-2 has one"
            found |= {f"{name}.weight": linear.weight, f"{name}.bias": linear.bias}
        return found

    def __call__(
        self, hidden: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden], appending to this layer's keys and values."""
        rows = hidden.shape[0]
        # [rows, 3 * hidden] -> three of [rows, heads, head_dim]
        query, key, value = (
            self.attn_c_attn(self.ln_1(hidden)).view(rows, 3, self.num_heads, -1).unbind(1)
        )
        mixed = attend(query, key, value, step.spans, keys, values)
        hidden = self.attn_c_proj(mixed).add_(hidden)
        inner = self.activation(self.mlp_c_fc(self.ln_2(hidden)))
        return self.mlp_c_proj(inner).add_(hidden)


class GPT2Shard(Shard):
    """A range of GPT-2's layers."""

    def __init__(
        self,
        config: GPT2Config,
        layer_start: int,
        layer_end: int,
        *,
        dtype: torch.dtype,
        matvec: MatVec,
    ) -> None:
        super().__init__(config, layer_start, layer_end, dtype=dtype, matvec=matvec)
        self.h = [GPT2Layer(config, dtype, matvec) for _ in range(layer_start, layer_end)]
        self.wpe = (
            torch.empty(config.max_positions, config.hidden_dim, dtype=dtype)
            if self.is_first
            else None
        )
        self.ln_f = LayerNorm(config.hidden_dim, config.norm_eps, dtype) if self.is_last else None

    def destinations(self) -> Mapping[str, torch.Tensor]:
        """Unprefixed tensor name -> memory to load it into."""
        found = self._vocabulary("wte.weight", "lm_head.weight")
        if self.wpe is not None:
            found["wpe.weight"] = self.wpe
        for index, layer in enumerate(self.h, self.layer_start):
            found |= {f"h.{index}.{name}": each for name, each in layer.destinations().items()}
        if self.ln_f is not None:
            found |= self.ln_f.destinations("ln_f")
        return found

    def _begin(self, inputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Step]:
        positions = batch_positions(batch)
        step = Step(make_spans(batch, None, self.compute_dtype), positions)
        if self.wpe is None:
            return inputs.to(self.compute_dtype), step
        return self._embed(inputs).add_(self.wpe.index_select(0, positions)), step

    def _layer(
        self,
        index: int,
        hidden: torch.Tensor,
        step: Step,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        return self.h[index](hidden, step, keys, values)

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.ln_f is not None, "only the last stage has a final norm"
        return self.ln_f(hidden)
