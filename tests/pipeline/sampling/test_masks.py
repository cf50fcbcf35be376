"""Masks decide what may come next, before anything else is decided."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.sampling.masks import NotThese, masks_of
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.sampler import Sampler

LOGITS = np.array([4, 3, 2, 1, 0], np.float32)


def chosen(params, num, end_ids=(), masks=(), **more):
    masks = (*masks_of(params, end_ids), *masks)
    sampler = Sampler(params, (0, 0), masks=masks, **more)
    return [sampler.choose(LOGITS).token_id for _ in range(num)]


def test_only_allowed_tokens_are_chosen_greedily_or_not():
    assert chosen(SamplingParams(allowed_token_ids=(3, 2)), 2) == [2, 2]
    drawn = SamplingParams(temperature=2.0, seed=1, allowed_token_ids=(3, 2))
    assert set(chosen(drawn, 100)) == {2, 3}


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}])
def test_a_mask_comes_before_what_keeps_the_most_likely(cut):
    params = SamplingParams(temperature=1.0, seed=1, allowed_token_ids=(4, 3), **cut)
    assert chosen(params, 5) == [3] * 5  # of the others none would be left


def test_ids_that_the_model_does_not_have_allow_nothing():
    assert chosen(SamplingParams(allowed_token_ids=(1, 99)), 2) == [1, 1]
    with pytest.raises(InputError, match="no token"):
        chosen(SamplingParams(allowed_token_ids=(99,)), 1)


def test_no_end_comes_before_so_many_tokens():
    params = SamplingParams(min_tokens=3)
    assert chosen(params, 5, end_ids={0, 1, 7}) == [2, 2, 2, 0, 0]
    assert chosen(params, 2, end_ids=()) == [0, 0]


def test_masks_of_ones_own_see_what_was_generated_and_the_strictest_counts():
    seen = []

    class Alternating:
        def allowed(self, generated, vocab_size, /):
            seen.append(tuple(generated))
            if not generated:
                return None
            allowed = np.ones(vocab_size, np.bool_)
            allowed[generated[-1]] = False
            return allowed

    params = SamplingParams(allowed_token_ids=(1, 2))
    assert chosen(params, 4, masks=(Alternating(),)) == [1, 2, 1, 2]
    assert seen == [(), (1,), (1, 2), (1, 2, 1)]


def test_no_processor_and_no_bias_lifts_a_mask():
    params = SamplingParams(allowed_token_ids=(3,), logit_bias={0: 100.0})
    lifting = [lambda token_ids, logits: logits + np.float32(50)]
    assert chosen(params, 2, processors=lifting) == [3, 3]


def test_logprobs_are_the_models_own_whatever_is_masked():
    params = SamplingParams(allowed_token_ids=(4,), logprobs=1)
    choice = Sampler(params, (), masks=masks_of(params, ())).choose(LOGITS)
    assert choice.token_id == 4
    assert choice.top[0][0] == 0
    assert choice.logprob < choice.top[0][1]


def test_of_a_forbidden_sequence_the_last_token_is_not_allowed_behind_the_others():
    mask = NotThese([(0,), (1, 2), (1, 1, 3), ()])

    def forbidden(*generated):
        return set(np.flatnonzero(~mask.allowed(generated, 5)).tolist())

    assert forbidden() == {0}
    assert forbidden(1) == {0, 2}
    assert forbidden(4, 1, 1) == {0, 2, 3}
    assert forbidden(1, 4) == {0}
    assert forbidden(1, 1, 4) == {0}
    assert chosen(SamplingParams(), 3, masks=(mask,)) == [1, 1, 1]
