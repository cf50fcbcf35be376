"""The application without a server: whatever is asked, it answers."""

import json

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from pipeline.gateway.http.app import build_app
from pipeline.gateway.openai_requests import ChatRequest, CompletionRequest

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
        {"model": st.just("tiny/model")},
        optional={"messages": MESSAGES, "prompt": st.text(max_size=9) | JSON},
    ),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)

# One for each endpoint, which refuses the other's field by name; of random bodies few are in order.
PLAIN_CHAT = {"model": "tiny/model", "messages": [{"role": "user", "content": "Hi"}]}
PLAIN_TEXT = {"model": "tiny/model", "prompt": "Hi"}


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
def test_no_body_is_a_defect(make_desk, make_engine, path):
    seen = set()

    @settings(max_examples=80)
    @example(json.dumps(PLAIN_CHAT).encode())
    @example(json.dumps(PLAIN_TEXT).encode())
    @given(st.one_of(BODIES.map(lambda body: json.dumps(body).encode()), st.binary(max_size=40)))
    def attempt(body):
        engine = make_engine(text="ab", max_seq_len=64)
        app = build_app(make_desk(engine, keys=(), max_choices=8), CollectorRegistry())
        status, answer = trio.run(call, app, path, body)
        seen.add(status)
        assert status in {200, 400, 404}
        if status != 200:
            error = json.loads(answer)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
        assert engine.num_active == 0

    attempt()
    assert seen >= {200, 400}
