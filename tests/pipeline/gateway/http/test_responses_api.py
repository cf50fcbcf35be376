"""OpenAI's responses."""

import json

import pydantic
import pytest

from pipeline.errors import SessionError
from pipeline.gateway.templates import ChatTemplate
from tests.pipeline.gateway.http.dialect_calls import (
    AUTH,
    CALL,
    LIKELY,
    MODEL,
    PARAMETERS,
    TEMPLATE,
    THOUGHT,
    client_of,
    events_of,
)
from tests.pipeline.gateway.http.openai_calls import with_client
from tests.pipeline.gateway.random_engine import RandomEngine

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "look", "parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def chat():
    template = ChatTemplate.compile(TEMPLATE, {})
    yield template
    template.close()


@pytest.fixture
def start(start_gateway, make_engine, chat):
    return lambda engine=None, **options: start_gateway(
        engine or make_engine(), chat=options.pop("chat", chat), **options
    )


def shown(engine, tokenizer):
    return [tokenizer.decode(each.prompt_ids) for each in engine.generations]


async def test_a_stream_tells_of_every_item_in_order_and_ends_with_the_whole(start, make_engine):
    engine = make_engine(text=f"{THOUGHT}Let me see.\n{CALL}\n{CALL}")
    asked = {"model": MODEL, "input": "Hi", "tools": [TOOL], "stream": True}
    async with start(engine) as gateway, client_of(gateway) as client:
        answer = await client.post(PATH, json=asked)
    events = events_of(answer)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind not in kinds[-1:]:
            kinds.append(kind)
    part, done = "content_part.added", ["content_part.done", "output_item.done"]
    added, call = "output_item.added", "function_call_arguments"
    assert kinds == [
        "created", "in_progress",
        added, part, "reasoning_text.delta", "reasoning_text.done", *done,
        added, part, "output_text.delta", "output_text.done", *done,
        *[added, f"{call}.delta", f"{call}.done", done[1]] * 2,
        "completed",
    ]  # fmt: skip
    whole = events[-1]["response"]
    items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert whole["output"] == items
    assert [item["type"] for item in items] == [
        "reasoning", "message", "function_call", "function_call"
    ]  # fmt: skip
    assert {item["status"] for item in items} == {"completed"}
    assert len({item["id"] for item in items}) == 4
    for item in items:
        of_item = [e for e in events if e.get("item_id") == item["id"]]
        said = "".join(e["delta"] for e in of_item if e["type"].endswith(".delta"))
        text = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert said == text
        assert {e["output_index"] for e in of_item} == {items.index(item)}
    assert items[0]["content"][0]["text"] == "Hm, well."
    assert items[1]["content"][0]["text"] == "Let me see."
    assert json.loads(items[2]["arguments"]) == {"word": "Ulm"}
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 9 <= usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


async def test_the_released_client_understands_streams_and_wholes(start, tokenizer):
    class Answer(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

        word: str = pydantic.Field(max_length=6)
        number: bool

    def use(client):
        parsed = client.responses.parse(model=MODEL, input="Hi", text_format=Answer)
        with client.responses.stream(
            model=MODEL, input="Hi", tools=[TOOL], tool_choice="required"
        ) as stream:
            kinds = {event.type for event in stream}
            return parsed, kinds, stream.get_final_response()

    async with start(RandomEngine(tokenizer, LIKELY)) as gateway:
        parsed, kinds, final = await with_client(gateway, use)
    assert isinstance(parsed.output_parsed, Answer)
    assert "response.function_call_arguments.delta" in kinds
    assert final.status == "completed"
    for call in final.output:
        assert call.name == "look"
        assert len(json.loads(call.arguments)["word"]) <= 6


async def test_a_conversation_goes_on_from_what_was_stored_for_the_same_key_alone(
    start, make_engine, tokenizer
):
    engine = make_engine(text="Yes.")
    other = {"authorization": "Bearer other"}
    async with (
        start(engine, keys=(AUTH["authorization"][7:], "other")) as gateway,
        client_of(gateway) as client,
    ):
        first = await client.post(PATH, json={"input": "One?", "instructions": "Be brief."})
        its_id = first.json()["id"]
        going_on = {"input": "Two?", "previous_response_id": its_id}
        second = await client.post(PATH, json=going_on)
        refused = await client.post(PATH, json=going_on, headers=other)
        seen = await client.get(f"{PATH}/{its_id}")
        unseen = await client.get(f"{PATH}/{its_id}", headers=other)
        kept = await client.delete(f"{PATH}/{its_id}", headers=other)
        deleted = await client.delete(f"{PATH}/{its_id}")
        gone = await client.post(PATH, json=going_on)
        third = {"input": "Three?", "previous_response_id": second.json()["id"]}
        last = await client.post(PATH, json=third)
        secret = await client.post(PATH, json={"input": "Four?", "store": False})
        unstored = await client.get(f"{PATH}/{secret.json()['id']}")
    assert first.json() == seen.json()
    assert deleted.json() == {"id": its_id, "object": "response", "deleted": True}
    statuses = [each.status_code for each in (refused, unseen, kept, gone, unstored)]
    assert statuses == [400, 404, 404, 400, 404]
    label = {"route": f"{PATH}/{{id}}", "status": "404"}
    assert gateway.metric("veilpipe_http_requests_total", **label) == 3
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    assert unseen.json()["error"]["code"] == "not_found"
    assert last.status_code == 200
    assert shown(engine, tokenizer) == [
        "<|system|>Be brief.<|user|>One?<|assistant|>",
        "<|user|>One?<|assistant|>Yes.<|user|>Two?<|assistant|>",
        "<|user|>One?<|assistant|>Yes.<|user|>Two?<|assistant|>Yes.<|user|>Three?<|assistant|>",
        "<|user|>Four?<|assistant|>",
    ]


async def test_items_come_back_as_they_were_given_or_by_reference(start, make_engine, tokenizer):
    engine = make_engine(text=f"{THOUGHT}{CALL}")
    async with start(engine) as gateway, client_of(gateway) as client:
        first = (await client.post(PATH, json={"input": "One?", "tools": [TOOL]})).json()
        output = first["output"]
        user = {"role": "user", "content": [{"type": "input_text", "text": "One?"}]}
        result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "old"}
        references = [{"type": "item_reference", "id": item["id"]} for item in output]
        for items in (output, references):
            answer = await client.post(PATH, json={"input": [user, *items, result]})
            assert answer.status_code == 200, answer.text
        unknown = {"input": [{"type": "item_reference", "id": f"{output[0]['id']}0"}]}
        assert (await client.post(PATH, json=unknown)).status_code == 404
    _, whole, referred = shown(engine, tokenizer)
    assert whole == referred
    assert whole == "<|user|>One?<|assistant|>Hm, well.[('word', 'Ulm')]<|tool|>old<|assistant|>"


