"""The langchain-openai package, over chat completions and over responses."""

import pytest

openai = pytest.importorskip("langchain_openai")
from tests.clients.asked import MODEL, PARAMETERS, QUESTION, Animal  # noqa: E402

pytestmark = pytest.mark.slow


FUNCTION = {"name": "get_weather", "description": "Tells the weather.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request, server):
    return openai.ChatOpenAI(
        model=MODEL,
        **server.openai,
        max_retries=0,
        max_tokens=150,
        temperature=0,
        use_responses_api=request.param,
    )


def test_text(model):
    short = model.bind(max_tokens=20)
    assert short.invoke(QUESTION).text
    chunks = list(short.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_a_form(model, method):
    formed = model.with_structured_output(Animal, method=method, include_raw=method == "json_mode")
    answer = formed.invoke(f"{QUESTION} Answer in JSON.")
    if method == "json_mode":  # JSON, but of what form is left to the model
        assert answer["raw"].text.lstrip().startswith("{")
    else:
        assert isinstance(answer, Animal)


def test_tools(model):
    asked = [("user", "How is the weather in Ulm?")]
    answer = model.bind_tools([TOOL], tool_choice="get_weather").invoke(asked)
    (call, *_) = answer.tool_calls
    assert set(call["args"]) == {"city"}
    results = [
        {"role": "tool", "tool_call_id": each["id"], "content": "Sunny."}
        for each in answer.tool_calls
    ]
    again = model.bind_tools([TOOL]).bind(max_tokens=20)
    after = again.invoke([*asked, answer, *results])
    # A call that the limit cut short is an invalid one.
    assert after.text or after.tool_calls or after.invalid_tool_calls
