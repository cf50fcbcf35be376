"""A tiny random model whose laboratory takes seconds."""

import pytest

from pipeline.leakage.measure import Laboratory
from pipeline.leakage.public_model import PublicModel
from pipeline.leakage.suite import Scope
from tests.pipeline.oracles import _quiet_oracle, make_oracle  # noqa: F401 - fixtures

TINY = Scope(num_texts=3, num_tokens=16, num_deep_texts=1, num_deep_tokens=10)


def silent(what, unit):
    """Nobody watches."""


@pytest.fixture(scope="session")
def laboratory(tiny_model):
    return Laboratory.open(tiny_model, TINY, silent)


@pytest.fixture(scope="session")
def public(make_oracle):  # noqa: F811
    """Name of a family -> the public model, cut at layer 1 and in the middle."""
    return lambda family: PublicModel.load(make_oracle(family).directory, (1, 2))
