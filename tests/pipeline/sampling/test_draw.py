"""A token is the same wherever it is drawn, and what cannot be drawn is said so."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import RequestFailed
from pipeline.sampling.draw import Draw, History, adjust, draw, final, token_at
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.sampler import Sampler

VOCAB = 300


def random_logits(seed, vocab=VOCAB):
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def random_params(rng):
    """Any of the ways to choose, alone and together."""

    def maybe(value, neutral):
        return value if rng.random() < 0.5 else neutral

    bias = {rng.randrange(VOCAB + 50): rng.uniform(-5, 5) for _ in range(rng.randrange(5))}
    return SamplingParams(
        temperature=maybe(rng.uniform(0.1, 2), maybe(1.0, 0.0)),
        top_k=maybe(rng.randint(1, 50), 0),
        top_p=maybe(rng.uniform(0.1, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        seed=rng.randrange(1 << 30),
        logit_bias=maybe(bias, {}),
    )


def mask(*allowed, vocab=VOCAB):
    bits = np.zeros(-(-vocab // 8) * 8, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@pytest.mark.parametrize("seed", range(60))
def test_drawing_as_a_sampler_says_is_what_it_chooses_itself(seed):
    rng = random.Random(seed)
    params = random_params(rng)
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
    chooser, teller = Sampler(params, prompt), Sampler(params, prompt)
    for step in range(70):
        logits = random_logits(1000 * seed + step)
        token_id = draw(logits, teller.next_draw())
        assert draw(logits, teller.next_draw()) == token_id  # as often as it is asked
        teller.took(token_id)
        assert chooser.choose(logits).token_id == token_id


def test_penalties_and_bias_come_before_the_mask_and_that_before_the_filters():
    logits = np.array([5.0, 4.0, 3.0, 2.0], np.float32)
    # The mask leaves 2 and 3; of these top-k must see the bias, and nothing of what is masked.
    params = SamplingParams(temperature=1.0, top_k=1, logit_bias={3: 1.5})
    assert draw(logits, Draw(params, (0.5,), allowed=mask(2, 3, vocab=4))) == 3
    assert draw(logits, Draw(replace(params, logit_bias={}), allowed=mask(2, 3, vocab=4))) == 2
    # Half of what is left, not half of all.
    nucleus = SamplingParams(temperature=1.0, top_p=0.5)
    assert draw(logits, Draw(nucleus, (0.99,), allowed=mask(2, 3, vocab=4))) == 2


def test_a_later_row_counts_what_was_drafted_before_it():
    logits = np.array([4.0, 3.9, 3.8, 0.0], np.float32)
    params = SamplingParams(frequency_penalty=0.15)
    how = Draw(
        params, (0.0,) * 3, np.array([3], np.uint32), np.array([1], np.uint32), drafted=(0, 1)
    )
    assert [draw(logits, how, row) for row in range(3)] == [0, 1, 0]
    assert how.seen.tolist() == [3]
    assert how.counts.tolist() == [1]


def test_every_row_has_a_mask_of_its_own():
    logits = random_logits(1, vocab=20)
    allowed = mask(3, vocab=20) + mask(17, vocab=20)
    how = Draw(SamplingParams(temperature=1.0), (0.1, 0.1), drafted=(3,), allowed=allowed)
    assert [draw(logits, how, row) for row in range(2)] == [3, 17]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 7, VOCAB - 1])
def test_logits_that_are_no_numbers_give_no_token(bad, temperature, at):
    logits = random_logits(0)
    logits[at] = bad
    with pytest.raises(RequestFailed, match="no numbers"):
        draw(logits, Draw(SamplingParams(temperature=temperature)))


def test_nothing_allowed_gives_no_token():
    with pytest.raises(RequestFailed, match="leave none"):
        draw(random_logits(0), Draw(SamplingParams(temperature=1.0), allowed=mask()))


def test_no_logit_that_came_in_is_changed():
    logits = random_logits(0)
    kept = logits.copy()
    params = SamplingParams(
        temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={1: 1.0},
    )  # fmt: skip
    ids = np.arange(50, dtype=np.uint32)
    draw(logits, Draw(params, (0.3,), ids, ids, allowed=mask(*range(100))))
    np.testing.assert_array_equal(logits, kept)


def test_the_seed_alone_decides_the_numbers_one_for_each_token():
    numbers = np.random.default_rng(7).random(5)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7), ())
    for number in numbers:
        assert sampler.next_draw().uniforms == (number,)
        sampler.took(1)


def test_a_choice_is_penalties_then_filters_then_the_number():
    logits, params = random_logits(2), SamplingParams(temperature=0.8, top_p=0.9, seed=3)
    how = Sampler(params, ()).next_draw()
    assert draw(logits, how) == token_at(final(adjust(logits, how), params), how.uniforms[0])


def test_a_history_counts_the_generated_and_only_knows_the_prompt():
    history = History([5, 6, 5])
    for token_id in [6, 9, *range(100, 300), 9]:
        history.add(token_id)
    counts = dict(zip(history.seen.tolist(), history.counts.tolist(), strict=True))
    assert counts == {5: 0, 6: 1, 9: 2} | dict.fromkeys(range(100, 300), 1)
