"""Tiny models, which more threads than one only keep waiting for each other."""

import pytest
import torch

from tests.pipeline.oracles import *  # noqa: F403 - fixtures


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
