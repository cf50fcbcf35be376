"""An engine that runs over two stages of the tiny model."""

import pytest

from pipeline.engine.engine import PipelineEngine
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from tests.pipeline.engine.engines import LIMITS, Yielding, new_cores


@pytest.fixture(scope="module")
def shards(tiny_model):
    config = load_config(tiny_model)
    return [
        load_shard(tiny_model, config, start, end, expected_hashes=None)
        for start, end in ((0, 2), (2, 4))
    ]


@pytest.fixture
def cores(shards):
    return new_cores(shards)


@pytest.fixture
async def engine(cores, nursery):
    engine = PipelineEngine(LIMITS)
    nursery.start_soon(engine.run, Yielding(LocalPipeline(cores)))
    return engine
