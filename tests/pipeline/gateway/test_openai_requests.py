import json
import time

import pytest

from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.openai_requests import ChatRequest, CompletionRequest, parse_untrusted

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}


def refusal(schema, body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse_untrusted(schema, raw)
    assert caught.value.kind is Kind.INVALID
    return caught.value


def order(schema, body):
    return parse_untrusted(schema, json.dumps(body).encode()).order()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 10_000,
        b'{"model": "m"} trailing',
        b'{"temperature": 1' + b"0" * 10_000 + b"}",
        b"\x00",
    ],
    ids=range(10),
)
@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
def test_what_is_no_json_is_refused_as_such(schema, raw):
    error = refusal(schema, raw)
    assert (error.code, error.param) == ("invalid_json", None)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","prompt":[' + b"1," * (1 << 21) + b"1]}",
        b'{"model":"m","messages":[' + b"3," * (1 << 20) + b"3]}",
        b'{"model":"m","messages":' + b"[" * (1 << 22),
        b'{"model":"m","x":[' + b"{}," * (1 << 20) + b"{}]}",
    ],
    ids=range(4),
)
@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
def test_millions_of_values_are_refused_before_they_are_read(schema, body):
    before = time.process_time()
    assert refusal(schema, body).code == "request_too_complex"
    assert time.process_time() - before < 0.1


def test_the_first_of_many_errors_is_told_soon():
    body = CHAT | {"messages": [3] * 200_000}
    before = time.process_time()
    assert refusal(ChatRequest, body).param == "messages[0]"
    assert time.process_time() - before < 1


@pytest.mark.parametrize("raw", [b"[]", b"3", b'"text"', b"null"])
def test_json_that_is_no_object_is_refused(raw):
    assert refusal(ChatRequest, raw).code == "invalid_type"


