"""What a config.json says of rotary positions, in any spelling; what is not exact is refused.

Older files have `rope_theta` and `rope_scaling`, with `type` or `rope_type`; newer ones have all of
it in `rope_parameters`, which may be given for each type of layer.

Source: transformers, `modeling_rope_utils`; the contexts of linear scaling and YaRN: vLLM.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ModelError
from transport.frozen import frozen

MAX_POSITIONS = 1 << 24
DEFAULT_THETA = 10000.0

Positions = Annotated[int, Field(gt=0, le=MAX_POSITIONS)]
Scale = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Scaling(BaseModel):
    """How rotary frequencies are stretched; fields have config.json's names."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


class Linear(Scaling):
    """All by `factor`."""

    factor: Scale


class Llama3(Scaling):
    """Long wavelengths by `factor`, short ones not at all."""

    factor: Scale
    low_freq_factor: Scale
    high_freq_factor: Scale
    original_max_position_embeddings: Positions


class Yarn(Scaling):
    """By `factor` what turns less than `beta_slow` times, nothing of what turns `beta_fast` times.

    Source: YaRN (arXiv:2309.00071).
    """

    factor: Scale
    original_max_position_embeddings: Positions
    attention_factor: Scale | None = None
    beta_fast: Scale | None = None
    beta_slow: Scale | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0


class Stretched(Scaling):
    """Each frequency by a factor of its own."""

    factors: tuple[Scale, ...]
    magnitude: float

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.magnitude


class LongRope(Scaling):
    """As `Stretched`, by other factors where a text may become longer than the model was made for.

    Source: LongRoPE (arXiv:2402.13753).
    """

    short_factor: tuple[Scale, ...]
    long_factor: tuple[Scale, ...]
    original_max_position_embeddings: Annotated[int, Field(gt=1, le=MAX_POSITIONS)]
    factor: Scale
    attention_factor: Scale | None = None

    def within(self, num_positions: int) -> Stretched:
        """That of texts of at most so many positions."""
        original, magnitude = self.original_max_position_embeddings, self.attention_factor
        if magnitude is None:
            stretch = math.log(max(self.factor, 1.0)) / math.log(original)
            magnitude = math.sqrt(1 + stretch)
        factors = self.long_factor if num_positions > original else self.short_factor
        return Stretched(factors=factors, magnitude=magnitude)


@frozen
class Rope:
    """How positions turn queries and keys: the first `num_dims` dimensions of every head."""

    theta: float
    num_dims: int
    scaling: Scaling | None = None

    def within(self, num_positions: int) -> "Rope":
        """That of a session whose texts have at most so many positions."""
        if isinstance(self.scaling, LongRope):
            return replace(self, scaling=self.scaling.within(num_positions))
        return self


class _Rope(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    rope_type: Literal["default", "dynamic", "linear", "llama3", "yarn", "longrope"] = "default"
    rope_theta: Scale | None = None


class _Whole(_Rope):
    partial_rotary_factor: Literal[1] | None = None


class _Partial(_Rope):
    partial_rotary_factor: Share | None = None


def read_rope(
    spellings: Iterable[Mapping[str, Any] | None],
    theta: float | None,
    head_dim: int,
    *,
    max_positions: int,
    original_positions: int | None,
    part: float | None = None,
    may_be_partial: bool = False,
) -> tuple[Rope, int]:
    """Rotary positions by `rope_parameters` and `rope_scaling`, and how many there are.

    `theta`, `max_positions`, `original_positions`, `part`: rope_theta, max_position_embeddings,
    original_max_position_embeddings and partial_rotary_factor of the file itself. `may_be_partial`:
    whether a family's heads may be turned in part. Raises ModelError, and pydantic's
    ValidationError for a value that cannot be.
    """
    fields = _only([_flat(each, theta or DEFAULT_THETA) for each in spellings if each])
    if part is not None:
        fields = {"partial_rotary_factor": part} | dict(fields)
    raw = (_Partial if may_be_partial else _Whole).model_validate(fields)
    num_dims = int(head_dim * (raw.partial_rotary_factor or 1))
    if num_dims % 2 or num_dims == 0:
        raise ModelError(
            f"config.json: {num_dims} of head_dim={head_dim} is odd or nothing; rotary positions "
            "need pairs"
        )
    rope = Rope(raw.rope_theta or theta or DEFAULT_THETA, num_dims)
    original = original_positions or fields.get("original_max_position_embeddings") or max_positions
    scaled = dict(fields) | {"original_max_position_embeddings": original}
    match raw.rope_type:
        case "linear":
            linear = Linear.model_validate(fields)
            # the length that a model was made for is that before scaling
            stretched = _stretched(max_positions, linear.factor)
            return replace(rope, scaling=linear), stretched
        case "yarn":
            yarn = Yarn.model_validate(scaled)
            if rope.theta <= 1:  # where a frequency lies could not be told
                raise ModelError(f"config.json: rope_theta={rope.theta:g} is not above 1")
            stretched = _stretched(yarn.original_max_position_embeddings, yarn.factor)
            return replace(rope, scaling=yarn), max(stretched, max_positions)
        case "llama3":
            return replace(rope, scaling=_llama3(scaled)), max_positions
        case "longrope":
            return replace(rope, scaling=_longrope(scaled, max_positions, num_dims)), max_positions
        case _:
            # `dynamic` changes nothing up to the length a model was made for: no more is served
            return rope, max_positions


def _stretched(num_positions: int, factor: float) -> int:
    stretched = int(num_positions * factor)
    if not 0 < stretched <= MAX_POSITIONS:
        raise ModelError(
            f"config.json: {num_positions} positions stretched by {factor:g} are {stretched}, not "
            f"1 to {MAX_POSITIONS}"
        )
    return stretched


def _llama3(fields: Mapping[str, Any]) -> Llama3:
    raw = Llama3.model_validate(fields)
    if raw.high_freq_factor <= raw.low_freq_factor:
        raise ModelError(
            f"config.json: high_freq_factor={raw.high_freq_factor:g} is not above "
            f"low_freq_factor={raw.low_freq_factor:g}"
        )
    return raw


def _longrope(fields: Mapping[str, Any], max_positions: int, num_dims: int) -> LongRope:
    factor = fields.get("factor") or max_positions / fields["original_max_position_embeddings"]
    raw = LongRope.model_validate(dict(fields) | {"factor": factor})
    for name in ("short_factor", "long_factor"):
        found = len(getattr(raw, name))
        if found != num_dims // 2:
            raise ModelError(f"config.json: {name} has {found} numbers, not {num_dims // 2}")
    return raw


def _flat(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The parameters of all layers, from those of each type of them if they are nested."""
    nested = [each for each in fields.values() if isinstance(each, Mapping)]
    if nested and None in fields.values():
        raise ModelError("config.json: layers without rotary positions are not supported")
    if nested and len(nested) < len(fields):
        raise ModelError(
            "config.json: rope parameters are given for types of layers and for all of them"
        )
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
