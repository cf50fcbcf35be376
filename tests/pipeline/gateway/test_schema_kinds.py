"""Schemas of the kinds that real APIs have: whatever is drawn under one validates."""

import itertools
import json
import re

import jsonschema

from tests.pipeline.gateway.random_texts import compiled, new_compiler, random_text

LEAVES = {
    "text": {"type": "string", "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    "inner pattern": {"type": "string", "pattern": "b+c", "maxLength": 9},
    "umlauts": {"type": "string", "pattern": "^[äöüß€😀]{1,3}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ip": {"type": "string", "format": "ipv4"},
    "integer": {"type": "integer"},
    "bounded": {"type": "integer", "minimum": -5, "exclusiveMaximum": 120},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "enum": {"enum": ["red", "grün", 3, None, True, {"a": []}]},
    "const": {"const": {"kind": ["x", 1.5]}},
    "types": {"type": ["integer", "null", "boolean"]},
}
LINK = {"$ref": "#/$defs/leaf"}


def with_leaf(schema):
    return lambda leaf: {"$defs": {"leaf": leaf}, **schema}


def closed(properties, required=None):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


FRAMES = {
    "itself": lambda leaf: leaf,
    "object": lambda leaf: closed({"a": leaf, "ключ \"'\\": leaf}),
    "optional": lambda leaf: closed({"a": leaf, "b": leaf, "c": leaf}, ["b"]),
    "open": lambda leaf: {"type": "object", "properties": {"a": leaf}, "required": ["a"]},
    "map": lambda leaf: {"type": "object", "additionalProperties": leaf},
    "named": lambda leaf: {
        "type": "object", "patternProperties": {"^x_[a-z]$": leaf}, "additionalProperties": False,
    },
    "list": lambda leaf: {"type": "array", "items": leaf, "minItems": 1, "maxItems": 3},
    "tuple": lambda leaf: {"type": "array", "prefixItems": [leaf, {"const": 0}], "items": False,
                           "minItems": 2},
    "nullable": lambda leaf: {"anyOf": [closed({"v": leaf}), {"type": "null"}]},
    "all of": lambda leaf: {"allOf": [
        {"type": "object", "properties": {"a": leaf}, "required": ["a"]},
        {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
    ]},
    "tagged": lambda leaf: {"oneOf": [closed({"k": {"const": "x"}, "v": leaf}),
                                      closed({"k": {"const": "y"}})]},
    "recursive": with_leaf(closed({"v": LINK,
                                   "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}})),
    "deep": lambda leaf: closed({"a": closed({"b": closed({"c": {"type": "array", "items": leaf,
                                                                "maxItems": 2}})})}),
}  # fmt: skip
KINDS = {
    f"{frame}, {leaf}": FRAMES[frame](LEAVES[leaf])
    for frame, leaf in itertools.product(FRAMES, LEAVES)
}
# What jsonschema alone does not check.
FORMATS = {
    "date": r"\d{4}-\d\d-\d\d",
    "date-time": r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d.*",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"(\d{1,3}\.){3}\d{1,3}",
}


def checker():
    found = jsonschema.FormatChecker(formats=())
    for name, pattern in FORMATS.items():
        found.checks(name)(
            lambda value, pattern=pattern: (
                not isinstance(value, str) or re.fullmatch(pattern, value) is not None
            )
        )
    return found


async def check(tokenizer, schema, num_seeds, compiler):
    grammar = await compiled(tokenizer, "json_schema", json.dumps(schema), compiler)
    texts = [random_text(grammar, tokenizer, seed, most=600) for seed in range(num_seeds)]
    whole = [text for text in texts if text is not None]
    assert whole
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker())
    for text in whole:
        validator.validate(json.loads(text))
    return len(whole)


async def test_two_hundred_kinds_validate(tokenizer):
    assert len(KINDS) >= 200
    compiler = new_compiler(tokenizer)
    num_whole = [await check(tokenizer, schema, 2, compiler) for schema in KINDS.values()]
    assert sum(num_whole) > 1.5 * len(KINDS)
