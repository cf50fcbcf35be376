"""What a client does not say of how tokens are chosen."""

import json

import pytest

from pipeline.errors import InputError
from pipeline.gateway.openai_requests import ChatRequest, parse_untrusted
from pipeline.gateway.sampling_defaults import (
    GENERATION_CONFIG,
    OPENAI,
    load_sampling_defaults,
)

ADVISED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1}


def sampled(defaults, **fields):
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    order = parse_untrusted(ChatRequest, json.dumps(body).encode()).order(defaults)
    return {name: getattr(order.sampling[0], name) for name in ADVISED}


def write(directory, text):
    (directory / GENERATION_CONFIG).write_text(text)
    return load_sampling_defaults(directory)


def test_a_model_advises_only_where_the_client_is_silent(tmp_path):
    defaults = write(tmp_path, json.dumps({**ADVISED, "eos_token_id": 2, "max_length": 20}))
    assert sampled(defaults) == ADVISED
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert sampled(defaults, **neutral) == neutral
    assert sampled(defaults, temperature=0)["temperature"] == 0


@pytest.mark.parametrize("text", ["{}", '{"temperature": null, "do_sample": true}'])
def test_without_advice_it_is_as_openai_has_it(tmp_path, text):
    assert load_sampling_defaults(tmp_path) == OPENAI
    assert write(tmp_path, text) == OPENAI
    assert sampled(OPENAI)["temperature"] == 1


def test_a_model_that_is_not_to_be_sampled_takes_the_likeliest(tmp_path):
    assert sampled(write(tmp_path, '{"do_sample": false}'))["temperature"] == 0


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"temperature": "hot"}', '{"top_p": 3}', '{"top_k": true}', "[" * 100_000]
)
def test_advice_that_makes_no_sense_is_one_line(tmp_path, text):
    with pytest.raises(InputError, match=GENERATION_CONFIG) as caught:
        write(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1
