"""Over encrypted channels the last stage draws what would be drawn at home, in fewer bytes."""

from dataclasses import replace

import pytest

from pipeline.agreement.trust_policy import UserTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams

SAMPLING = [
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=4, logprobs=3),
    SamplingParams(logit_bias={7: 5.0}, frequency_penalty=0.5),
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=["drawn", "with logprobs", "greedy with bias"])
async def test_the_last_stage_draws_what_would_be_drawn_here(deployment, nursery, sampling):
    limits = Limits(2, 128, chunk_tokens=16, num_stages=2)
    request = Generation((100, 101, 102), 20, frozenset(), sampling)
    chosen_here = replace(request, processors=(lambda token_ids, logits: logits,))
    found, num_bytes = [], []
    async with deployment.running() as (manifest, results):
        trust = UserTrust.create(manifest, deployment.identity, deployment.authority.root_cert)
        options = PipelineOptions(
            limits, times=TimeLimits(connect_seconds=10), data_out_listen=results
        )
        async with open_pipeline(manifest, trust, options, lambda line: None) as pipeline:
            assert pipeline.is_row_exact is all(each.is_row_exact for each in pipeline.ready)
            engine = PipelineEngine(limits)
            nursery.start_soon(engine.run, pipeline)
            stats = pipeline._link._data_out.stats
            for each in (request, chosen_here):
                before = stats.bytes_received
                async with engine.generate(each) as stream:
                    found.append([(output.token_id, len(output.top)) async for output in stream])
                num_bytes.append(stats.bytes_received - before)
            nursery.cancel_scope.cancel()
    assert found[0] == found[1]
    assert (
        num_bytes[0] * 4 < num_bytes[1]
    )  # of a vocabulary of 256; of an ordinary one, a thousandth
