"""Stages that come back elsewhere are found there, by the orchestrator and by their neighbours."""

from contextlib import ExitStack, asynccontextmanager

import pytest
import trio

from pipeline.agreement.addresses import StageEndpoint, TcpAddress
from pipeline.agreement.trust_policy import DevTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.failover import run_with_failover
from pipeline.orchestrator.open_pipeline import PipelineOptions, new_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import StageSetup
from transport.dial_and_listen import TcpEndpoint, listen

LOOPBACK = TcpEndpoint("127.0.0.1", 0)
NUM_TOKENS = 40
PROMPT = tuple(range(100, 120))


class Nomads:
    """Workers in this process, of which any may be ended and started at other ports."""

    def __init__(self, model_dir, directory, nursery):
        self.manifest = plan(model_dir, PlanOptions(3))
        self.dev = directory / "dev"
        self.trust = DevTrust.create(self.dev)
        self.nursery = nursery
        self.shards = [
            load_shard(
                model_dir,
                load_config(model_dir),
                stage.layer_start,
                stage.layer_end,
                expected_hashes=None,
            )
            for stage in self.manifest.stages
        ]
        self.scopes = {}
        self.at = {}
        self.num_started = [0, 0, 0]
        self.lost = []

    async def start(self, stage_idx):
        """A worker, unless it is there; the placement's part."""
        if stage_idx not in self.scopes:
            self.scopes[stage_idx] = trio.CancelScope()
            self.nursery.start_soon(self._work, stage_idx, self.scopes[stage_idx])

    async def _work(self, idx, scope):
        trust = DevTrust.create(self.dev)
        setup = StageSetup(
            self.manifest, idx, self.shards[idx], trust, "float32", 1, "cpu", 1 << 24,
            allow_dial=parse_networks(["127.0.0.0/8"]),
        )  # fmt: skip
        with ExitStack() as stack, scope:
            control, data_in = (stack.enter_context(listen(LOOPBACK)) for _ in range(2))
            self.at[idx] = control.endpoint, data_in.endpoint
            self.num_started[idx] += 1
            await self.worker(setup).serve(control, data_in)

    def worker(self, setup):
        return StageWorker(setup)

    def move(self, idx):
        """End a worker; its successor listens at whichever ports are free."""
        self.scopes.pop(idx).cancel()

    def where(self, stage_idx):
        control, data_in = self.at.get(stage_idx, (TcpEndpoint("127.0.0.1", 1),) * 2)
        after = self.at.get(stage_idx + 1, (None, self.results))[1]
        return StageEndpoint(
            control=address(control), data_in=address(data_in), data_out=address(after)
        )

    @property
    def results_at(self):
        return self.results

    def on_loss(self, error):
        self.lost.append(error)

    def progress(self, stage_idx):
        return None

    @asynccontextmanager
    async def pipeline(self, limits):
        with listen(LOOPBACK) as reserved:
            self.results = reserved.endpoint
        options = PipelineOptions(limits, TimeLimits(connect_seconds=10), self.results)
        async with new_pipeline(self.manifest, self.trust, options, print, self) as pipeline:
            yield pipeline

    async def generate(self, moves):
        """The tokens; `moves` names the stages that leave when so many tokens have come."""
        limits = Limits(1, 256, num_stages=3)
        engine = PipelineEngine(limits)
        tokens = []

        def hear(output):
            tokens.append(output.token_id)
            for idx in moves.get(len(tokens), ()):
                self.move(idx)

        engine.submit(Generation(PROMPT, NUM_TOKENS, frozenset(), SamplingParams()), hear)
        async with self.pipeline(limits) as pipeline:
            await run_with_failover(pipeline, engine.drain, engine.scheduler, 10)
        return tokens


def address(endpoint):
    return TcpAddress(type="tcp", addr=f"{endpoint.host}:{endpoint.port}")


@pytest.fixture
async def nomads(tiny_model, tmp_path, nursery):
    yield Nomads(tiny_model, tmp_path, nursery)
    nursery.cancel_scope.cancel()


async def test_requests_go_on_when_stages_come_back_elsewhere(nomads):
    with trio.fail_after(60):
        expected = await nomads.generate({})
        assert nomads.num_started == [1, 1, 1]
        before = dict(nomads.at)
        tokens = await nomads.generate({5: [1], 15: [0], 25: [2], 30: [0, 1, 2]})
    assert tokens == expected
    assert nomads.num_started == [3, 3, 3]
    assert {error.stage_idx for error in nomads.lost} == {0, 1, 2}
    ports = [{endpoint.port for endpoint in nomads.at[idx]} for idx in range(3)]
    assert all(ports[idx].isdisjoint({e.port for e in before[idx]}) for idx in range(3))
