"""Fields that JSON may write in several ways, as types: each with its reading and its schema."""

from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from pipeline.sampling.params import BIAS, MAX_BIASES, MAX_STOP_CHARS, MAX_STOPS

MAX_PROMPTS = 128

_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOPS = {
    "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]
}
_BIAS = {"type": "number", "minimum": BIAS.low, "maximum": BIAS.high}
_BIASES = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": _BIAS,
            "maxProperties": MAX_BIASES,
        },
        {"type": "null"},
    ]
}
_ID = {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 31}
_PROMPT = [{"type": "string"}, {"type": "array", "items": _ID, "minItems": 1}]
_PROMPTS = {
    "anyOf": [
        *_PROMPT,
        {"type": "array", "items": {"anyOf": _PROMPT}, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


def _list_stops(value: object) -> object:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "Input should be a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError(
            "stop_value",
            "Input should hold at most {num} strings of 1 to {chars} characters",
            {"num": MAX_STOPS, "chars": MAX_STOP_CHARS},
        )
    return tuple(stops)


def _number_tokens(value: object) -> object:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "bias_type",
            "Input should be an object of at most {num} fields",
            {"num": MAX_BIASES},
        )
    biases: dict[int, float] = {}
    for token, bias in value.items():
        is_id = token.isascii() and token.isdecimal() and len(token) < 10
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (is_id and is_number and BIAS.low <= bias <= BIAS.high):
            raise PydanticCustomError(
                "bias_value", "Input should map token ids to numbers from -100 to 100"
            )
        biases[int(token)] = float(bias)
    return biases


def _list_prompts(value: object) -> object:
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not 0 < len(prompts) <= MAX_PROMPTS or not all(
        isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts
    ):
        raise PydanticCustomError(
            "prompt_type",
            "Input should be a string, token ids, or a list of at most {num} of either",
            {"num": MAX_PROMPTS},
        )
    return tuple(tuple(prompt) if isinstance(prompt, list) else prompt for prompt in prompts)


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    )


# One string, or several.
Stops = Annotated[tuple[str, ...], BeforeValidator(_list_stops), WithJsonSchema(_STOPS)]
# By token id.
Biases = Annotated[dict[int, float], BeforeValidator(_number_tokens), WithJsonSchema(_BIASES)]
# One or several, each text or token ids.
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...], BeforeValidator(_list_prompts), WithJsonSchema(_PROMPTS)
]
