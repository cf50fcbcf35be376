"""The instructor package."""

import pytest

instructor = pytest.importorskip("instructor")
import anthropic  # noqa: E402
import openai  # noqa: E402

from tests.clients.asked import MODEL, USER, Animal  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_openais(server, mode):
    client = instructor.from_openai(
        openai.OpenAI(**server.openai, max_retries=0), mode=instructor.Mode[mode]
    )
    answer = client.create(model=MODEL, messages=USER, response_model=Animal, max_retries=0)
    assert isinstance(answer, Animal)


def test_a_form_that_streams(server):
    client = instructor.from_openai(openai.OpenAI(**server.openai, max_retries=0))
    parts = list(
        client.create_partial(model=MODEL, messages=USER, response_model=Animal, max_retries=0)
    )
    assert len(parts) > 1
    assert Animal(**parts[-1].model_dump())


def test_anthropics(server):
    raw = anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0)
    client = instructor.from_anthropic(raw)
    answer = client.create(
        model=MODEL, messages=USER, response_model=Animal, max_tokens=100, max_retries=0
    )
    assert isinstance(answer, Animal)
