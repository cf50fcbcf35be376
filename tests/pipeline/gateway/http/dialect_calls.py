"""Requests in other dialects, to a model that thinks aloud and calls tools as Hermes does."""

import json
from contextlib import asynccontextmanager

import httpx

KEY = "sk-test-0123456789"
MODEL = "tiny/model"
AUTH = {"authorization": f"Bearer {KEY}"}
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | list }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{# <tool_call> <think> #}"
)
CALL = '<tool_call>\n{"name": "look", "arguments": {"word": "Ulm"}}\n</tool_call>'
THOUGHT = "<think>Hm, well.</think>\n\n"
PARAMETERS = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 6}},
    "required": ["word"],
    "additionalProperties": False,
}
LIKELY = '"}'  # or a string would have no end


@asynccontextmanager
async def client_of(gateway, headers=None):
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers or AUTH) as client:
        yield client


def events_of(answer):
    """The events of a stream that names them, as JSON; the name is that of the type."""
    events = []
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def lines_of(answer):
    return [json.loads(line) for line in answer.text.splitlines()]
