"""The llm package, by its command."""

import json
import os
import sys
from subprocess import run

import pytest

pytest.importorskip("llm")
from tests.clients.asked import MODEL, QUESTION, Animal

pytestmark = pytest.mark.slow
FUNCTION = 'def get_weather(city: str) -> str:\n    "Tells the weather."\n    return city\n'


@pytest.fixture
def llm(server, tmp_path):
    tmp_path.joinpath("extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {MODEL}\n  api_base: {server.url}/v1\n"
        "  api_key_name: here\n  supports_schema: true\n  supports_tools: true\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def ask(*arguments, fails=None):
        command = [sys.executable, "-m", "llm", "-m", "here", "--key", server.key, *arguments]
        done = run(command, env=environment, capture_output=True, text=True, stdin=-3, check=False)
        assert done.returncode == 0 or (fails and fails in done.stderr), done.stderr
        return done.stdout

    return ask


def test_text(llm):
    assert llm(QUESTION, "-o", "max_tokens", "20").strip()
    assert llm(QUESTION, "-o", "max_tokens", "20", "--no-stream", "-s", "Be brief.").strip()
    assert llm("And?", "--continue", "-o", "max_tokens", "20").strip()


def test_a_form(llm):
    schema = json.dumps(Animal.model_json_schema())
    assert Animal(**json.loads(llm(QUESTION, "--schema", schema)))


def test_tools(llm):
    # A model may call for ever, or say nothing; what is asked for is that it can be told of a tool.
    asked = [QUESTION, "--functions", FUNCTION, "-o", "max_tokens", "40", "--cl", "1"]
    llm(*asked, fails="Chain limit of 1 exceeded")
