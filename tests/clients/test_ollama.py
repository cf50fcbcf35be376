"""The ollama package."""

import json

import pytest

ollama = pytest.importorskip("ollama")
from tests.clients.asked import MODEL, USER, Animal  # noqa: E402

pytestmark = pytest.mark.slow
SHORT = {"num_predict": 20, "temperature": 0.5}


def get_weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: Where.
    """
    return f"Sunny in {city}."


@pytest.fixture
def client(server):
    return ollama.Client(server.url, headers={"Authorization": f"Bearer {server.key}"})


def test_chat_and_generate(client):
    whole = client.chat(MODEL, USER, options=SHORT)
    assert whole.message.content
    assert whole.done_reason in {"stop", "length"}
    chunks = list(client.chat(MODEL, USER, options=SHORT, stream=True))
    assert "".join(chunk.message.content for chunk in chunks)
    assert chunks[-1].eval_count <= 20
    assert client.generate(MODEL, "Hi", options=SHORT, keep_alive=5).response
    assert list(client.generate(MODEL, "Hi", options=SHORT, stream=True))[-1].done


def test_a_form_and_tools(client):
    answer = client.chat(MODEL, USER, format=Animal.model_json_schema())
    assert Animal(**json.loads(answer.message.content))
    answer = client.chat(MODEL, USER, tools=[get_weather], options={"num_predict": 60})
    assert answer.message.content or answer.message.tool_calls


def test_what_is_there(client):
    assert [model.model for model in client.list().models] == [MODEL]
    assert "completion" in client.show(MODEL).capabilities
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        client.chat("other", USER)
