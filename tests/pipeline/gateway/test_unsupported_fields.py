"""Fields of OpenAI's and its relatives' APIs: implemented, without effect, or refused by name."""

import json

import pytest

from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.openai_requests import ChatRequest, CompletionRequest, parse_untrusted

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}
BOTH = pytest.mark.parametrize(
    ("schema", "base"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)]
)


def parse(schema, body):
    return parse_untrusted(schema, json.dumps(body).encode())


def refused(schema, body):
    with pytest.raises(ApiError) as caught:
        parse(schema, body)
    assert caught.value.kind is Kind.INVALID
    return caught.value


WITH_EFFECT = {
    # OpenAI
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "moderation": {"model": "x"},
    # vLLM
    "guided_decoding_backend": "outlines",
    "use_beam_search": True,
    "length_penalty": 0.5,
    "early_stopping": True,
    "spaces_between_special_tokens": False,
    "chat_template": "{{ messages }}",
    "documents": [{"title": "x"}],
    "mm_processor_kwargs": {"a": 1},
    "logits_processors": ["x"],
    "priority": 1,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "request_id": "x",
    "kv_transfer_params": {"a": 1},
    # llama.cpp's server and its relatives
    "n_predict": 10,
    "n_keep": 5,
    "n_probs": 3,
    "typical_p": 0.5,
    "tfs_z": 0.9,
    "mirostat": 2,
    "mirostat_tau": 5.0,
    "dynatemp_range": 0.5,
    "xtc_probability": 0.5,
    "dry_multiplier": 0.8,
    "repeat_penalty": 1.1,
    "repeat_last_n": 64,
    "samplers": ["top_k"],
    "id_slot": 1,
    "lora": [{"id": 0, "scale": 1}],
    # anybody's
    "no_such_field": 0,
    "Temperature": 0.5,
    "__class__": "x",
    "model_config": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function"}]), ("tool_choice", "required"), ("include_reasoning", False)],
)
def test_a_text_has_no_tools_and_no_thoughts(field, value):
    assert refused(CompletionRequest, COMPLETION | {field: value}).param == field


@pytest.mark.parametrize("field", WITH_EFFECT)
@BOTH
def test_a_field_whose_effect_would_be_missed_is_refused_by_name(schema, base, field):
    error = refused(schema, base | {field: WITH_EFFECT[field]})
    assert (error.code, error.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize("field", WITH_EFFECT)
@BOTH
def test_null_is_as_if_not_given(schema, base, field):
    assert parse(schema, base | {field: None}).order() == parse(schema, base).order()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "u"), ("metadata", {"a": "b"}), ("safety_identifier", "x"),
        ("prompt_cache_key", "k"), ("cache_prompt", True),
        ("parallel_tool_calls", False), ("store", True), ("service_tier", "flex"),
        ("tools", []), ("functions", []), ("tool_choice", "none"),
        ("tool_choice", "auto"), ("response_format", {"type": "text"}), ("modalities", ["text"]),
        ("n", 1), ("best_of", 1), ("stop", []), ("logit_bias", {}), ("presence_penalty", 0),
        ("min_tokens", 0), ("use_beam_search", False), ("length_penalty", 1.0),
        ("priority", 0), ("bad_words", []), ("n_predict", -1), ("typical_p", 1.0),
        ("mirostat", 0), ("repeat_penalty", 1), ("grammar", ""), ("top_k", 0), ("min_p", 0.0),
        ("skip_special_tokens", True), ("include_stop_str_in_output", False),
        ("ignore_eos", False), ("echo", False), ("stop_token_ids", []),
        ("spaces_between_special_tokens", True), ("stream", False), ("suffix", ""),
    ],
    ids=str,
)  # fmt: skip
@BOTH
def test_what_changes_no_answer_is_accepted(schema, base, field, value):
    assert parse(schema, base | {field: value}).order() == parse(schema, base).order()


def test_no_logprobs_are_what_a_chat_has_anyway():
    assert (
        parse(ChatRequest, CHAT | {"logprobs": False}).order() == parse(ChatRequest, CHAT).order()
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", 0), ("length_penalty", True), ("mirostat", False), ("typical_p", "1")],
    ids=str,
)
def test_a_value_of_another_type_is_not_the_one_without_effect(field, value):
    assert refused(ChatRequest, CHAT | {field: value}).param == field


def test_options_of_a_stream_are_no_different():
    stream = CHAT | {"stream": True}
    harmless = {"include_usage": True, "include_obfuscation": False}
    assert parse(ChatRequest, stream | {"stream_options": harmless}).includes_usage
    error = refused(ChatRequest, stream | {"stream_options": {"continuous_usage_stats": True}})
    assert error.param == "stream_options.continuous_usage_stats"


def test_a_long_name_is_not_echoed_whole():
    assert len(refused(ChatRequest, CHAT | {"x" * 100_000: 1}).message) < 200


@BOTH
def test_implemented_fields_reach_the_order(schema, base):
    order = parse(
        schema,
        base | {"stop_token_ids": [3, 5], "include_stop_str_in_output": True,
                "skip_special_tokens": False, "truncate_prompt_tokens": 7, "ignore_eos": True,
                "add_special_tokens": False, "max_tokens": 9},
    ).order()  # fmt: skip
    assert order.stop_token_ids == {3, 5}
    assert (order.includes_stop, order.shows_special_tokens, order.ignores_eos) == (True,) * 3
    assert (order.truncates_to, order.adds_special_tokens, order.max_tokens) == (7, False, 9)


def test_a_chats_own_fields_reach_the_order():
    fields = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}}
    conversation = parse(ChatRequest, CHAT | fields).order().conversation
    assert conversation.continues_last
    assert conversation.variables == {"enable_thinking": False}
    assert (
        not parse(ChatRequest, CHAT | {"add_generation_prompt": False})
        .order()
        .conversation.adds_turn
    )
    error = refused(ChatRequest, CHAT | fields | {"add_generation_prompt": True})
    assert error.param == "continue_final_message"


@pytest.mark.parametrize(
    ("field", "value"),
    [("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("stop_token_ids", [-1]),
     ("stop_token_ids", "2"), ("stop_token_ids", [1] * 2000), ("skip_special_tokens", "no"),
     ("include_stop_str_in_output", 1)],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
@BOTH
def test_their_values_are_checked(schema, base, field, value):
    assert refused(schema, base | {field: value}).param.startswith(field)


@pytest.mark.parametrize("schema", [ChatRequest])
def test_variables_of_the_template_are_an_object(schema):
    assert refused(schema, CHAT | {"chat_template_kwargs": [1]}).param == "chat_template_kwargs"


def test_echo_of_a_chat_is_refused():
    assert refused(ChatRequest, CHAT | {"echo": True}).code == "unsupported_parameter"


@pytest.mark.parametrize(("schema", "base"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": True}, "max_tokens"),
    ],
)
def test_what_is_told_of_prompts_has_its_limits(schema, base, fields, param):
    if schema is CompletionRequest and "logprobs" in fields:
        fields = fields | {"logprobs": 1}
    assert refused(schema, base | fields).param == param
