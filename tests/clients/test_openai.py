"""The openai package: chat completions and responses."""

import json

import pytest

openai = pytest.importorskip("openai")
from tests.clients.asked import MODEL, PARAMETERS, USER, Animal  # noqa: E402

pytestmark = pytest.mark.slow
FUNCTION = {"name": "get_weather", "description": "Tells the weather.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", **FUNCTION, "strict": True}]


@pytest.fixture
def client(server):
    with openai.OpenAI(**server.openai, max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=20)
    assert answer.choices[0].message.content
    chunks = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_chat_in_a_form_and_with_tools(client):
    answer = client.chat.completions.parse(model=MODEL, messages=USER, response_format=Animal)
    assert isinstance(answer.choices[0].message.parsed, Animal)
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    message = answer.choices[0].message
    assert set(json.loads(message.tool_calls[0].function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
    answer = client.chat.completions.create(
        model=MODEL, messages=[*USER, message, result], tools=TOOLS, max_tokens=20
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_responses(client):
    first = client.responses.create(
        model=MODEL,
        input="Remember the word apple.",
        instructions="Be brief.",
        max_output_tokens=20,
        metadata={"a": "b"},
        user="u",
        service_tier="auto",
        store=True,
    )
    assert first.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(
        model=MODEL, input="Which?", previous_response_id=first.id, max_output_tokens=10
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_responses_that_stream(client):
    with client.responses.stream(model=MODEL, input="Hi", max_output_tokens=20) as stream:
        events = list(stream)
    said = "".join(each.delta for each in events if each.type == "response.output_text.delta")
    # It takes that for no final response which has come to the end of what it may have.
    assert events[-1].type in {"response.completed", "response.incomplete"}
    assert said == events[-1].response.output_text


def test_responses_in_a_form_and_with_tools(client):
    answer = client.responses.parse(model=MODEL, input="Name an animal.", text_format=Animal)
    assert isinstance(answer.output_parsed, Animal)
    asked = [{"role": "user", "content": "How is the weather in Ulm?"}]
    answer = client.responses.create(
        model=MODEL, input=asked, tools=FLAT_TOOLS, tool_choice="required"
    )
    (call, *_) = answer.output
    assert set(json.loads(call.arguments)) == {"city"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    answer = client.responses.create(
        model=MODEL, input=[*asked, call, result], tools=FLAT_TOOLS, max_output_tokens=20
    )
    assert answer.output
