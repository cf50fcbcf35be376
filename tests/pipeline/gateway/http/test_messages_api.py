"""Anthropic's messages."""

import json

import jsonschema
import pytest

from pipeline.errors import SessionError
from pipeline.gateway.templates import ChatTemplate
from tests.pipeline.gateway.http.dialect_calls import (
    CALL,
    KEY,
    LIKELY,
    MODEL,
    PARAMETERS,
    TEMPLATE,
    THOUGHT,
    client_of,
    events_of,
)
from tests.pipeline.gateway.random_engine import RandomEngine

PATH = "/v1/messages"
HEADERS = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
TOOL = {"name": "look", "description": "Looks.", "input_schema": PARAMETERS}
USER = [{"role": "user", "content": "Hi"}]
ASKED = {"model": MODEL, "max_tokens": 200, "messages": USER}


@pytest.fixture(scope="module")
def chat():
    template = ChatTemplate.compile(TEMPLATE, {})
    yield template
    template.close()


@pytest.fixture
def ask(start_gateway, make_engine, chat):
    """Posts requests to a gateway before this engine; their answers."""

    async def ask(engine, *requests, path=PATH, headers=HEADERS):
        async with (
            start_gateway(engine or make_engine(), chat=chat) as gateway,
            client_of(gateway, headers) as client,
        ):
            return [await client.post(path, json={**ASKED, **each}) for each in requests]

    return ask


def told(events):
    """The content that a stream amounts to."""
    blocks = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "input": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            delta = dict(event["delta"])
            kind = delta.pop("type")
            ((name, text),) = delta.items()
            blocks[-1]["input" if kind == "input_json_delta" else name] += text
    for block in blocks:
        given = block.pop("input")
        if block["type"] == "tool_use":
            block["input"] = json.loads(given)
    return blocks


async def test_a_stream_amounts_to_the_whole_thoughts_text_and_calls(ask, make_engine):
    engine = make_engine(text=f"{THOUGHT}Let me see.\n{CALL}\n{CALL}", cached=(5, 5))
    asked = {"tools": [TOOL], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    whole, stream = await ask(engine, asked, {**asked, "stream": True})
    events, whole = events_of(stream), whole.json()
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    starts = [at for at, kind in enumerate(kinds) if kind == "content_block_start"]
    ends = [at for at, kind in enumerate(kinds) if kind == "content_block_stop"]
    assert [end + 1 for end in ends] == [*starts[1:], len(kinds) - 2]
    blocks = told(events)
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    ids = {block.pop("id") for block in [*blocks, *whole["content"]] if "id" in block}
    assert len(ids) == 4
    assert all(block.pop("signature") for block in (blocks[0], whole["content"][0]))
    assert blocks == whole["content"]
    assert blocks[0]["thinking"] == "Hm, well."
    assert blocks[2] == {"type": "tool_use", "name": "look", "input": {"word": "Ulm"}}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert whole["stop_reason"] == "tool_use"
    usage = events[-2]["usage"]
    assert usage == whole["usage"]
    assert usage["cache_read_input_tokens"] == 5
    # The first token, which says how much was there, may have come before the message began.
    begun = events[0]["message"]["usage"]
    assert usage["input_tokens"] + 5 == begun["input_tokens"] + begun["cache_read_input_tokens"]


async def test_thoughts_are_shown_where_they_are_asked_for(ask, make_engine, tokenizer):
    engine = make_engine(text=f"{THOUGHT}Yes.")
    plain, stream = await ask(engine, {}, {"stream": True})
    assert plain.json()["content"] == [{"type": "text", "text": "Yes."}]
    assert told(events_of(stream)) == plain.json()["content"]
    assert tokenizer.decode(engine.generations[0].prompt_ids).endswith("<|assistant|>False")


async def test_a_conversation_is_shown_to_the_template_as_it_was(ask, make_engine, tokenizer):
    engine = make_engine()
    used = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"word": "Ulm"}}
    texts = [{"type": "text", "text": "old"}]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": texts}
    cache = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "One?", **cache}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "text", "text": "So."}, used,
        ]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "It is"},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief.", **cache}]
    (answer,) = await ask(engine, {"messages": messages, "system": system})
    assert answer.status_code == 200, answer.text
    assert tokenizer.decode(engine.generations[0].prompt_ids) == (
        "<|system|>Be brief.<|user|>One?<|assistant|>Hm.So.[('word', 'Ulm')]"
        "<|tool|>old<|user|>And?<|assistant|>It is"
    )


