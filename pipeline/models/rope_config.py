"""What a config.json says of rotary positions, in any spelling; what is not exact is refused.

Older files have `rope_theta` and `rope_scaling`, with `type` or `rope_type`; newer ones have all of
it in `rope_parameters`, which may be given for each type of layer.

Source: transformers, `modeling_rope_utils`; the context of linear scaling: vLLM.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ModelError

MAX_POSITIONS = 1 << 24
DEFAULT_THETA = 10000.0

Positions = Annotated[int, Field(gt=0, le=MAX_POSITIONS)]
Scale = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` by `factor`, `llama3` by wavelength."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary base and scaling, and how many positions they are for."""

    theta: float
    scaling: RopeScaling | None
    max_positions: int


class _Rope(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    rope_type: Literal["default", "dynamic", "linear", "llama3"] = "default"
    rope_theta: Scale | None = None
    partial_rotary_factor: Literal[1] | None = None


class _Linear(_Rope):
    factor: Scale


class _Llama3(_Linear):
    low_freq_factor: Scale
    high_freq_factor: Scale
    original_max_position_embeddings: Positions | None = None


def read_rope(
    spellings: Iterable[Mapping[str, Any] | None],
    theta: float | None,
    *,
    max_positions: int,
    original_positions: int | None,
) -> Rope:
    """Rotary positions by `rope_parameters` and `rope_scaling`, with what lies beside them.

    `theta`, `max_positions`, `original_positions`: rope_theta, max_position_embeddings and
    original_max_position_embeddings of the file itself. Raises ModelError, and pydantic's
    ValidationError for a value that cannot be.
    """
    theta = theta or DEFAULT_THETA
    fields = _only([_flat(each, theta) for each in spellings if each])
    rope = _Rope.model_validate(fields)
    theta = rope.rope_theta or theta
    if rope.rope_type == "linear":
        linear = _Linear.model_validate(fields)
        # the length that a model was made for is that before scaling
        stretched = int(max_positions * linear.factor)
        if not 0 < stretched <= MAX_POSITIONS:
            raise ModelError(
                f"config.json: {max_positions} positions stretched by {linear.factor:g} are "
                f"{stretched}, not 1 to {MAX_POSITIONS}"
            )
        return Rope(theta, RopeScaling(rope_type="linear", factor=linear.factor), stretched)
    if rope.rope_type == "llama3":
        llama3 = _Llama3.model_validate(fields)
        return Rope(theta, _llama3(llama3, original_positions, max_positions), max_positions)
    # `dynamic` changes nothing up to the length a model was made for, and more is not served
    return Rope(theta, None, max_positions)


def _llama3(raw: _Llama3, beside: int | None, max_positions: int) -> RopeScaling:
    if raw.high_freq_factor <= raw.low_freq_factor:
        raise ModelError(
            f"config.json: high_freq_factor={raw.high_freq_factor:g} is not above "
            f"low_freq_factor={raw.low_freq_factor:g}"
        )
    return RopeScaling(
        rope_type="llama3",
        factor=raw.factor,
        low_freq_factor=raw.low_freq_factor,
        high_freq_factor=raw.high_freq_factor,
        original_max_position_embeddings=(
            beside or raw.original_max_position_embeddings or max_positions
        ),
    )


def _flat(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The parameters of all layers, from those of each type of them if they are nested."""
    nested = [each for each in fields.values() if isinstance(each, Mapping)]
    if nested and None in fields.values():
        raise ModelError("config.json: layers without rotary positions are not supported")
    found = dict(_only(nested)) if nested else dict(fields)
    if "type" in found:  # the key's name before rope_type
        found.setdefault("rope_type", found.pop("type"))
    return {"rope_theta": theta} | found


def _only(found: list[Mapping[str, Any]] | list[dict[str, Any]]) -> Mapping[str, Any]:
    """What all of these say."""
    if any(each != found[0] for each in found):
        raise ModelError(
            "config.json: rope_parameters and rope_scaling say different things, or layers differ "
            "in them: that is not supported"
        )
    return found[0] if found else {}
