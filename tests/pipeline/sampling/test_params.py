import math

import pytest

from pipeline.errors import InputError
from pipeline.sampling.params import ChooserSpec, SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", 2.1),
        ("top_k", -2),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
        ("presence_penalty", NAN),
        ("frequency_penalty", -INF),
        ("repetition_penalty", 101),
        ("presence_penalty", 2.5),
        ("seed", 1 << 64),
        ("min_tokens", -1),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (3, -1)),
        ("allowed_token_ids", tuple(range((1 << 14) + 1))),
        ("allowed_token_ids", (1 << 20,)),
        ("logprobs", -1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: NAN}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("chooser", ChooserSpec("mirostat")),  # at temperature 0
        ("stop", ("a", "")),
        ("stop", ("a" * 1025,)),
        ("stop", ("a",) * 17),
    ],
)
def test_a_value_without_meaning_is_refused_by_name(name, value):
    with pytest.raises(InputError, match="stop string" if name == "stop" else name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"seed": 3, "stop": ("x",), "top_k": 5, "top_p": 0.5, "min_p": 0.1}, False),
        ({"temperature": 0.1}, True),
        ({"logprobs": 0}, True),
        ({"logit_bias": {3: 1.0}}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"allowed_token_ids": (1,)}, True),
        ({"min_tokens": 1}, True),
        ({"chooser": ChooserSpec("greedy")}, True),
    ],
)
def test_logits_are_asked_for_exactly_when_the_greedy_token_is_not_enough(changes, expected):
    assert SamplingParams(**changes).needs_logits is expected
