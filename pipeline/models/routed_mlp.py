"""An MLP made of experts, of which each row passes through those that a router chooses for it.

Where kernels have no operation for all of that, what they would record depends on the rows. A row's
result does not depend on the rows beside it: its shares are its own, and what its experts make of
it is added up in their order.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pipeline.dtypes import FLOAT32, Array, Floats, HostArray
from pipeline.kernels.base import Linear
from pipeline.kernels.routing import Routing
from pipeline.models.decoder_config import DecoderConfig, Experts
from pipeline.models.layer_parts import LayerMaker
from pipeline.models.workspace import Block
from pipeline.weights.tensor_sinks import Sink
from pipeline.weights.tensor_stacks import BiasStackSink, StackSink


def route(logits: Floats, experts: Experts) -> Iterator[tuple[int, HostArray, Floats]]:
    """Experts that any row passes through, ascending, with these rows and their shares.

    Shapes: logits [rows, experts]; rows [n] int64, shares [n, 1].
    """
    scores = logits.astype(np.float64)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : experts.num_chosen]
    shares = np.take_along_axis(scores, chosen, axis=1)
    if experts.are_normalised:
        shares /= shares.sum(axis=1, keepdims=True)
    for expert in np.unique(chosen):
        rows, place = np.nonzero(chosen == expert)
        yield int(expert), rows, shares[rows, place][:, None].astype(FLOAT32)


class RoutedMLP:
    """A router, and gated MLPs side by side."""

    def __init__(self, config: DecoderConfig, make: LayerMaker) -> None:
        assert config.experts is not None, "only layers with experts have a router"
        self._experts = experts = config.experts
        hidden, self._inner = config.hidden_dim, experts.intermediate_size
        self._kernels = kernels = make.kernels
        self._gate = make.gate(config.gate)
        # a small matrix, whose errors would send rows to other experts
        exact = replace(make, precision="float32")
        bias = experts.has_bias
        self.router = exact.linear(
            f"{experts.block}.{experts.router}", hidden, experts.num_experts, bias=bias
        )
        alike = make.alike(f"{experts.block}.experts.")  # kernels may compute them at once
        self.experts: list[tuple[Linear, Linear]] = []
        for index in range(experts.num_experts):
            prefix = f"{experts.block}.experts.{index}."
            gate_up = alike.linear(f"{prefix}gate_up_proj", hidden, 2 * self._inner, bias=bias)
            down = alike.linear(prefix + experts.down, self._inner, hidden, bias=bias)
            self.experts.append((gate_up, down))
        routing = Routing(experts.num_chosen, experts.are_normalised, config.gate)
        self._at_once = kernels.experts(self.experts, routing)
        self.is_fixed = self._at_once is not None

    def sinks(self) -> dict[str, Sink]:
        """Sinks of its tensors, by their names below the layer's prefix."""
        names = self._experts
        found = self.router.sinks(f"{names.block}.{names.router}")
        if names.are_stacked:
            return found | self._stacks()
        for index, (gate_up, down) in enumerate(self.experts):
            prefix = f"{names.block}.experts.{index}."
            found |= gate_up.sinks(prefix + names.gate, 0, self._inner)
            found |= gate_up.sinks(prefix + names.up, self._inner)
            found |= down.sinks(prefix + names.down)
        return found

    def _stacks(self) -> dict[str, Sink]:
        """Of tensors with all gates and ups in turn, and all downs, a bias of each beside them."""
        inner, found = self._inner, dict[str, Sink]()
        gate_ups = [
            [
                gate_up.sinks("", 0, inner, is_in_out=True),
                gate_up.sinks("", inner, is_in_out=True),
            ]
            for gate_up, _ in self.experts
        ]
        downs = [[down.sinks("", is_in_out=True)] for _, down in self.experts]
        for name, linears in (("gate_up_proj", gate_ups), (self._experts.down, downs)):
            prefix = f"{self._experts.block}.experts.{name}"
            weights = [[part[".weight"] for part in parts] for parts in linears]
            found[prefix] = StackSink.of(weights)
            if self._experts.has_bias:
                biases = [[part[".bias"] for part in parts] for parts in linears]
                found[f"{prefix}_bias"] = BiasStackSink(biases)
        return found

    def __call__(self, rows: Array, block: Block, out: Array, residual: Array | None) -> None:
        """What it makes of rows [n, hidden], and the residual, into out [n, hidden]."""
        del block  # its room is for one MLP's rows
        kernels, count = self._kernels, len(rows)
        logits = self.router(rows, kernels.empty(count, self._experts.num_experts))
        if self._at_once is not None:
            self._at_once(rows, logits, out, residual)
            return
        total = kernels.empty(*rows.shape)
        total[...] = 0
        for expert, chosen, shares in route(kernels.to_host(logits)[0], self._experts):
            at = kernels.to_device(chosen)
            total[at] += self._pass(expert, rows[at]) * kernels.to_device(shares)
        out[...] = total if residual is None else residual + total

    def _pass(self, expert: int, rows: Array) -> Array:
        kernels, (gate_up, down) = self._kernels, self.experts[expert]
        wide = gate_up(rows, kernels.empty(len(rows), 2 * self._inner))
        inner = self._gate(wide, kernels.empty(len(rows), self._inner))
        return down(inner, kernels.empty(*rows.shape))

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        return self.router.num_bytes + sum(a.num_bytes + b.num_bytes for a, b in self.experts)
