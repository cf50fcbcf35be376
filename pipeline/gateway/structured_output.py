"""What an answer has to keep to, as OpenAI's, vLLM's and llama.cpp's clients each write it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.gateway.errors import invalid, unsupported
from pipeline.gateway.grammars import Grammar, GrammarKind
from pipeline.gateway.unsupported_fields import check_fields

# vLLM's names for ways to write one.
_WAYS = ("json", "json_object", "regex", "choice", "grammar")
_OLDER = {f"guided_{way}": way for way in ("json", "regex", "choice", "grammar")}
# The fields of a request, all of them.
STRUCTURED = ("response_format", "structured_outputs", *_OLDER, "grammar", "json_schema")
# Of vLLM's options, those that change nothing here.
_OPTIONS_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "disable_fallback": (True, False),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}


def asked_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """What these fields of a request say; None: nothing. Raises ApiError."""
    found = [each for name, value in fields.items() if (each := _READERS[name](value)) is not None]
    if len(found) > 1:
        names = ", ".join(each.param for each in found)
        raise invalid(f"An answer can keep to one of these: {names}.", found[1].param)
    return found[0] if found else None


def json_grammar(schema: object, param: str) -> Grammar:
    """JSON of this schema. Raises ApiError."""
    if not isinstance(schema, dict):
        raise invalid(f"'{param}' has to be a JSON schema, an object.", param)
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False), param)


def any_object(param: str) -> Grammar:
    """Any JSON object."""
    return json_grammar({"type": "object"}, param)


def _response_format(value: Mapping[str, Any]) -> Grammar | None:
    kind, name = value.get("type"), "response_format"
    rest = {key: each for key, each in value.items() if key not in {"type", "json_schema"}}
    if kind == "json_object" and isinstance(rest.get("schema"), dict):  # as llama.cpp has it
        return json_grammar(rest["schema"], f"{name}.schema")
    check_fields(rest, {}, where=f"{name}.")
    if kind == "text":
        return None
    if kind == "json_object":
        return any_object(name)
    if kind != "json_schema":
        raise unsupported(f"{name}.type", "has to be text, json_object or json_schema here")
    named = value.get("json_schema")
    if not isinstance(named, dict):
        raise invalid(f"'{name}.json_schema' has to be an object.", f"{name}.json_schema")
    known = frozenset({"name", "description", "strict", "schema"})
    check_fields(named, {}, known, f"{name}.json_schema.")
    return json_grammar(named.get("schema"), f"{name}.json_schema.schema")


def _structured_outputs(value: Mapping[str, Any]) -> Grammar | None:
    name = "structured_outputs"
    check_fields(value, _OPTIONS_WITHOUT_EFFECT, frozenset(_WAYS), f"{name}.")
    given = {way: value[way] for way in _WAYS if value.get(way) not in (None, False)}
    if len(given) != 1:
        raise invalid(f"'{name}' has to have one of {', '.join(_WAYS)}.", name)
    ((way, wanted),) = given.items()
    return _of_way(way, wanted, f"{name}.{way}")


def _of_way(way: str, value: object, param: str) -> Grammar:
    if way == "json_object":
        return any_object(param)
    if way == "json":
        return json_grammar(_decoded(value, param), param)
    if way == "choice":
        if not isinstance(value, list) or not value or not all(type(v) is str for v in value):
            raise invalid(f"'{param}' has to be a list of strings.", param)
        return Grammar(GrammarKind.CHOICE, json.dumps(value), param)
    if not isinstance(value, str):
        raise invalid(f"'{param}' has to be a string.", param)
    return Grammar(GrammarKind.REGEX if way == "regex" else GrammarKind.RULES, value, param)


def _decoded(value: object, param: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise invalid(f"'{param}' is not JSON.", param) from None


def _older(name: str, way: str) -> Callable[[Any], Grammar]:
    return lambda value: _of_way(way, value, name)


_READERS: Mapping[str, Callable[[Any], Grammar | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **{name: _older(name, way) for name, way in _OLDER.items()},
    "grammar": lambda value: _of_way("grammar", value, "grammar") if value else None,
    "json_schema": lambda value: json_grammar(value, "json_schema"),
}
