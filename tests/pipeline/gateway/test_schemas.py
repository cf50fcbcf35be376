import json

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from pipeline.gateway.app import build_app
from pipeline.gateway.errors import ApiError
from pipeline.gateway.limits import GatewayLimits
from pipeline.gateway.schemas import ChatRequest, CompletionRequest, parse_untrusted
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.templates import PLAIN, ChatTemplate

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}


def refusal(schema, body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse_untrusted(schema, raw)
    assert caught.value.status == 400
    return caught.value


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


@pytest.mark.parametrize("raw", [b"[]", b"3", b'"text"', b"null"])
def test_json_that_is_no_object_is_refused(raw):
    assert refusal(ChatRequest, raw).code == "invalid_type"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(missing):
    error = refusal(ChatRequest, {key: value for key, value in CHAT.items() if key != missing})
    assert (error.code, error.param) == ("missing_required_parameter", missing)


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
        ("tools", [{"type": "function"}], "tools"),
        ("functions", [{"name": "f"}], "functions"),
        ("response_format", {"type": "json_object"}, "response_format"),
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


def test_nulls_and_unknown_fields_are_as_if_absent():
    names = (
        "temperature", "top_p", "n", "seed", "stop", "max_tokens", "logit_bias", "stream",
        "stream_options", "presence_penalty", "frequency_penalty", "logprobs", "tools",
        "min_tokens", "allowed_token_ids", "chooser",
    )  # fmt: skip
    body = CHAT | dict.fromkeys(names) | {"user": 3, "metadata": {"a": [1]}, "no_such": "field"}
    assert parse_untrusted(ChatRequest, json.dumps(body).encode()) == parse_untrusted(
        ChatRequest, json.dumps(CHAT).encode()
    )


def test_parts_of_a_message_are_joined_and_developers_speak_as_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = CHAT | {"messages": [{"role": "developer", "content": parts}]}
    (message,) = parse_untrusted(ChatRequest, json.dumps(body).encode()).messages
    assert message.for_template() == {"role": "system", "content": "a\nb"}


def test_each_choice_of_a_seeded_request_has_its_own_seed():
    body = parse_untrusted(ChatRequest, json.dumps(CHAT | {"seed": 4, "n": 3}).encode())
    assert [body.sampling(i, None).seed for i in range(3)] == [4, 5, 6]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = sorted(ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys())
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
        optional={"content": JSON, "name": JSON, "tool_calls": JSON, "tool_call_id": JSON},
    ),
    max_size=3,
)
BODIES = st.builds(
    lambda base, odd: base | odd,
    st.fixed_dictionaries(
        {"model": st.just("m")},
        optional={"messages": MESSAGES, "prompt": st.text(max_size=9) | JSON},
    ),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)


async def call(app, path, body):
    """One request, straight into the application."""
    sent = []
    gone = trio.Event()
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        for message in requests:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(b"host", b"localhost")], "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_body_is_a_defect(tokenizer, make_engine, path):
    config = GatewayConfig(
        served_model_name="m",
        chat_template=ChatTemplate.compile(PLAIN, {}),
        limits=GatewayLimits(max_choices=8),
    )
    seen = set()

    @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.one_of(BODIES.map(lambda body: json.dumps(body).encode()), st.binary(max_size=40)))
    def attempt(body):
        engine = make_engine(text="ab", max_seq_len=64)
        app = build_app(config, engine, tokenizer, CollectorRegistry())
        status, answer = trio.run(call, app, path, body)
        seen.add(status)
        assert status in {200, 400, 404}
        if status != 200:
            error = json.loads(answer)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
        assert engine.num_active == 0

    attempt()
    assert seen >= {200, 400}
