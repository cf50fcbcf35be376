"""The anthropic package."""

import pytest

anthropic = pytest.importorskip("anthropic")
from tests.clients.asked import MODEL, PARAMETERS, USER, Animal  # noqa: E402

pytestmark = pytest.mark.slow
# Of one call, which has an end; a small model may go on calling.
CHOICE = {"type": "any", "disable_parallel_tool_use": True}
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": PARAMETERS,
}


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as client:
        yield client


def test_messages(client):
    asked = {"model": MODEL, "system": "Be brief.", "messages": USER}
    answer = client.messages.create(**asked, max_tokens=20, metadata={"user_id": "u"})
    assert answer.content[0].text
    assert client.messages.count_tokens(**asked).input_tokens == (
        answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    )
    with client.messages.stream(**asked, max_tokens=20, stop_sequences=["zzz"]) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text
    begun = [*USER, {"role": "assistant", "content": "The lion is"}]
    assert client.messages.create(model=MODEL, messages=begun, max_tokens=9).content[0].text


def test_tools(client):
    asked = {"model": MODEL, "max_tokens": 200, "tools": [TOOL]}
    with client.messages.stream(**asked, messages=USER, tool_choice=CHOICE) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use"
    (call, *_) = answer.content
    assert set(call.input) == {"city"}
    results = [
        {"type": "tool_result", "tool_use_id": each.id, "content": "Sunny."}
        for each in answer.content
    ]
    history = [
        *USER,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": results},
    ]
    assert client.messages.create(**asked, messages=history).content


def test_a_form(client):
    answer = client.messages.parse(model=MODEL, max_tokens=200, messages=USER, output_format=Animal)
    assert isinstance(answer.parsed_output, Animal)


def test_errors_are_its_own(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=9, messages=USER)
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model=MODEL, max_tokens=9, messages=USER)


def test_what_is_there(client):
    assert [model.id for model in client.models.list()] == [MODEL]
