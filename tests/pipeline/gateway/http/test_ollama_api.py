"""Ollama's API."""

import json

import jsonschema
import pytest

from pipeline.errors import SessionError
from pipeline.gateway.templates import ChatTemplate
from tests.pipeline.gateway.http.dialect_calls import (
    CALL,
    LIKELY,
    MODEL,
    PARAMETERS,
    TEMPLATE,
    THOUGHT,
    client_of,
    lines_of,
)
from tests.pipeline.gateway.random_engine import RandomEngine

TOOL = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def chat():
    template = ChatTemplate.compile(TEMPLATE, {})
    yield template
    template.close()


@pytest.fixture
def ask(start_gateway, make_engine, chat):
    """Posts these requests to a gateway before this engine; their answers."""

    async def ask(engine, *requests):
        async with (
            start_gateway(engine or make_engine(), chat=chat) as gateway,
            client_of(gateway) as client,
        ):
            return [
                await client.post(f"/api/{path}", json={"model": MODEL, **fields})
                for path, fields in requests
            ]

    return ask


async def test_lines_amount_to_the_whole(ask, make_engine):
    engine = make_engine(text=f"{THOUGHT}Let me see.\n{CALL}")
    asked = {"messages": USER, "tools": [TOOL]}
    stream, whole = await ask(engine, ("chat", asked), ("chat", {**asked, "stream": False}))
    assert stream.headers["content-type"] == "application/x-ndjson"
    lines, whole = lines_of(stream), whole.json()
    messages = [line["message"] for line in lines]
    for name, text in (("content", "Let me see."), ("thinking", "Hm, well.")):
        assert "".join(each.get(name, "") for each in messages) == text
        assert whole["message"][name] == text
    calls = [call for each in messages for call in each.get("tool_calls", ())]
    assert calls == [{"function": {"name": "look", "arguments": {"word": "Ulm"}}}]
    assert whole["message"]["tool_calls"] == calls
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    for last in (lines[-1], whole):
        assert last["done_reason"] == "stop"
        assert last["eval_count"] == len(engine.text) + 1
        assert last["prompt_eval_count"] > 0
        assert last["total_duration"] == last["prompt_eval_duration"] + last["eval_duration"]


async def test_a_prompt_is_a_message_or_as_it_is(ask, make_engine, tokenizer):
    engine = make_engine(text=f"{THOUGHT}Yes.")
    plain, raw, quiet = await ask(
        engine,
        ("generate", {"prompt": "Hi", "system": "Be brief.", "stream": False}),
        ("generate", {"prompt": "Hi", "raw": True, "options": {"num_predict": 9}}),
        ("chat", {"messages": USER, "think": False, "stream": False}),
    )
    assert (plain.json()["response"], plain.json()["thinking"]) == ("Yes.", "Hm, well.")
    assert "".join(line["response"] for line in lines_of(raw)) == engine.text[:9]
    assert lines_of(raw)[-1]["done_reason"] == "length"
    assert quiet.json()["message"] == {"role": "assistant", "content": "Yes."}
    prompts = [tokenizer.decode(each.prompt_ids) for each in engine.generations]
    assert prompts == [
        "<|system|>Be brief.<|user|>Hi<|assistant|>",
        "Hi",
        "<|user|>Hi<|assistant|>False",
    ]


async def test_options_say_how_tokens_are_chosen(ask, make_engine):
    engine = make_engine()
    options = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.5, "seed": 3, "repeat_penalty": 1.5,
        "num_predict": -1, "stop": ["x"], "num_ctx": 8192, "mirostat": 0,
    }  # fmt: skip
    (answer,) = await ask(
        engine, ("chat", {"messages": USER, "options": options, "keep_alive": "5m"})
    )
    assert answer.status_code == 200, answer.text
    sampling = engine.generations[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.5)
    assert (sampling.seed, sampling.repetition_penalty, sampling.stop) == (3, 1.5, ("x",))


async def test_a_model_is_asked_for_nothing_but_to_be_there(ask, make_engine):
    engine = make_engine()
    for answer in await ask(engine, ("chat", {"messages": []}), ("generate", {})):
        assert (answer.json()["done"], answer.json()["done_reason"]) == (True, "load")
    assert engine.generations == []


async def test_an_answer_keeps_to_its_format(ask, tokenizer):
    (answer,) = await ask(
        RandomEngine(tokenizer, LIKELY),
        ("chat", {"messages": USER, "format": PARAMETERS, "stream": False}),
    )
    jsonschema.validate(json.loads(answer.json()["message"]["content"]), PARAMETERS)


async def test_earlier_calls_and_results_are_shown(ask, make_engine, tokenizer):
    engine = make_engine()
    messages = [
        *USER,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [
            {"function": {"name": "look", "arguments": {"word": "Ulm"}}}
        ]},
        {"role": "tool", "tool_name": "look", "content": "old"},
    ]  # fmt: skip
    await ask(engine, ("chat", {"messages": messages}))
    assert tokenizer.decode(engine.generations[0].prompt_ids) == (
        "<|user|>Hi<|assistant|>Hm.[('word', 'Ulm')]<|tool|>old<|assistant|>"
    )


async def test_the_one_model_is_told_of(start_gateway, chat):
    async with start_gateway(chat=chat) as gateway, client_of(gateway) as client:
        tags = (await client.get("/api/tags")).json()["models"]
        shown = (await client.post("/api/show", json={"model": f"{MODEL}:latest"})).json()
        version = (await client.get("/api/version")).json()
    assert [tag["model"] for tag in tags] == [MODEL]
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shown["template"] == chat.source
    assert set(version) == {"version"}


REFUSED = [
    ("chat", {"model": "other", "messages": USER}, 404, "other"),
    ("show", {"model": "other"}, 404, "other"),
    ("chat", {"messages": [{"role": "user", "content": "Hi", "images": ["x"]}]}, 400,
     "messages[0].images"),
    ("chat", {"messages": [{"role": "nobody", "content": "Hi"}]}, 400, "messages[0].role"),
    ("chat", {"messages": USER, "options": {"mirostat": 2}}, 400, "options.mirostat"),
    ("chat", {"messages": USER, "options": {"top_k": "x"}}, 400, "options.top_k"),
    ("chat", {"messages": USER, "options": {"seed": 1.5}}, 400, "options.seed"),
    ("chat", {"messages": USER, "options": {"seed": 10**400}}, 400, "seed"),
    ("chat", {"messages": USER, "format": "xml"}, 400, "format"),
    ("generate", {"prompt": "Hi", "suffix": "x"}, 400, "suffix"),
]  # fmt: skip


async def test_errors_are_one_text(ask, make_engine):
    engine = make_engine()
    answers = await ask(engine, *((path, fields) for path, fields, _, _ in REFUSED))
    for answer, (_, fields, status, name) in zip(answers, REFUSED, strict=True):
        assert answer.status_code == status, fields
        assert list(answer.json()) == ["error"]
        assert name in answer.json()["error"]
    assert engine.generations == []


async def test_a_stream_that_fails_ends_with_its_error(ask, make_engine):
    engine = make_engine(fail_at=3, error=SessionError("a secret of the inside"))
    (answer,) = await ask(engine, ("chat", {"messages": USER}))
    assert list(lines_of(answer)[-1]) == ["error"]
    assert "secret" not in answer.text
