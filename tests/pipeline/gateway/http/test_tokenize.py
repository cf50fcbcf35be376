"""Texts become the tokens that the model would read, and tokens the text they came of."""

import httpx
import pytest

from tests.pipeline.gateway.conftest import END, MODEL
from tests.pipeline.gateway.http.openai_calls import KEY

AUTH = {"authorization": f"Bearer {KEY}"}
TEXTS = ["Hi", "", "wörld 🙂 " * 5, f"a{END}b{END}", "x" * 5000]


async def ask(gateway, path, body=None):
    async with httpx.AsyncClient(headers=AUTH) as client:
        if body is None:
            return await client.get(f"{gateway.url}{path}")
        return await client.post(f"{gateway.url}{path}", json=body)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:8])
async def test_a_text_comes_back_from_its_tokens(start_gateway, text):
    async with start_gateway() as gateway:
        body = {"prompt": text, "add_special_tokens": False}
        told = (await ask(gateway, "/tokenize", body)).json()
        back = (await ask(gateway, "/detokenize", {"tokens": told["tokens"]})).json()
    assert back == {"prompt": text}
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 4096)
    assert told["token_strs"] is None


async def test_tokens_are_named_where_asked(start_gateway, tokenizer):
    async with start_gateway() as gateway:
        body = {"model": MODEL, "prompt": f"a {END}", "return_token_strs": True}
        told = (await ask(gateway, "/tokenize", body)).json()
    assert told["token_strs"] == ["a", "Ġ", END]
    assert told["tokens"] == list(tokenizer.encode(f"a {END}"))


async def test_a_conversation_is_what_a_chat_would_read(start_gateway, make_engine):
    engine = make_engine()
    messages = [{"role": "user", "content": "Hi"}]
    async with start_gateway(engine) as gateway:
        told = (await ask(gateway, "/tokenize", {"messages": messages})).json()
        chat = {"messages": messages, "max_tokens": 1}
        assert (await ask(gateway, "/v1/chat/completions", chat)).status_code == 200
        closed = {"messages": messages, "add_generation_prompt": False}
        less = (await ask(gateway, "/tokenize", closed)).json()
    (generation,) = engine.generations
    assert told["tokens"] == list(generation.prompt_ids)
    assert less["tokens"] == told["tokens"][: less["count"]]
    assert less["count"] < told["count"]


async def test_what_renders_conversations_is_told(start_gateway, template):
    async with start_gateway() as gateway:
        told = (await ask(gateway, "/tokenizer_info")).json()
    assert told["chat_template"] == template.source
    assert (told["eos_token"], told["bos_token"]) == (END, None)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ("/tokenize", {"prompt": "x" * 600_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "cat", "content": "b"}]}, "messages[0].role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [0, 257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_no_text_or_no_token_is_refused_by_name(start_gateway, path, body, param):
    async with start_gateway() as gateway:
        answer = await ask(gateway, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model_and_no_key_are_refused(start_gateway, path):
    body = {"model": "x", "prompt": "a", "tokens": [1]}
    body.pop("tokens" if path == "/tokenize" else "prompt")
    async with start_gateway() as gateway, httpx.AsyncClient() as client:
        assert (await ask(gateway, path, body)).status_code == 404
        assert (await client.post(f"{gateway.url}{path}", json=body)).status_code == 401
        assert (await client.get(f"{gateway.url}/tokenizer_info")).status_code == 401
