"""Answers of a given form over real stages: at once, together with others, and through losses."""

import itertools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pydantic
import pytest

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "array",
    "minItems": 2,
    "maxItems": 2,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    },
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 10}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


class Answer(pydantic.BaseModel):
    word: str = pydantic.Field(max_length=10)
    score: int = pydantic.Field(ge=0, le=9)


@pytest.fixture
def server(cluster):
    cluster.plan(2)
    return cluster.serve("--supervise", "--context", "1024", "--hang-timeout", "3")


def ask(server, **fields):
    body = {"prompt": "A list:", "max_tokens": 700, "response_format": FORM, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    if choice["finish_reason"] == "stop":  # noise may take all tokens for one string
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    return choice


@pytest.mark.parametrize("temperature", [0, 1])
def test_texts_of_a_form_are_the_same_alone_together_and_through_a_loss(server, temperature):
    wanted = [{"seed": seed, "temperature": temperature} for seed in range(6)]
    free = server.text("Hi", 60)
    alone = [ask(server, **each) for each in wanted]
    assert any(choice["finish_reason"] == "stop" for choice in alone)
    with ThreadPoolExecutor(7) as pool:
        together = pool.map(lambda each: ask(server, **each), wanted)
        other = pool.submit(server.text, "Hi", 60)
        assert list(together) == alone
        assert other.result() == free
        lost = pool.map(lambda each: ask(server, **each), wanted)
        time.sleep(0.5)
        os.kill(server.workers()[1], signal.SIGKILL)
        assert list(lost) == alone


@pytest.mark.parametrize("temperature", [0, 1])
def test_texts_of_a_form_that_give_way_are_what_they_are_alone(cluster, temperature):
    cluster.plan(2)
    for idx in range(2):
        cluster.start_worker(idx, "--kv-memory", "0.001")  # for 2,097 tokens
    server = cluster.serve("--context", "1024", "--prefix-share", "0")
    # As many as run at once begin beside each other, and cannot end so.
    schema = {"type": "string", "pattern": "^[a-z ]{260,280}$"}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": schema}}

    def texts(**fields):
        body = {"prompt": "A text:" * 6, "response_format": form, "temperature": temperature}
        choices = server.post({"max_tokens": 900} | body | fields).json()["choices"]
        return [choice["text"] for choice in choices]

    alone = [*itertools.chain.from_iterable(texts(seed=seed) for seed in range(8))]
    assert server.pipeline()["engine"]["num_given_way"] == 0
    assert texts(seed=0, n=8) == alone
    assert server.pipeline()["engine"]["num_given_way"] > 0


def test_the_openai_client_parses_calls_and_streams(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        chat = {"model": "model", "messages": [{"role": "user", "content": "Hi"}]}
        parsed = client.chat.completions.parse(**chat, response_format=Answer, n=3)
        assert all(isinstance(choice.message.parsed, Answer) for choice in parsed.choices)
        tools = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        with client.chat.completions.stream(**chat, **tools, max_tokens=300) as stream:
            final = [*stream] and stream.get_final_completion().choices[0]
        (call,) = final.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
        assert final.finish_reason == "tool_calls"
