"""The litellm package, in each dialect."""

import json

import pytest

litellm = pytest.importorskip("litellm")
from tests.clients.asked import MODEL, PARAMETERS, USER, Animal  # noqa: E402

pytestmark = pytest.mark.slow
CHOICE = {"type": "function", "function": {"name": "get_weather"}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


@pytest.fixture(params=["openai", "anthropic", "ollama_chat"])
def complete(request, server):
    base = f"{server.url}/v1" if request.param == "openai" else server.url

    def complete(**fields):
        return litellm.completion(
            model=f"{request.param}/{MODEL}",
            api_base=base,
            api_key=server.key,
            **{"max_tokens": 100, "messages": USER, **fields},
        )

    return complete


def test_text(complete):
    assert complete(max_tokens=20, user="u").choices[0].message.content
    chunks = list(complete(max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_form(complete):
    answer = complete(response_format=Animal)
    assert Animal(**json.loads(answer.choices[0].message.content))


def test_tools(complete):
    message = complete(tools=TOOLS, tool_choice=CHOICE).choices[0].message
    # Ollama's API knows no choice of a tool: there the model may say something instead.
    assert message.tool_calls or message.content
    for call in message.tool_calls or ():
        assert isinstance(json.loads(call.function.arguments), dict)


def test_responses(server):
    answer = litellm.responses(
        model=f"openai/{MODEL}", input="Hi", max_output_tokens=20, api_base=f"{server.url}/v1",
        api_key=server.key,
    )  # fmt: skip
    assert answer.output[0].content[0].text
