"""Results that the orchestrator comes for, since nobody could dial it."""

import json

import pytest
import trio

from pipeline.agreement.manifest import build_manifest, dump_manifest
from pipeline.agreement.trust_policy import UserTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.errors import InputError, ManifestError, SessionRefused
from pipeline.orchestrator.failover import run_with_failover
from pipeline.orchestrator.open_pipeline import PipelineOptions, new_pipeline
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from tests.pipeline.conftest import PROMPT, Tap, reserve

NUM_TOKENS = 12


class Cuttable(Tap):
    """A relay whose connections can be cut, and that counts who has come by which name."""

    def __init__(self):
        super().__init__()
        self.names = []
        self._scopes = []

    async def _bridge(self, name, incoming, target):
        self.names.append(name)
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            await super()._bridge(name, incoming, target)

    def cut(self):
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()


async def test_a_pipeline_that_fetches_its_results_says_what_others_say(deployment):
    deployment.tap = Cuttable()
    with trio.fail_after(60):
        async with deployment.running(fetches=True) as (manifest, results):
            tokens = await deployment.generate(manifest, results, NUM_TOKENS)
    assert tokens == deployment.reference(NUM_TOKENS)
    assert sorted(deployment.tap.names) == ["control0", "control1", "data0", "data1", "data1"]


async def test_after_a_loss_results_are_fetched_anew(deployment):
    deployment.tap = Cuttable()
    tokens = []
    limits = Limits(1, 256, chunk_tokens=16, num_stages=2)
    engine = PipelineEngine(limits)

    def hear(output):
        tokens.append(output.token_id)
        if len(tokens) in {1, 5}:
            deployment.tap.cut()

    engine.submit(Generation(PROMPT, NUM_TOKENS, frozenset(), SamplingParams()), hear)
    with trio.fail_after(120):
        async with deployment.running(fetches=True) as (manifest, _):
            trust = UserTrust.create(manifest, deployment.identity, deployment.authority.root_cert)
            options = PipelineOptions(limits, times=TimeLimits(connect_seconds=60))
            async with new_pipeline(manifest, trust, options, lambda line: None) as pipeline:
                await run_with_failover(pipeline, engine.drain, engine.scheduler, 60.0)
                assert pipeline.stats.num_failovers >= 2
    assert tokens == deployment.reference(NUM_TOKENS)


async def test_no_address_is_taken_for_results_that_are_fetched(deployment):
    async with deployment.running(fetches=True) as (manifest, _):
        with pytest.raises(InputError, match="dialed for its results"):
            await deployment.generate(manifest, reserve())


def test_only_the_last_stage_may_name_nobody_to_dial(deployment):
    address = {"type": "tcp", "addr": "127.0.0.1:9000"}
    fields = json.loads(dump_manifest(deployment.planned))
    for stage in fields["stages"]:
        stage["endpoint"] = {"control": address, "data_in": address}
    with pytest.raises(ManifestError, match=r"stages\[0\] has no data_out"):
        build_manifest(fields, "test")
    fields["stages"][0]["endpoint"]["data_out"] = address
    assert build_manifest(fields, "test").endpoint(1).data_out is None


def test_a_stage_in_front_of_others_is_not_left_without_somebody_to_dial(deployment):
    assert deployment.setup(1).target(None) is None
    with pytest.raises(SessionRefused, match="told nobody to dial"):
        deployment.setup(0).target(None)
