"""What servers tell of prompts over real stages: the same wherever the ends are, whoever dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.slow

PROMPTS = ["The sea lies still. " * 9, "Ships pass by at night, and birds", "Hm", "x" * 150]
ECHO = {"max_tokens": 2, "echo": True, "logprobs": 2}


@pytest.fixture(params=["stages", "client"])
def server(cluster, request):
    cluster.plan(2, split=request.param)
    return cluster.serve("--supervise", "--context", "512", "--hang-timeout", "3")


def told(server, prompt):
    body = server.wish(prompt, **ECHO)
    (choice,) = server.post(body).json()["choices"]
    vectors = server.post({"input": prompt}, "/v1/embeddings").json()["data"]
    return choice["text"], choice["logprobs"], [each["embedding"] for each in vectors]


@pytest.fixture(scope="module")
def kept():
    """What the first server said."""
    return {}


def test_what_is_told_does_not_depend_on_ends_company_or_losses(server, kept):
    alone = {prompt: told(server, prompt) for prompt in PROMPTS}
    for prompt, (text, logprobs, _) in alone.items():
        assert text.startswith(prompt)
        assert len(logprobs["tokens"]) == len(prompt) + ECHO["max_tokens"]  # a token a byte
        assert logprobs["token_logprobs"][0] is None
    assert (kept or alone) == alone
    kept.update(alone)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: told(server, prompt), PROMPTS * 4))
        assert together == [alone[prompt] for prompt in PROMPTS * 4]
        lost = pool.map(lambda prompt: told(server, prompt), PROMPTS * 4)
        os.kill(server.workers()[1], signal.SIGKILL)
        assert list(lost) == together
