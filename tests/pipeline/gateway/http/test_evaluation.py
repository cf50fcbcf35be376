"""What clients are told of prompts is the model's own word, in OpenAI's shapes and vLLM's."""

import base64
import json
from contextlib import asynccontextmanager

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import torch
import transformers
import trio

from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.limits import Limits
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.stage.step_executor import StageCore
from tests.pipeline.engine.engines import Yielding
from tests.pipeline.gateway.http.openai_calls import KEY, MODEL, USER, fails, with_client

AUTH = {"authorization": f"Bearer {KEY}"}
LIMITS = Limits(num_slots=4, max_seq_len=512, chunk_tokens=32)
PROMPT = "Tell me of the sea, and of what lies beyond it: ships, birds, other shores."


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """The model's own, a token a byte."""
    return GatewayTokenizer(tiny_model / "tokenizer.json")


@pytest.fixture(scope="module")
def shard(tiny_model):
    return load_shard(tiny_model, load_config(tiny_model), 0, 4, expected_hashes=None)


@pytest.fixture(scope="module")
def oracle(tiny_model):
    """Log-probabilities of what follows each token, [tokens, vocab]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    def ask(token_ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([token_ids])).logits[0], -1).numpy()

    return ask


@pytest.fixture
def start_reading(start_gateway, shard):
    """A gateway before an engine that runs the tiny model."""

    @asynccontextmanager
    async def start():
        engine = PipelineEngine(LIMITS)
        core = StageCore(shard, LIMITS.for_session(make_codec("F32", 64)))
        async with trio.open_nursery() as tasks, start_gateway(engine) as gateway:
            tasks.start_soon(engine.run, Yielding(LocalPipeline([core])))
            yield gateway
            tasks.cancel_scope.cancel()

    return start


def complete(gateway, **fields):
    fields = {"model": MODEL, "temperature": 0, **fields}
    return with_client(gateway, lambda client: client.completions.create(**fields))


def assert_scored(logprobs, ids, expected, num_top):
    """The first `len(ids)` columns are of these tokens, which the model gives so much."""
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    for index in range(1, len(ids)):
        row = expected[index - 1]
        assert logprobs.token_logprobs[index] == pytest.approx(float(row[ids[index]]), abs=1e-4)
        likeliest = np.sort(row)[::-1][:num_top].tolist()
        assert list(logprobs.top_logprobs[index].values()) == pytest.approx(likeliest, abs=1e-4)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_an_echo_tells_each_tokens_logprob(
    start_reading, tokenizer, oracle, max_tokens, as_ids
):
    ids = tokenizer.encode(PROMPT)
    prompt = list(ids) if as_ids else PROMPT
    async with start_reading() as gateway:
        found = await complete(gateway, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
    (choice,) = found.choices
    logprobs = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert choice.finish_reason == "length"
    assert len(logprobs.tokens) == len(ids) + max_tokens
    assert_scored(logprobs, ids, oracle(ids), 2)
    assert logprobs.text_offset[: len(ids)] == list(range(len(PROMPT)))
    if max_tokens:
        assert logprobs.text_offset[len(ids)] == len(PROMPT)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), max_tokens)


async def test_an_echo_that_is_streamed_adds_up_to_the_whole(start_reading):
    asked = {"prompt": [PROMPT * 3, "Hi"], "max_tokens": 4, "echo": True, "logprobs": 1}
    async with start_reading() as gateway:
        whole = await complete(gateway, **asked)
        chunks = await with_client(
            gateway,
            lambda client: list(
                client.completions.create(model=MODEL, temperature=0, stream=True, **asked)
            ),
        )
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            added = [each for part in parts for each in getattr(part.logprobs, name)]
            assert added == getattr(choice.logprobs, name)


async def test_an_echo_alone_costs_no_token(start_reading):
    async with start_reading() as gateway:
        found = await complete(gateway, prompt=PROMPT, max_tokens=0, echo=True)
    assert (found.choices[0].text, found.choices[0].logprobs) == (PROMPT, None)
    assert found.usage.completion_tokens == 0


async def test_prompt_logprobs_are_told_by_id_and_rank(start_reading, tokenizer, oracle):
    prompts = [PROMPT, "A"]
    async with start_reading() as gateway:
        found = await complete(
            gateway, prompt=prompts, max_tokens=2, n=2, extra_body={"prompt_logprobs": 3}
        )
    assert [choice.logprobs for choice in found.choices] == [None] * 4
    for index, choice in enumerate(found.choices):
        ids = tokenizer.encode(prompts[index // 2])
        first, *rest = choice.model_extra["prompt_logprobs"]
        assert first is None
        assert len(rest) == len(ids) - 1
        expected = oracle(ids)
        for row, token_id, told in zip(expected, ids[1:], rest, strict=False):
            assert told[str(token_id)]["logprob"] == pytest.approx(row[token_id], abs=1e-4)
            name = tokenizer.token_bytes(token_id).decode(errors="replace")
            assert told[str(token_id)]["decoded_token"] == name
            ranked = {each["rank"]: each["logprob"] for each in told.values() if each["rank"]}
            likeliest = np.sort(row)[::-1][:3].tolist()
            assert [ranked[rank] for rank in (1, 2, 3)] == pytest.approx(likeliest, abs=1e-4)
            assert len(told) == 3 + (told[str(token_id)]["rank"] is None)


async def test_a_chats_prompt_logprobs_stand_beside_its_choices(start_reading, tokenizer):
    def use(client):
        return client.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=2, extra_body={"prompt_logprobs": 0}
        )

    async with start_reading() as gateway, httpx.AsyncClient(headers=AUTH) as client:
        found = await with_client(gateway, use)
        asked = await client.post(f"{gateway.url}/tokenize", json={"messages": USER})
    ids = asked.json()["tokens"]
    told = found.model_extra["prompt_logprobs"]
    assert len(told) == len(ids) == found.usage.prompt_tokens
    assert told[0] is None
    assert [list(each) for each in told[1:]] == [[str(token_id)] for token_id in ids[1:]]


async def test_company_changes_nothing_of_an_echo(start_reading):
    asked = {"max_tokens": 0, "echo": True, "logprobs": 1}
    async with start_reading() as gateway:
        alone = await complete(gateway, prompt=PROMPT, **asked)
        among = await complete(gateway, prompt=["Ho " * 40, PROMPT, "so it goes"], **asked)
    found, expected = among.choices[1].logprobs, alone.choices[0].logprobs
    assert found.tokens == expected.tokens
    assert found.token_logprobs[1:] == pytest.approx(expected.token_logprobs[1:], abs=1e-5)


async def test_embeddings_are_of_length_one_and_each_texts_own(start_reading):
    texts = [PROMPT, "Hi", PROMPT]

    async with start_reading() as gateway:

        def use(client):
            return client.embeddings.create(model=MODEL, input=texts), client.embeddings.create(
                model=MODEL, input=texts, encoding_format="float", dimensions=16
            )

        # The client asks for base64 where it is not told what to ask for.
        found, short = await with_client(gateway, use)
    vectors = np.array([each.embedding for each in found.data])
    assert vectors.shape == (3, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-6)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 0.99
    cut = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose([each.embedding for each in short.data], cut, atol=1e-6)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, texts))
    assert [each.index for each in found.data] == [0, 1, 2]


async def test_embeddings_come_of_text_and_ids_in_both_encodings(start_reading, tokenizer):
    ids = list(tokenizer.encode(PROMPT))
    inputs = [PROMPT, [PROMPT], ids, [ids]]
    async with start_reading() as gateway, httpx.AsyncClient(headers=AUTH) as client:

        async def ask(**body):
            answer = await client.post(f"{gateway.url}/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"][0]["embedding"]

        floats = [await ask(input=each) for each in inputs]
        coded = base64.b64decode(await ask(input=PROMPT, encoding_format="base64"))
        last = await ask(input=PROMPT, pooling="last")
    for each in floats[1:]:
        np.testing.assert_allclose(each, floats[0], atol=1e-5)
    np.testing.assert_allclose(np.frombuffer(coded, "<f4"), floats[0], atol=1e-5)
    assert np.abs(np.array(last) - floats[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 65}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["Hi", ""]}, "input"),
        ({"input": [256]}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"normalize": False}, "normalize"),
    ],
    ids=str,
)
async def test_what_is_no_request_for_embeddings_is_refused_by_name(start_reading, fields, param):
    async with start_reading() as gateway, httpx.AsyncClient(headers=AUTH) as client:
        body = {"input": "Hi", **fields}
        answer = await client.post(f"{gateway.url}/v1/embeddings", content=json.dumps(body))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_prompts_that_cannot_be_read_are_refused(start_reading):
    async with start_reading() as gateway:
        error = await fails(
            gateway,
            openai.BadRequestError,
            lambda client: client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=0, extra_body={"min_tokens": 1},
                echo=True, logprobs=1,
            ),
        )  # fmt: skip
    assert "min_tokens" in error.message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 2}),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 1, "prompt_logprobs": 2}),
        ("/v1/embeddings", {"input": PROMPT}),
        ("/v1/embeddings", {"input": PROMPT, "encoding_format": "base64"}),
    ],
    ids=str,
)
async def test_answers_are_what_the_document_says(start_reading, path, body):
    async with start_reading() as gateway, httpx.AsyncClient(headers=AUTH) as client:
        document = (await client.get(f"{gateway.url}/openapi.json")).json()
        answer = await client.post(f"{gateway.url}{path}", json=body)
    told = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
    schema = {**told["schema"], "components": document["components"]}
    jsonschema.validate(answer.json(), schema)
