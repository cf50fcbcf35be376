"""Texts that end at token ids, and prompts with ids the model does not have."""

import json

import pytest

PATHS = ["/v1/completions", "/v1/chat/completions"]


def body(path, **fields):
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"messages": messages} if "chat" in path else {"prompt": "Hi"}
    return json.dumps({"model": "tiny/model", **asked, **fields}).encode()


async def ask(gateway, connect, path, raw):
    async with connect(gateway) as client:
        await client.post(path, raw)
        status, _, answer = await client.read_response()
    return status, json.loads(answer)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({}, {256}),
        ({"stop_token_ids": None}, {256}),
        ({"stop_token_ids": [1, 2]}, {1, 2, 256}),
        ({"stop_token_ids": [1, 2], "ignore_eos": True}, {1, 2}),
        ({"ignore_eos": True}, set()),
    ],
)
async def test_stop_token_ids_end_a_text_beside_the_models_own(
    start_gateway, connect, make_engine, path, fields, ends
):
    engine = make_engine()
    async with start_gateway(engine) as gateway:
        status, _ = await ask(gateway, connect, path, body(path, max_tokens=2, **fields))
    assert status == 200
    assert engine.generations[0].eos_token_ids == ends


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ids", [[257], [1, 2**31 - 1], ["1"], [-1], [1.5], 3, list(range(2000))])
async def test_what_is_no_token_is_refused_by_name(start_gateway, connect, path, ids):
    async with start_gateway() as gateway:
        status, answer = await ask(gateway, connect, path, body(path, stop_token_ids=ids))
    assert status == 400
    assert answer["error"]["param"].startswith("stop_token_ids")


async def test_a_prompt_with_a_token_the_model_does_not_have_is_refused_before_the_engine(
    start_gateway, connect, make_engine, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "_num_rows", 256)  # of 257
    engine = make_engine()
    async with start_gateway(engine) as gateway:
        for path, fields in (
            ("/v1/completions", {"prompt": "a<|end|>"}),
            ("/v1/completions", {"prompt": ["a", "b<|end|>"]}),
            ("/v1/completions", {"prompt": [1, 256]}),
            ("/v1/completions", {"stop_token_ids": [256]}),
            ("/v1/completions", {"logit_bias": {"256": 1}}),
        ):
            status, answer = await ask(gateway, connect, path, body(path, **fields))
            assert status == 400
            assert "256" in answer["error"]["message"]
        assert engine.generations == []
        status, _ = await ask(gateway, connect, PATHS[0], body(PATHS[0], max_tokens=1))
        assert status == 200
