"""A server that scripts/test_clients.sh has started."""

import os
from typing import NamedTuple

import pytest


class Server(NamedTuple):
    url: str
    key: str

    @property
    def openai(self):
        return {"base_url": f"{self.url}/v1", "api_key": self.key}


@pytest.fixture(scope="session")
def server():
    if "VEILPIPE_URL" not in os.environ:
        pytest.skip("scripts/test_clients.sh starts the server")
    return Server(os.environ["VEILPIPE_URL"], os.environ["VEILPIPE_KEY"])