async def test_why_an_answer_ended_is_told(ask, make_engine):
    stopped, cut, whole, empty = await ask(
        make_engine(text="one two three"),
        {"stop_sequences": ["xyz", " th"]},
        {"max_tokens": 5},
        {},
        {"stop_sequences": ["one"]},
    )
    told = [
        (
            each.json()["stop_reason"],
            each.json()["stop_sequence"],
            each.json()["content"][0]["text"],
        )
        for each in (stopped, cut, whole, empty)
    ]
    assert told == [
        ("stop_sequence", " th", "one two"),
        ("max_tokens", None, "one t"),
        ("end_turn", None, "one two three"),
        ("stop_sequence", "one", ""),
    ]


async def test_calls_and_answers_keep_to_their_schemas_where_they_must(ask, tokenizer):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    format_ = {"type": "json_schema", "schema": schema}
    named = {"type": "tool", "name": "look", "disable_parallel_tool_use": True}
    asked = [
        {"output_config": {"format": format_}},
        {"output_format": format_},
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"tools": [TOOL], "tool_choice": named, "stream": True},
    ]
    # Noise may take many tokens until it ends; sixteen calls of a few words fit in any case.
    formed, older, any_, one = await ask(
        RandomEngine(tokenizer, LIKELY), *({**each, "max_tokens": 3500} for each in asked)
    )
    for answer in (formed, older):
        jsonschema.validate(json.loads(answer.json()["content"][0]["text"]), schema)
    calls = [*any_.json()["content"], *told(events_of(one))]
    for call in calls:
        assert (call["type"], call["name"]) == ("tool_use", "look")
    jsonschema.validate(calls[-1]["input"], PARAMETERS)


async def test_counted_tokens_are_those_that_an_answer_takes(ask, make_engine):
    engine, request = make_engine(), {"system": "Be brief.", "tools": [TOOL]}
    (answer,) = await ask(engine, request)
    (counted,) = await ask(engine, request, path=f"{PATH}/count_tokens")
    assert counted.json() == {"input_tokens": answer.json()["usage"]["input_tokens"]}
    assert len(engine.generations) == 1


async def test_a_key_may_come_as_anthropics_clients_send_it_and_errors_are_theirs(ask, make_engine):
    async def failure(status, headers=HEADERS, **request):
        (answer,) = await ask(make_engine(), request, headers=headers)
        assert answer.status_code == status, answer.text
        error = answer.json()
        assert error["type"] == "error"
        return error["error"]["type"]

    assert await failure(401, {"x-api-key": "wrong"}) == "authentication_error"
    assert await failure(401, {"host": "localhost"}) == "authentication_error"
    assert await failure(404, model="other") == "not_found_error"
    for version in ("1", "2023-01-01", "2026-1-1"):
        headers = {**HEADERS, "anthropic-version": version}
        assert await failure(400, headers) == "invalid_request_error"
    assert await failure(400, max_tokens=0) == "invalid_request_error"
    later = {"authorization": f"Bearer {KEY}", "anthropic-version": "2026-10-21"}
    (answer,) = await ask(make_engine(), {}, headers=later)
    assert answer.status_code == 200


async def test_a_stream_that_fails_ends_with_an_error(ask, make_engine):
    engine = make_engine(fail_at=3, error=SessionError("a secret of the inside"))
    stream, whole = await ask(engine, {"stream": True}, {})
    last = events_of(stream)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
    assert "secret" not in stream.text
    assert (whole.status_code, whole.json()["error"]) == (503, last["error"])


REFUSED = [
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [{**TOOL, "type": ["custom"]}]}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ({"output_config": {"effort": {}}}, "output_config.effort"),
    ({"top_k": 10**400}, "top_k"),
]  # fmt: skip


async def test_what_cannot_be_had_is_refused_by_name(ask, make_engine):
    engine = make_engine()
    answers = await ask(engine, *(fields for fields, _ in REFUSED))
    for answer, (fields, name) in zip(answers, REFUSED, strict=True):
        assert answer.status_code == 400, fields
        assert name in answer.json()["error"]["message"]
    assert engine.generations == []


async def test_what_changes_no_answer_is_taken(ask):
    (answer,) = await ask(
        None,
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "thinking": {"type": "disabled"},
         "context_management": {"edits": []}, "mcp_servers": [], "cache_control": {"type": "x"}},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
