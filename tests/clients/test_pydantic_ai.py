"""The pydantic-ai package, over chat completions, responses and Anthropic's messages."""

import asyncio

import pytest

ai = pytest.importorskip("pydantic_ai")
from pydantic_ai.models.anthropic import AnthropicModel  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.anthropic import AnthropicProvider  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

from tests.clients.asked import MODEL, QUESTION, Animal  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(params=["chat", "responses", "messages"])
def model(request, server):
    if request.param == "messages":
        provider = AnthropicProvider(api_key=server.key, base_url=server.url)
        return AnthropicModel(MODEL, provider=provider)
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind(MODEL, provider=OpenAIProvider(**server.openai))


async def streamed(agent):
    async with agent.run_stream(QUESTION) as answer:
        return await answer.get_output()


def test_text(model):
    agent = ai.Agent(model, instructions="Be brief.", model_settings={"max_tokens": 20})
    assert agent.run_sync(QUESTION).output
    first = agent.run_sync("Hi")
    assert agent.run_sync("And?", message_history=first.all_messages()).output


def test_text_that_streams(model):
    agent = ai.Agent(model, model_settings={"max_tokens": 20})
    assert asyncio.run(streamed(agent))


@pytest.mark.parametrize("output", [ai.ToolOutput, ai.NativeOutput])
def test_a_form(model, output):
    if output is ai.NativeOutput and isinstance(model, AnthropicModel):
        pytest.skip("the package offers it for models of some names only")
    agent = ai.Agent(model, output_type=output(Animal), model_settings={"max_tokens": 1000})
    assert isinstance(agent.run_sync(QUESTION).output, Animal)
