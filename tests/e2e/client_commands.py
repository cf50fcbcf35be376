"""Commands of clients' packages, from wherever they are installed."""

import sys
from pathlib import Path

import pytest

# What scripts/test_clients.sh makes, and the environment of the tests.
PLACES = (Path(__file__).parents[2] / "build/clients/venv/bin", Path(sys.executable).parent)


def client_command(name):
    """Its path. Skips the test where there is none."""
    for place in PLACES:
        if (place / name).exists():
            return place / name
    pytest.skip(f"{name} is not installed (scripts/test_clients.sh)")
    return None
