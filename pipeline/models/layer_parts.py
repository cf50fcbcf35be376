"""What a shard's layers are made of, and where that can be something else than the kernels' own.

A layer names each of its linears and leaves it to `LayerParts` what does its work; the same before
each step for what attends in a layer. So a protected product or an attention computed elsewhere is
a value handed to the shard, and no architecture knows of it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

from pipeline.dtypes import Array, HostArray, Precision
from pipeline.kernels.base import (
    Activation,
    Attention,
    Kernels,
    Linear,
    LinearSpec,
    Norm,
    RMSNorm,
)
from pipeline.kernels.gains import AS_STORED, Gain
from pipeline.kernels.gates import Gate
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.kv_storage import LayerKV
from pipeline.protocol.batch import Batch
from transport.frozen import frozen

# Does works side by side; what they return, in order.
Overlap = Callable[[Sequence[Callable[[], Any]]], list[Any]]


class Reader(Protocol):
    """A shard from the first layer on, as parts see it that need to have something read."""

    def keys_and_values(self, token_ids: HostArray) -> list[LayerKV]:
        """Of a text, in each layer, as the kernels' own attention has them."""
        ...


class LayerParts:
    """The kernels' own linears and attention; a mode overrides what it replaces."""

    # Whether all of a step is the kernels' own, so that they may record it and make it in one call.
    are_recordable: ClassVar[bool] = True
    # Whether what is not theirs goes through `Kernels.call`, which some of them record as well.
    are_calls: ClassVar[bool] = False
    # Whether a row depends on itself and its own cache alone, bit for bit, where it does for the
    # kernels' own.
    are_row_exact: ClassVar[bool] = True
    # Whether keys and values lie in the kernels' memory: without, a session reserves none.
    are_cached_here: ClassVar[bool] = True
    # Whether somebody sees which linears a row meets.
    are_watched: ClassVar[bool] = False
    # What runs the halves of a step side by side, where that gains anything: where layers wait.
    overlap: Overlap | None = None

    def linear(self, name: str, spec: LinearSpec, kernels: Kernels) -> Linear:
        """What computes the linear `name`, such as model.layers.3.self_attn.o_proj or lm_head.

        Names are the checkpoint's; where a family holds several of its matrices as one, as it calls
        that: self_attn.qkv_proj, mlp.gate_up_proj. What is returned takes the weights by its sinks.
        """
        del name
        return kernels.linear(spec)

    def attention(self, layer: int, batch: Batch, own: Attention) -> Attention:
        """What attends in a layer of the model, for a step with the rows of `batch`.

        `own` is the kernels', which appends to the cache as well. Of a step that is recorded this
        is asked once: `batch` then is of whichever step is made.
        """
        del layer, batch
        return own

    def prepare(self, reader: Reader) -> None:
        """A session is about to begin, with the weights that `reader` has."""

    def cache(self, own: Callable[[], KVCache], num_slots: int, max_seq_len: int) -> KVCache:
        """What a session's slots hold; `own` makes the kernels'."""
        del num_slots, max_seq_len
        return own()

    @property
    def hold_weights_in_kernels(self) -> bool:
        """Whether all weights lie in the kernels' memory, as they put them there."""
        return type(self).linear is LayerParts.linear

    @property
    def attend_in_cache(self) -> bool:
        """Whether all that is attended to lies in the kernels' cache, as they put it there."""
        return type(self).attention is LayerParts.attention


OWN = LayerParts()


@frozen
class LayerMaker:
    """Makes the parts of the layer whose names start with `prefix`."""

    kernels: Kernels
    precision: Precision
    parts: LayerParts
    prefix: str = ""
    # Those that int4 leaves in int8, by their whole names.
    int8_linears: Collection[str] = ()

    def linear(
        self, name: str, num_in: int, num_out: int, *, bias: bool, activation: Activation = "none"
    ) -> Linear:
        """The linear `name`, to be filled."""
        is_wide = self.precision == "int4" and self.prefix + name in self.int8_linears
        precision: Precision = "int8" if is_wide else self.precision
        spec = LinearSpec(num_in, num_out, bias, precision, activation)
        return self.parts.linear(self.prefix + name, spec, self.kernels)

    def alike(self, name: str) -> "LayerMaker":
        """For the linears whose names go on from that: all in one precision."""
        is_any_wide = any(each.startswith(self.prefix + name) for each in self.int8_linears)
        return replace(self, precision="int8") if self.precision == "int4" and is_any_wide else self

    def gate(self, gate: Gate) -> Callable[[Array, Array], Array]:
        """What makes inner rows [n, inner] of [n, 2 * inner]."""
        kernels = self.kernels
        match gate.kind:
            case "silu":
                return kernels.silu_mul
            case "gelu_tanh":
                return kernels.gelu_mul
            case "clamped":
                return partial(kernels.clamped_mul, alpha=gate.alpha, limit=gate.limit)

    def layer_norm(self, size: int, eps: float) -> Norm:
        """Rows centred, over their deviation, scaled and shifted."""
        return self.kernels.layer_norm(size, eps)

    def rms_norm(self, size: int, eps: float, gain: Gain = AS_STORED) -> RMSNorm:
        """Rows over their root mean square, scaled by what stored gains become."""
        norm = self.kernels.rms_norm(size, eps)
        norm.gain = gain
        return norm
