"""A service before an engine that runs over the tiny model, split as one likes."""

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.limits import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.step_executor import StageCore
from pipeline.stego.fingerprint import Fingerprint, Settings
from pipeline.stego.keys import Secret
from pipeline.stego.retokenise import CoverTokenizer
from pipeline.stego.service import StegoService, Task
from tests.pipeline.engine.engines import Yielding

LIMITS = Limits(num_slots=8, max_seq_len=600, chunk_tokens=16)
MODEL = Fingerprint(precision="float32", kernels="native")
PROMPT = "In the beginning"


@pytest.fixture(scope="session")
def cover_tokenizer(text_model):
    return CoverTokenizer(Tokenizer(text_model / "tokenizer.json"))


@pytest.fixture(scope="session")
def open_service(text_model, cover_tokenizer):
    """Makes a service of stages that begin at these layers."""
    config = load_config(text_model)

    @asynccontextmanager
    async def make(*starts, limits=LIMITS, model=MODEL, is_row_exact=True, kernels="native"):
        if kernels == "native" and (why := why_not_native()):
            pytest.skip(f"no native kernels: {why}")
        bounds = zip((0, *starts), (*starts, 4), strict=True)
        session = limits.for_session(make_codec("F32", 64))
        cores = [
            StageCore(
                load_shard(text_model, config, *bound, kernels=kernels, expected_hashes=None),
                session,
                ActivationLog(limits.num_slots, limits.max_seq_len, 64) if bound[1] < 4 else None,
            )
            for bound in bounds
        ]
        engine = PipelineEngine(replace(limits, num_stages=len(cores)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run, Yielding(LocalPipeline(cores)))
            yield StegoService(engine, cover_tokenizer, model, is_row_exact=is_row_exact)
            nursery.cancel_scope.cancel()

    return make


@pytest.fixture
async def service(open_service, nursery):
    async with open_service() as service:
        yield service


@pytest.fixture
def task(cover_tokenizer):
    """What to write after, or to read with, as one likes."""

    def make(**changes):
        usual = {
            "prompt_ids": cover_tokenizer.tokenizer.encode(PROMPT),
            "secret": Secret(bytes(range(32))),
            "settings": Settings(),
        }
        return Task(**usual | changes)

    return make
