"""The packages openai and ai for Node.js."""

import json
import os
import shutil
from pathlib import Path
from subprocess import run

import pytest

from tests.clients.asked import Animal

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("clients.mjs")
WAYS = ["openai", "responses", "chat", "compatible", "messages"]


@pytest.fixture(params=WAYS)
def ask(request, server):
    """Has a case of the program asked, which finds its packages beside itself."""
    packages = Path(os.environ["VEILPIPE_NODE"])
    if not (packages / "node_modules").is_dir():
        pytest.skip("the packages are not installed")
    program = shutil.copy(PROGRAM, packages)

    def ask(case):
        command = ["node", program, f"{request.param}{case}"]
        environment = {**os.environ, "VEILPIPE_URL": server.url, "VEILPIPE_KEY": server.key}
        done = run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_text(ask):
    answer = ask("Text")
    assert answer["text"]
    assert answer["streamed"], answer


def test_a_form(ask):
    for animal in ask("Form")["animals"]:
        assert Animal.model_validate({"legs": 4, **animal})


def test_tools(ask):
    answer = ask("Tools")
    assert answer["calls"]
    assert all(set(call) == {"city"} for call in answer["calls"])
