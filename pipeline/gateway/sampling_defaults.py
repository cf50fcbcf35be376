"""How tokens are chosen where no client says it: as OpenAI does, or as a model's makers advise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.files import is_file
from pipeline.sampling.params import SamplingParams

GENERATION_CONFIG = "generation_config.json"
_MAX_BYTES = 1 << 20
# By their names there, which are those of the requests' fields.
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
OPENAI: Mapping[str, float] = {"temperature": 1.0}


def load_sampling_defaults(model_dir: Path) -> Mapping[str, float]:
    """What a model directory advises, beside OpenAI's. Raises InputError."""
    file = model_dir / GENERATION_CONFIG
    if not is_file(file):
        return OPENAI
    try:
        with file.open("rb") as opened:
            fields = json.loads(opened.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{file} is not a JSON object")
    advised = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    if fields.get("do_sample") is False:
        advised["temperature"] = 0.0
    try:
        _check(advised)
    except (InputError, TypeError) as error:
        raise InputError(f"{file}: {error}; --sampling-defaults openai does without it") from error
    return {**OPENAI, **advised}


def _check(advised: Mapping[str, Any]) -> None:
    for name, value in advised.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name} is {str(value)[:60]!r}, no number")
    SamplingParams(**advised)
