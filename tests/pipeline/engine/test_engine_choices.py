"""What each request says of its tokens decides them, wherever they are drawn."""

import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.engine.generation import Generation
from pipeline.protocol.result_kinds import Result, Want
from pipeline.sampling.masks import AllowedTokens
from pipeline.sampling.params import MAX_BIASES, ChooserSpec, SamplingParams
from tests.pipeline.engine.engines import generation, tokens_of


async def test_logprobs_come_with_the_tokens_that_asked(engine):
    rng = random.Random(5)
    async with engine.generate(generation(rng, 5, logprobs=3)) as stream:
        outputs = [output async for output in stream]
    for output in outputs:
        assert output.logprob is not None
        assert len(output.top) == 3
        # Greedy: the chosen token is the likeliest.
        assert output.top[0][0] == output.token_id


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "seed": 6, "logprobs": 4},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 1.0, "seed": 7, "logit_bias": {5: 4.0, 10**6: 1.0}, "logprobs": 0},
        {"allowed_token_ids": (250, 3, 77, 1000)},
        {"temperature": 1.5, "seed": 8, "allowed_token_ids": tuple(range(9, 40)), "logprobs": 2},
        {"temperature": 1.2, "seed": 9, "min_tokens": 12, "repetition_penalty": 1.2},
    ],
    ids=str,
)
async def test_a_token_drawn_by_the_last_stage_is_the_one_drawn_here(engine, sampling):
    drawn = replace(
        generation(random.Random(13), 25, **sampling),
        eos_token_ids=frozenset(range(128)) if "min_tokens" in sampling else frozenset(),
        vocab_size=256,
    )
    chosen = replace(drawn, processors=(lambda token_ids, logits: logits,))
    assert drawn.want.result is Result.DRAWN
    assert chosen.want == Want.LOGITS
    outputs = []
    for request in (drawn, chosen):
        async with engine.generate(request) as stream:
            outputs.append([output async for output in stream])
    assert len(outputs[0]) >= 12
    for there, here in zip(*outputs, strict=True):
        assert there.token_id == here.token_id
        assert (
            (there.logprob is None) is (here.logprob is None) is (drawn.sampling.logprobs is None)
        )
        assert there.logprob is None or there.logprob == pytest.approx(here.logprob, rel=1e-6)
        assert [token_id for token_id, _ in there.top] == [token_id for token_id, _ in here.top]
        assert dict(there.top) == pytest.approx(dict(here.top), rel=1e-6)


@pytest.mark.parametrize(
    ("request_", "want"),
    [
        (SamplingParams(seed=1), Want.TOKEN),
        (SamplingParams(temperature=0.5), Want.DRAWN),
        (SamplingParams(logprobs=0), Want(Result.DRAWN, 1, 0, 1)),
        (SamplingParams(logprobs=255), Want(Result.DRAWN, 1, 255, 1)),
        (SamplingParams(logprobs=256), Want.LOGITS),  # more than a header can name
        (SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES), 1.0)), Want.DRAWN),
        (SamplingParams(allowed_token_ids=(1, 2)), Want.LOGITS),
        (SamplingParams(temperature=0.5, chooser=ChooserSpec("mirostat")), Want.LOGITS),
        (SamplingParams(temperature=0.5, chooser=ChooserSpec("draw")), Want.DRAWN),
        (SamplingParams(temperature=0.5, chooser=ChooserSpec("greedy")), Want.TOKEN),
        (SamplingParams(chooser=ChooserSpec("greedy"), presence_penalty=1.0), Want.DRAWN),
    ],
)
def test_logits_travel_only_where_nothing_less_will_do(request_, want):
    request = Generation((1,), 1, frozenset(), request_)
    assert request.want == want
    assert replace(request, samples_at_home=True).want == Want.LOGITS


def test_a_mask_travels_where_the_vocabulary_is_known():
    allowed = SamplingParams(allowed_token_ids=(1, 2))
    known = Generation((1,), 1, frozenset(), allowed, vocab_size=9)
    assert known.want == Want.DRAWN
    assert known.new_sampler().next_draw().allowed == bytes([0b110, 0])
    assert replace(known, chooser=lambda: None).want == Want.LOGITS
    own = replace(known, sampling=SamplingParams(), masks=(AllowedTokens({1, 2}),))
    assert own.want == Want.DRAWN
    assert own.new_sampler().next_draw().allowed == bytes([0b110, 0])
    assert replace(own, vocab_size=0).want == Want.LOGITS


async def test_processors_of_the_callers_own_decide_what_may_be_chosen(engine):
    rng = random.Random(7)
    plain = generation(rng, 12)
    greedy = await tokens_of(engine, plain)
    seen = []

    def ban(token_ids, logits):
        seen.append(tuple(token_ids))
        changed = logits.copy()
        changed[greedy] = -np.inf
        return changed

    def only_even(token_ids, logits):
        changed = logits.copy()
        changed[1::2] = -np.inf
        return changed

    banned = await tokens_of(engine, replace(plain, processors=(ban, only_even)))
    assert not set(banned) & set(greedy)
    assert all(token_id % 2 == 0 for token_id in banned)
    assert seen[3] == (*plain.prompt_ids, *banned[:3])
    assert await tokens_of(engine, plain) == greedy


async def test_a_chooser_of_the_callers_own_is_made_for_each_request(engine):
    made = []

    class Second:
        """Takes the second most likely token each time."""

        def __init__(self):
            made.append(self)
            self.num_asked = 0

        def choose(self, final):
            self.num_asked += 1
            return int(final.ids[np.argsort(-final.probabilities)[1]])

    rng = random.Random(13)
    plain = generation(rng, 8, temperature=1.0)
    own = replace(plain, chooser=Second)
    first = await tokens_of(engine, own)
    assert await tokens_of(engine, own) == first
    assert [each.num_asked for each in made] == [8, 8]
    assert first != await tokens_of(engine, replace(plain, sampling=SamplingParams()))


async def test_masks_hold_for_every_token(engine):
    rng = random.Random(14)
    allowed = tuple(range(40, 60))
    tokens = await tokens_of(engine, generation(rng, 12, allowed_token_ids=allowed))
    assert set(tokens) <= set(allowed)
    assert len(tokens) == 12


async def test_a_text_has_its_least_length(engine):
    rng = random.Random(15)
    plain = generation(rng, 12)
    (end, *_) = await tokens_of(engine, plain)
    ending = replace(plain, eos_token_ids=frozenset({end}))
    assert await tokens_of(engine, ending) == [end]
    longer = replace(ending, sampling=SamplingParams(min_tokens=5))
    assert len(await tokens_of(engine, longer)) > 5