def test_a_missing_field_is_named():
    error = refusal(ChatRequest, {"model": "m"})
    assert (error.code, error.param) == ("missing_required_parameter", "messages")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("temperature", "1"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_p", 1.1),
        ("top_k", 1.5),
        ("top_k", -2),
        ("min_p", -1),
        ("n", 0),
        ("n", 10**6),
        ("n", "2"),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("max_tokens", False),
        ("max_tokens", [1]),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "x"),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", "1"),
        ("stop", 3),
        ("stop", [1]),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", "x" * 2000),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "1"}),
        ("logit_bias", {"1": None}),
        ("logit_bias", {"9" * 5000: 1}),
        ("min_tokens", -1),
        ("min_tokens", "2"),
        ("chooser", {}),
        ("chooser", {"name": 3}),
        ("chooser", {"name": "dice"}),
        ("chooser", {"name": "mirostat", "tau": 10**400}),
        ("chooser", {"name": "mirostat", "tau": [1]}),
        ("chooser", {"name": "draw", "name ": 1}),
        ("stream", "yes"),
        ("stream_options", 3),
        ("stream_options", {"include_usage": True}),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize(("schema", "base"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_a_wrong_value_is_refused_by_name(schema, base, field, value):
    assert refusal(schema, base | {field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", "Hi", "messages"),
        ("messages", [3], "messages[0]"),
        ("messages", [{"content": "x"}], "messages[0].role"),
        ("messages", [{"role": "boss", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": 3}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": ["x"]}], "messages[0].content"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("logprobs", 3, "logprobs"),
        ("top_logprobs", 3, "top_logprobs"),
        ("functions", [{"name": "f"}], "functions"),
        ("modalities", ["audio"], "modalities"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_chat_field_that_cannot_be_served_is_refused_by_name(field, value, param):
    assert refusal(ChatRequest, CHAT | {field: value}).param == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", 3),
        ("prompt", [""] * 129),
        ("prompt", [1, "x"]),
        ("prompt", [[1], [-1]]),
        ("prompt", [1, True]),
        ("prompt", [2**40]),
        ("prompt", {"a": 1}),
        ("logprobs", 21),
        ("logprobs", True),
        ("suffix", "end"),
        ("best_of", 2),
        ("echo", "yes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_completion_field_that_cannot_be_served_is_refused_by_name(field, value):
    assert refusal(CompletionRequest, COMPLETION | {field: value}).param == field


@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("value", [[], [1.5], [-1], ["1"], 3])
def test_allowed_tokens_are_a_list_of_ids(schema, value):
    base = CHAT if schema is ChatRequest else COMPLETION
    assert refusal(schema, base | {"allowed_token_ids": value}).param.startswith("allowed_token")


def test_nulls_and_what_changes_no_answer_are_as_if_absent():
    names = (
        "temperature", "top_p", "n", "seed", "stop", "max_tokens", "logit_bias", "stream",
        "stream_options", "presence_penalty", "frequency_penalty", "logprobs", "tools",
        "min_tokens", "allowed_token_ids", "chooser",
    )  # fmt: skip
    body = CHAT | dict.fromkeys(names) | {"user": 3, "metadata": {"a": [1]}, "no_such": None}
    assert order(ChatRequest, body) == order(ChatRequest, CHAT)


def test_parts_of_a_message_are_joined_and_developers_speak_as_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = CHAT | {"messages": [{"role": "developer", "content": parts}]}
    (message,) = parse_untrusted(ChatRequest, json.dumps(body).encode()).messages
    assert message.for_template() == {"role": "system", "content": "a\nb"}


CALL = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"city": "Ulm"}'}}


def shown(**message):
    (seen,) = order(ChatRequest, CHAT | {"messages": [message]}).conversation.messages
    return seen


def called(arguments):
    call = CALL | {"function": {"name": "w", "arguments": arguments}}
    return shown(role="assistant", tool_calls=[call])["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Ulm", "days": [1, {"a": null}]}', {"city": "Ulm", "days": [1, {"a": None}]}),
        ({"city": "Ulm"}, {"city": "Ulm"}),
        ("", {}),
        # What is no JSON object is a mistake of the model's: the conversation as it was.
        ('{"city": ', '{"city": '),
        ("3", "3"),
        ('"text"', '"text"'),
        ("[" * 100_000, "[" * 100_000),
        (None, None),
    ],
    ids=range(8),
)
def test_what_a_tool_was_called_with_reaches_templates_as_values(arguments, expected):
    assert called(arguments) == expected


@pytest.mark.parametrize("call", [{}, {"function": None}, {"function": "w"}, {"function": {}}])
def test_a_call_of_another_shape_stays_as_it_is(call):
    assert shown(role="assistant", tool_calls=[call])["tool_calls"] == [call]


def test_the_rest_of_a_call_is_kept():
    (seen,) = shown(role="assistant", tool_calls=[CALL])["tool_calls"]
    assert seen == CALL | {"function": {"name": "w", "arguments": {"city": "Ulm"}}}


def test_a_message_as_the_client_was_given_it_is_accepted():
    given = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [],
             "audio": None, "function_call": None, "tool_calls": None}  # fmt: skip
    assert shown(**given) == {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("function_call", {"name": "f", "arguments": ""}), ("refusal", "No."), ("audio", {"id": "a"}),
     ("prefix", True), ("partial", True)],
)  # fmt: skip
def test_a_message_field_whose_effect_would_be_missed_is_refused_by_name(field, value):
    error = refusal(ChatRequest, CHAT | {"messages": [*CHAT["messages"], {"role": "assistant",
                                                      "content": "x", field: value}]})  # fmt: skip
    assert (error.code, error.param) == ("unsupported_parameter", f"messages[1].{field}")


def test_each_choice_of_a_seeded_request_has_its_own_seed():
    body = parse_untrusted(ChatRequest, json.dumps(CHAT | {"seed": 4, "n": 3}).encode())
    assert [body.sampling(i, None).seed for i in range(3)] == [4, 5, 6]
