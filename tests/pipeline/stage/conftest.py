"""The worker that a test plays everybody else to."""

import pytest

from tests.pipeline.stage.rig import Rig


@pytest.fixture
def rig(tiny_model, tmp_path):
    return Rig(tiny_model, tmp_path)
