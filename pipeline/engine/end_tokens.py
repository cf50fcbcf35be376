"""Which tokens end a text, by the files of a model directory: models name them in any of four."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import TokenizerError
from pipeline.gguf.model_files import has_model_file, read_model_file
from transport.frozen import frozen

_WITH_IDS = ("config.json", "generation_config.json")
_WITH_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
_MAX_BYTES = 16 << 20  # tokenizer_config.json may list a hundred thousand added tokens


@frozen
class EndTokens:
    """The ids, and the texts of tokens, that files name as the end of a text."""

    token_ids: frozenset[int]
    tokens: frozenset[str]


def read_end_tokens(directory: Path) -> EndTokens:
    """What the files of `directory` say, those that are there. Raises TokenizerError."""
    ids = {
        value
        for name in _WITH_IDS
        for value in _each(_read(directory / name).get("eos_token_id"))
        if type(value) is int and 0 <= value < 1 << 32
    }
    named = [_read(directory / name) for name in _WITH_NAMES]
    tokens = {
        value
        for fields in named
        for value in _each(fields.get("eos_token"))
        if isinstance(value, str)
    }
    ids |= {token_id for fields in named for token_id, text in _added(fields) if text in tokens}
    return EndTokens(frozenset(ids), frozenset(tokens))


def _added(fields: dict[str, Any]) -> Iterator[tuple[int, object]]:
    """The id and the text of tokens that tokenizer.json itself may lack."""
    added = fields.get("added_tokens_decoder")
    for key, value in added.items() if isinstance(added, dict) else ():
        if key.isascii() and key.isdecimal() and len(key) < 10:
            yield int(key), next(_each(value))


def _each(value: object) -> Iterator[object]:
    """The value, or the values of a list; of an added token written as an object, its text."""
    for each in value if isinstance(value, list) else [value]:
        yield each.get("content") if isinstance(each, dict) else each


def _read(path: Path) -> dict[str, Any]:
    if not has_model_file(path):
        return {}
    try:
        raw = read_model_file(path, _MAX_BYTES)
        if len(raw) > _MAX_BYTES:
            raise TokenizerError(f"{path} is larger than {_MAX_BYTES} bytes")
        fields = json.loads(raw)
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return fields
