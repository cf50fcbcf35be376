"""The configuration of decoders with rotary positions, RMSNorm and gated MLPs, and its reader.

Llama is one, and most that came after it: a family here says in what it is not Llama.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.errors import ModelError
from pipeline.kernels.base import HeadShape
from pipeline.kernels.gains import AS_STORED, Gain
from pipeline.kernels.gates import SILU, Gate
from pipeline.models.model_config import (
    Epsilon,
    Fields,
    HeadDim,
    Heads,
    Inner,
    JsonFields,
    LayerShape,
    ModelConfig,
    NumLayers,
    Width,
    eos_token_ids_of,
    head_dim_of,
    shown,
)
from pipeline.models.rope_config import Positions, Rope, Scale, Share, read_rope
from transport.frozen import frozen

FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = Annotated[list[Literal["full_attention", "sliding_attention"]], Field(min_length=1)]


@frozen
class NormNames:
    """Where a layer norms rows: before a branch of it, or what the branch makes of them."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@frozen
class Experts:
    """MLPs of which each row passes through a few, and how a checkpoint calls them."""

    num_experts: int
    num_chosen: int
    intermediate_size: int
    # Whether the shares of those chosen add up to one.
    are_normalised: bool
    # Layers that have them; the others have one MLP.
    layers: frozenset[int]
    # Whether they and their router have biases.
    has_bias: bool = False
    # Whether a checkpoint has all gates and ups, in turn, as one tensor, and all downs.
    are_stacked: bool = False
    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def checked(self) -> "Experts":
        """These. Raises ModelError where more are to be chosen than there are."""
        if self.num_chosen > self.num_experts:
            raise ModelError(
                f"config.json: num_experts_per_tok={self.num_chosen} of {self.num_experts} experts"
            )
        return self


@frozen(kw_only=True)
class DecoderConfig(ModelConfig):
    """Rotary positions, RMSNorm, a gated MLP, grouped KV heads."""

    shapes: tuple[LayerShape, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gate: Gate = SILU
    norms: NormNames = NormNames()
    # What stored gains of norms are to become.
    gain: Gain = AS_STORED
    # Whether queries and keys are normed: each head, or all heads together.
    qk_norm: Literal["head", "width"] | None = None
    # What queries are multiplied by, once they are normed.
    query_scale: float = 1.0
    # Whether q, k and v are one tensor in checkpoints, and gate and up.
    is_fused: bool = False
    experts: Experts | None = None

    def shape(self, layer: int) -> LayerShape:
        """That of a layer of the model."""
        return self.shapes[layer]


class DecoderJson(JsonFields):
    """What is read of the config.json of each such family; what differs, a family's own class says.

    What would change the result and is not computed is refused by its type.
    """

    model_type: str
    num_hidden_layers: NumLayers
    hidden_size: Width
    intermediate_size: Inner
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: HeadDim | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Scale | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    original_max_position_embeddings: Positions | None = None
    partial_rotary_factor: Share | None = None
    layer_types: LayerTypes | None = None
    sliding_window: Positions | None = None
    tie_word_embeddings: bool = False


def layers_of(raw: DecoderJson, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer has the window: as layer_types says, or else `default` of its index.

    Raises ModelError where layer_types are not of as many layers, or there is no window.
    """
    if raw.layer_types is None:
        found = [default(index) for index in range(raw.num_hidden_layers)]
    elif len(raw.layer_types) != raw.num_hidden_layers:
        raise ModelError(
            f"config.json: layer_types are {len(raw.layer_types)}, not {raw.num_hidden_layers} "
            "(num_hidden_layers)"
        )
    else:
        found = [each == SLIDING for each in raw.layer_types]
    if any(found) and raw.sliding_window is None:
        raise ModelError("config.json: layers have a window, and there is no sliding_window")
    return found


def all_or_none(raw: DecoderJson) -> list[bool]:
    """The same of families whose layers have all the same window, or none. Raises ModelError."""
    if len(set(raw.layer_types or ())) > 1:
        raise ModelError(
            f"config.json: layer_types={shown(sorted(set(raw.layer_types or ())))} is not "
            "supported: layers of one type are"
        )
    return [raw.sliding_window is not None] * raw.num_hidden_layers


def rope_of(
    raw: DecoderJson,
    *spellings: Mapping[str, Any] | None,
    theta: float | None = None,
    may_be_partial: bool = False,
) -> tuple[Rope, int]:
    """How positions turn heads, and how many there are.

    `spellings`, `theta`: what the file says of some layers, instead of what it says of all.
    """
    return read_rope(
        spellings or (raw.rope_parameters, raw.rope_scaling),
        theta or raw.rope_theta,
        head_dim(raw),
        max_positions=raw.max_position_embeddings,
        original_positions=raw.original_max_position_embeddings,
        part=raw.partial_rotary_factor,
        may_be_partial=may_be_partial,
    )


def ropes_by_type(
    raw: DecoderJson, *, theta: float, window_theta: float
) -> tuple[dict[bool, Rope], int]:
    """The same where layers with a window are turned otherwise; `rope_scaling` is the others'.

    Both thetas: where the file says none. Raises ModelError.
    """
    given, plain = raw.rope_parameters or {}, {"rope_type": "default"}
    if given and not given.keys() & {FULL, SLIDING}:
        raise ModelError("config.json: rope_parameters are given for no type of layer")
    if not all(isinstance(given.get(each) or {}, Mapping) for each in (FULL, SLIDING)):
        raise ModelError("config.json: rope_parameters of a type of layer are no object")
    full = dict(given.get(FULL) or {}) | dict(raw.rope_scaling or {})
    others, max_positions = rope_of(raw, full or plain, theta=raw.rope_theta or theta)
    own, _ = rope_of(raw, given.get(SLIDING) or plain, theta=window_theta)
    return {True: own, False: others}, max_positions


def head_dim(raw: DecoderJson) -> int:
    """Dimensions of a head. Raises ModelError."""
    names = "hidden_size/num_attention_heads"
    found = raw.head_dim or head_dim_of(raw.hidden_size, raw.num_attention_heads, names)
    if found % 2:
        raise ModelError(f"config.json: head_dim={found} is odd; rotary positions need pairs")
    return found


def decoder_config(
    raw: DecoderJson,
    generation: Fields,
    windows: list[bool],
    ropes: Mapping[bool, Rope] | Rope,
    max_positions: int,
) -> DecoderConfig:
    """What `raw` says of such a decoder, but for what is a family's own.

    `windows`: which layers have one; `ropes`: of those that have and of others, or of all. Raises
    ModelError.
    """
    num_heads = raw.num_attention_heads
    num_kv_heads = raw.num_key_value_heads or num_heads
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    width, window = head_dim(raw), raw.sliding_window or 0
    shapes = {
        has_window: LayerShape(
            HeadShape(num_heads, num_kv_heads, width, window if has_window else 0),
            ropes if isinstance(ropes, Rope) else ropes[has_window],
        )
        for has_window in set(windows)
    }
    return DecoderConfig(
        architecture=raw.model_type,
        num_layers=raw.num_hidden_layers,
        hidden_dim=raw.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width,
        vocab_size=raw.vocab_size,
        max_positions=max_positions,
        eos_token_ids=eos_token_ids_of(raw.eos_token_id, generation.get("eos_token_id")),
        intermediate_size=raw.intermediate_size,
        norm_eps=raw.rms_norm_eps,
        tie_word_embeddings=raw.tie_word_embeddings,
        shapes=tuple(shapes[each] for each in windows),
    )
