"""Whatever a body holds, it is an order or refused."""

import json
import random
from copy import deepcopy

import pytest

from pipeline.gateway.dialects.messages_requests import CountRequest, MessagesRequest
from pipeline.gateway.dialects.ollama_requests import OllamaChatRequest, OllamaGenerateRequest
from pipeline.gateway.dialects.responses_requests import ResponsesRequest
from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.generation_order import Order
from pipeline.gateway.openai_requests import parse_untrusted
from pipeline.gateway.settings import GatewayConfig

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
RESPONSE = {
    "model": "m", "instructions": "x", "stream": True, "store": False, "max_output_tokens": 3,
    "temperature": 1, "top_p": 0.5, "top_logprobs": 2, "include": ["x"], "truncation": "auto",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"type": "item_reference", "id": "i"},
    ],
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"},
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False,
}  # fmt: skip
MESSAGES = {
    "model": "m", "max_tokens": 3, "temperature": 1, "top_k": 3, "top_p": 0.5, "stream": True,
    "system": [{"type": "text", "text": "x"}], "stop_sequences": ["x"],
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "x", "signature": "s"},
            {"type": "text", "text": "x"},
            {"type": "tool_use", "id": "i", "name": "f", "input": {"a": "b"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "x"}]},
        ]},
    ],
    "tools": [{"name": "f", "description": "x", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 3},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
}  # fmt: skip
OLLAMA = {
    "model": "m", "stream": False, "format": SCHEMA, "think": "low", "keep_alive": "5m",
    "options": {"temperature": 1, "top_k": 3, "seed": 1, "stop": ["x"], "num_predict": 3},
}  # fmt: skip
CHAT = OLLAMA | {
    "messages": [
        {"role": "user", "content": "x", "images": []},
        {"role": "assistant", "content": "", "thinking": "x", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": "b"}}}
        ]},
        {"role": "tool", "tool_name": "f", "content": "x"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
}  # fmt: skip
GENERATE = OLLAMA | {"prompt": "x", "system": "x", "raw": False}
VALUES = (
    None, True, False, 0, -1, 1.5, 1e308, 10**400, 1 << 64, "", "x", "function", [], [[]], [None],
    {}, {"type": "text"}, {"type": ["text"]}, {"type": {}}, {"": None},
)  # fmt: skip


def places(value):
    """Every place in a value, as the container and the key there."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from places(value[key])


def changed(body, rng):
    """The body with one or two places given another value, or taken away."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(list(places(body)))
        if rng.random() < 0.15:
            del container[key]
        else:
            container[key] = deepcopy(rng.choice(VALUES))
    return json.dumps(body).encode()


def find(item_id):
    return {"type": "message", "role": "assistant", "content": item_id}


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (ResponsesRequest, RESPONSE),
        (MessagesRequest, MESSAGES),
        (CountRequest, MESSAGES),
        (OllamaChatRequest, CHAT),
        (OllamaGenerateRequest, GENERATE),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_body_becomes_an_order_or_is_refused(schema, body, template):
    config = GatewayConfig(served_model_name="m", chat_template=template)

    def ordered(raw):
        request = parse_untrusted(schema, raw)
        if schema is ResponsesRequest:
            return request.order(config, request.items(find))
        return request.order(config)

    def refusal(raw):
        try:
            assert isinstance(ordered(raw), Order)
        except ApiError as error:
            return error
        return None

    assert refusal(json.dumps(body).encode()) is None
    rng = random.Random(0)
    refusals = [each for _ in range(600) if (each := refusal(changed(body, rng)))]
    assert {each.kind for each in refusals} == {Kind.INVALID}
    assert all(each.message for each in refusals)
    assert 60 < len(refusals) < 600
