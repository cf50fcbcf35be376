"""Answers of a given form, by the released openai client."""

import json
import re
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.pipeline.gateway.http.openai_calls import MODEL, USER, fails, with_client
from tests.pipeline.gateway.random_engine import RandomEngine

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}
LIKELY = '"}'  # or a string would have no end


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=8)
    kind: Literal["Käse", "Wein"]
    friend: "Person | None"


@pytest.fixture
def engine(tokenizer):
    return RandomEngine(tokenizer, LIKELY)


async def test_a_models_own_class_is_parsed_from_an_answer(start_gateway, engine):
    async with start_gateway(engine) as gateway:
        answer = await with_client(
            gateway,
            lambda c: c.chat.completions.parse(model=MODEL, messages=USER, response_format=Person),
        )
    assert isinstance(answer.choices[0].message.parsed, Person)
    assert answer.choices[0].finish_reason == "stop"


async def test_every_choice_keeps_to_the_schema_and_their_texts_differ(start_gateway, engine):
    async with start_gateway(engine) as gateway:
        answer = await with_client(
            gateway,
            lambda c: c.chat.completions.create(
                model=MODEL, messages=USER, response_format=JSON_SCHEMA, n=4, logprobs=True
            ),
        )
    texts = [choice.message.content for choice in answer.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1
    # Under the model's own distribution: sure only where the grammar leaves one token.
    logprobs = [each.logprob for each in answer.choices[0].logprobs.content]
    assert max(logprobs) < -0.5


async def test_a_stream_says_the_same_and_a_stop_string_ends_it(start_gateway, engine):
    def use(client):
        chunks = client.chat.completions.create(
            model=MODEL, messages=USER, response_format=JSON_SCHEMA, stream=True, stop=['"age"']
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async with start_gateway(engine) as gateway:
        text = await with_client(gateway, use)
    assert re.match(r'\{\s*"name"\s*:\s*"', text)
    assert not text.endswith("}")
    assert '"age"' not in text


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["ja", "nein"]}}, "ja|nein"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
        ({"structured_outputs": {"json": '{"enum": [1, 2]}'}}, "1|2"),
        ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, "x|y"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["ja", "nein"]}, "ja|nein"),
        ({"guided_json": {"enum": [1, 2]}}, "1|2"),
        ({"grammar": 'root ::= "x" | "y"'}, "x|y"),
        ({"json_schema": {"enum": [1, 2]}}, "1|2"),
        ({"response_format": {"type": "json_object", "schema": {"enum": [1, 2]}}}, "1|2"),
        ({"response_format": {"type": "text"}, "grammar": "", "max_tokens": 3}, "(?s).*"),
    ],
    ids=str,
)
async def test_each_dialects_spelling_is_understood(start_gateway, tokenizer, fields, pattern):
    def use(client):
        max_tokens = fields.pop("max_tokens", None)
        chat = client.chat.completions.create(
            model=MODEL, messages=USER, extra_body=fields, max_tokens=max_tokens
        )
        text = client.completions.create(
            model=MODEL, prompt="Hi", extra_body=fields, max_tokens=max_tokens or 50
        )
        return chat.choices[0].message.content, text.choices[0].text

    engine = RandomEngine(tokenizer)
    if "max_tokens" in fields:  # held to nothing: the most likely token is all it takes
        engine.generations = [None]
    async with start_gateway(engine) as gateway:
        for text in await with_client(gateway, use):
            assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "strange": 1}}, "response_format.strange"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "grammar": "root ::= x"}, "grammar"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema"),
    ],
    ids=str,
)  # fmt: skip
async def test_what_cannot_be_had_is_refused_by_name(start_gateway, engine, fields, param):
    async with start_gateway(engine) as gateway:
        error = await fails(
            gateway,
            openai.BadRequestError,
            lambda c: c.chat.completions.create(model=MODEL, messages=USER, extra_body=fields),
        )
    assert error.param == param
    assert engine.generations == []


async def test_a_field_that_leaves_nothing_of_the_form_is_the_requests_mistake(
    start_gateway, engine, tokenizer
):
    fields = {"guided_regex": "[ab]{3}", "allowed_token_ids": list(tokenizer.encode("xyz"))}
    async with start_gateway(engine) as gateway:
        await fails(
            gateway,
            openai.BadRequestError,
            lambda c: c.chat.completions.create(model=MODEL, messages=USER, extra_body=fields),
        )