async def test_an_answer_that_is_cut_is_incomplete_and_says_why(start, make_engine):
    engine = make_engine(text="word ", repeats=True)
    asked = {"input": "Hi", "max_output_tokens": 7, "include": ["message.output_text.logprobs"]}
    async with start(engine) as gateway, client_of(gateway) as client:
        whole = (await client.post(PATH, json={**asked, "top_logprobs": 2})).json()
        streamed = events_of(await client.post(PATH, json={**asked, "stream": True}))[-1]
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    (message,) = whole["output"]
    assert message["status"] == "incomplete"
    (part,) = message["content"]
    assert part["text"] == "word wo"
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
    assert {len(each["top_logprobs"]) for each in part["logprobs"]} == {2}
    assert streamed["type"] == "response.incomplete"


async def test_a_stream_that_fails_ends_with_a_response_that_failed(start, make_engine):
    engine = make_engine(fail_at=3, error=SessionError("a secret of the inside"))
    async with start(engine) as gateway, client_of(gateway) as client:
        answer = await client.post(PATH, json={"input": "Hi", "stream": True})
        whole = await client.post(PATH, json={"input": "Hi"})
    last = events_of(answer)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "secret" not in answer.text
    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "pipeline_unavailable"


async def test_effort_is_the_templates_where_it_reads_any(start, make_engine, tokenizer):
    engine = make_engine()
    async with start(engine) as gateway, client_of(gateway) as client:
        for effort in ("none", "high", None):
            asked = {"input": "Hi", "reasoning": {"effort": effort}}
            assert (await client.post(PATH, json=asked)).status_code == 200
    ends = [text.partition("<|assistant|>")[2] for text in shown(engine, tokenizer)]
    assert ends == ["False", "True", ""]


REFUSED = [
    ({"input": [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}]},
     "input[0].content[0].type"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{"type": ["message"]}]}, "input[0].type"),
    ({"input": []}, "input"),
    ({"input": "Hi" * 4096}, "input"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": 3}}}, "text.format.schema"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"temperature": 99}, None),
    ({"reasoning": {"effort": ["high"]}}, "reasoning.effort"),
]  # fmt: skip


async def test_what_cannot_be_had_is_refused_by_name(start, make_engine):
    engine = make_engine()
    async with start(engine) as gateway, client_of(gateway) as client:
        for fields, param in REFUSED:
            answer = await client.post(PATH, json={"input": "Hi", **fields})
            assert answer.status_code == 400, fields
            assert answer.json()["error"]["param"] == param
    assert engine.generations == []


async def test_what_changes_no_answer_is_taken(start):
    asked = {
        "input": "Hi", "metadata": {"a": "b"}, "user": "u", "store": True, "service_tier": "auto",
        "parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s",
        "truncation": "auto", "include": ["reasoning.encrypted_content"], "max_tool_calls": 3,
        "reasoning": {"summary": "auto"}, "text": {"verbosity": "medium"}, "background": False,
        "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    async with start() as gateway, client_of(gateway) as client:
        answer = await client.post(PATH, json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["metadata"] == {"a": "b"}
