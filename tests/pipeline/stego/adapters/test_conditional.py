import numpy as np
import pytest
import torch

from pipeline.sampling.draw import final
from pipeline.sampling.params import SamplingParams
from pipeline.stego.adapters.conditional import Conditioning, conditional, force, index_of
from pipeline.stego.errors import StegoError
from pipeline.stego.token_weights import token_weights


def random_logits(seed, size=500):
    return torch.tensor(np.random.default_rng(seed).normal(scale=3, size=size)).float()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 2, 20, 500, 9999])
def test_what_leaves_the_device_gives_the_distribution_of_the_whole_vocabulary(top_k, top_p):
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p)
    for seed in range(20):
        logits = random_logits(seed)
        found = conditional(logits, Conditioning(params))
        whole = token_weights(final(logits.numpy(), params))
        assert found.ids.tolist() == whole.ids.tolist()
        assert found.weights.tolist() == whole.weights.tolist()
        assert found.total == whole.total


def test_of_equally_likely_tokens_the_lower_ids_are_kept():
    logits = torch.zeros(100)
    logits[70] = 1.0
    how = Conditioning(SamplingParams(temperature=1.0, top_k=3))
    assert conditional(logits, how).ids.tolist() == [0, 1, 70]


@pytest.mark.parametrize("top_k", [0, 2])
def test_excluded_tokens_take_no_other_tokens_place(top_k):
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    how = Conditioning(SamplingParams(temperature=1.0, top_k=top_k), excluded=(0, 77))
    assert conditional(logits, how).ids.tolist()[:2] == [1, 2]
    assert logits.tolist() == [5.0, 4.0, 3.0, 2.0]


def test_masked_tokens_are_never_chosen():
    logits = torch.full((10,), -torch.inf)
    logits[[3, 8]] = 1.0
    assert conditional(logits, Conditioning()).ids.tolist() == [3, 8]


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value, top_k):
    logits = torch.zeros(10)
    logits[4] = value
    with pytest.raises(StegoError, match="no numbers"):
        conditional(logits, Conditioning(SamplingParams(temperature=1.0, top_k=top_k)))


def test_logits_that_are_all_masked_are_refused():
    with pytest.raises(StegoError, match="masked"):
        conditional(torch.full((10,), -torch.inf), Conditioning())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, "numpy"])
def test_a_token_is_forced_in_place_in_any_kind_of_logits(kind):
    logits = np.ones(8, np.float32) if kind == "numpy" else torch.ones(8, dtype=kind)
    force(logits, 5)
    assert [float(each) for each in logits] == [-np.inf] * 5 + [0.0] + [-np.inf] * 2


def test_a_view_of_a_batch_is_forced_in_the_batch():
    logits = torch.ones(2, 1, 4)
    force(logits[1, 0], 2)
    assert logits[0].tolist() == [[1.0] * 4]
    assert logits[1, 0].argmax() == 2


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=1)])
def test_what_leaves_one_token_is_refused(params):
    with pytest.raises(StegoError, match="only the most likely token"):
        Conditioning(params)


def test_a_token_outside_of_the_distribution_has_no_place():
    weights = conditional(torch.arange(6.0), Conditioning(SamplingParams(temperature=1, top_k=2)))
    assert index_of(weights, 5) == 1
    for absent in (0, 3, 6):
        with pytest.raises(StegoError):
            index_of(weights, absent)


def test_a_negative_token_is_refused():
    with pytest.raises(StegoError, match="no token -1"):
        Conditioning(excluded=(3, -1))
