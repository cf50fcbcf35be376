"""A token is the same wherever it is drawn, and what cannot be drawn is said so."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import RequestFailed
from pipeline.sampling.draw import Draw, Text, adjust, choose, draw, final, token_at
from pipeline.sampling.masks import masks_of
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
    how = Draw(params, (0.0,) * 3, np.array([3], np.uint32), drafted=(0, 1))
    assert [draw(logits, how, row) for row in range(3)] == [0, 1, 0]
    assert how.text.tolist() == [3]


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


@pytest.mark.parametrize("share", [0.005, 0.1, 0.5, 0.99])
def test_under_a_mask_what_is_drawn_is_what_all_of_the_masked_logits_give(share):
    rng = random.Random(f"masked {share}")
    for seed in range(150):
        logits, params = random_logits(seed), random_params(rng)
        allowed = [each for each in range(VOCAB) if rng.random() < share] or [rng.randrange(VOCAB)]
        text = Text([rng.randrange(VOCAB) for _ in range(20)]).ids
        how = Draw(params, (rng.random(),), text, 12, allowed=mask(*allowed))
        assert draw(logits, how) == choose(adjust(logits, how), params, how.uniforms[0])
        assert draw(logits, how) in allowed


class Packed:
    """A mask that has its answer in both forms; which of them was asked for."""

    def __init__(self):
        self.asked = []

    def allowed(self, generated, vocab_size):
        self.asked.append("allowed")
        return np.arange(vocab_size) % (len(generated) + 2) == 0

    def packed(self, generated, vocab_size):
        self.asked.append("packed")
        allowed = np.arange(vocab_size) % (len(generated) + 2) == 0
        return np.packbits(allowed, bitorder="little").tobytes()


def test_a_mask_that_is_packed_travels_as_it_is():
    params = SamplingParams(temperature=1.0, seed=3)
    mine = Packed()
    alone = Sampler(params, [1, 2], masks=(mine,), vocab_size=VOCAB)
    taken_apart = Sampler(params, [1, 2], masks=(Packed(), Packed()), vocab_size=VOCAB)
    for token_id in (4, 6, 9):
        assert alone.next_draw().allowed == taken_apart.next_draw().allowed
        assert alone.next_draw(1).allowed != alone.next_draw().allowed
        for sampler in (alone, taken_apart):
            sampler.took(token_id)
    assert set(mine.asked) == {"packed"}


def test_nothing_allowed_gives_no_token():
    with pytest.raises(RequestFailed, match="leave none"):
        draw(random_logits(0), Draw(SamplingParams(temperature=1.0), allowed=mask()))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (
            SamplingParams(temperature=1.0, seed=7),
            [219, 273, 232, 9, 123, 220, 1, 234, 192, 63, 167, 112, 126, 156, 123, 167],
        ),
        (
            SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=8),
            [219, 273, 231, 9, 292, 185, 170, 103, 57, 63, 180, 117, 126, 131, 201, 167],
        ),
        (
            SamplingParams(
                temperature=1.5, top_k=40, frequency_penalty=0.7, presence_penalty=-0.3, seed=-9
            ),
            [91, 124, 136, 9, 15, 220, 210, 199, 284, 261, 120, 136, 275, 122, 275, 90],
        ),
    ],
)
def test_a_seed_gives_the_tokens_that_it_has_always_given(params, expected):
    sampler, told = Sampler(params, (1, 2, 3, 2)), Sampler(params, (1, 2, 3, 2))
    assert [sampler.choose(random_logits(seed)).token_id for seed in range(16)] == expected
    for seed, token_id in enumerate(expected):
        assert draw(random_logits(seed), told.next_draw()) == token_id
        told.took(token_id)


def test_no_logit_that_came_in_is_changed():
    logits = random_logits(0)
    kept = logits.copy()
    params = SamplingParams(
        temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={1: 1.0},
    )  # fmt: skip
    ids = np.arange(50, dtype=np.uint32)
    draw(logits, Draw(params, (0.3,), ids, 25, allowed=mask(*range(100))))
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


def test_a_text_counts_the_generated_and_only_knows_the_prompt():
    text = Text([5, 6, 5])
    generated = [6, 9, *range(100, 280), 9]
    for token_id in generated:
        text.add(token_id)
    assert text.ids.tolist() == [5, 6, 5, *generated]
    logits = np.zeros(VOCAB, np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    changed = adjust(logits + 8, Draw(params, text=text.ids, num_prompt=3))
    expected = {5: 4.0, 6: 2.5, 9: 2.0} | dict.fromkeys(range(100, 280), 2.5)
    assert changed.tolist() == [expected.get(token_id, 8.0) for token_id in range(VOCAB)]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_told_ahead_is_told_again_once_the_token_before_it_is_known(seed):
    """All but that token, which is the last of its text."""
    rng = random.Random(seed)
    params = replace(random_params(rng), min_tokens=5)
    sampler = Sampler(params, (1, 2), masks=masks_of(params, {3}), vocab_size=VOCAB)
    for _ in range(9):
        sampler.next_draw()
        ahead = sampler.next_draw(1)
        token_id = rng.randrange(VOCAB)
        sampler.took(token_id)
        then = sampler.next_draw()
        text = [*ahead.text[:-1].tolist(), token_id] if params.has_penalties else []
        assert then.text.tolist() == text
        for field in ("params", "uniforms", "num_prompt", "drafted", "allowed"):
            assert getattr(then, field) == getattr(ahead, field)
