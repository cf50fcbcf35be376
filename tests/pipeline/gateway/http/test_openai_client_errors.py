"""What the released openai client makes of refusals and failures."""

import openai
import pytest
import trio

from pipeline.engine.engine import PipelineEngine
from pipeline.errors import RequestFailed, SessionError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.local_pipeline import LocalPipeline
from tests.pipeline.engine.engines import LIMITS, Yielding, new_cores
from tests.pipeline.gateway.http.openai_calls import MODEL, USER, fails, with_client


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5"),
        ({"allowed_token_ids": [3, 257]}, "no token 257"),
        ({"chooser": {"name": "mirostat"}, "temperature": 0}, "temperature above 0"),
        ({"chooser": {"name": "mirostat", "eta": 2}}, "at most 1"),
    ],
)
async def test_what_cannot_be_sampled_so_is_a_bad_request(start_gateway, body, words):
    async with start_gateway() as gateway:
        error = await fails(
            gateway,
            openai.BadRequestError,
            lambda c: c.chat.completions.create(model=MODEL, messages=USER, extra_body=body),
        )
    assert words in error.message
    assert gateway.engine.generations == []


async def test_a_request_that_leaves_itself_no_token_is_a_bad_request(
    start_gateway, tiny_model, nursery
):
    config = load_config(tiny_model)
    shards = [
        load_shard(tiny_model, config, *layers, expected_hashes=None) for layers in ((0, 2), (2, 4))
    ]
    engine = PipelineEngine(LIMITS)
    nursery.start_soon(engine.run, Yielding(LocalPipeline(new_cores(shards))))
    only_an_end = {"allowed_token_ids": [65], "stop_token_ids": [65], "min_tokens": 1}
    async with start_gateway(engine) as gateway:
        gateway.desk.open(config.vocab_size)
        error = await fails(
            gateway,
            openai.BadRequestError,
            lambda c: c.completions.create(model=MODEL, prompt="x", extra_body=only_an_end),
        )
        assert "leave no token" in error.message
        await with_client(
            gateway, lambda c: c.completions.create(model=MODEL, prompt="x", max_tokens=5)
        )


async def test_errors_are_the_clients_own_classes(start_gateway, make_engine):
    def chat(**kwargs):
        arguments = {"model": MODEL, "messages": USER} | kwargs
        return lambda c: c.chat.completions.create(**arguments)

    async with start_gateway(make_engine(max_seq_len=64)) as gateway:
        error = await fails(gateway, openai.NotFoundError, chat(model="gpt-x"))
        assert (error.code, error.type) == ("model_not_found", "invalid_request_error")
        error = await fails(gateway, openai.BadRequestError, chat(temperature=3))
        assert error.param == "temperature"
        error = await fails(
            gateway, openai.BadRequestError, chat(messages=[{"role": "user", "content": "x" * 99}])
        )
        assert (error.code, error.param) == ("context_length_exceeded", "messages")
        error = await fails(gateway, openai.BadRequestError, chat(max_tokens=65))
        assert error.param == "max_tokens"
        error = await fails(gateway, openai.BadRequestError, chat(logit_bias={"257": 1}))
        assert error.param == "logit_bias"
        error = await fails(
            gateway,
            openai.BadRequestError,
            lambda c: c.completions.create(model=MODEL, prompt=[1, 257]),
        )
        assert error.param == "prompt"
        error = await fails(gateway, openai.AuthenticationError, chat(), key="sk-wrong")
        assert error.code == "invalid_api_key"


async def test_too_many_requests_a_minute_are_told_when_to_return(start_gateway):
    async with start_gateway(requests_per_minute=2) as gateway:
        for _ in range(2):
            await with_client(gateway, lambda c: c.models.list())
        error = await fails(gateway, openai.RateLimitError, lambda c: c.models.list())
    assert error.code == "rate_limit_exceeded"
    assert 0 < int(error.response.headers["retry-after"]) <= 30


async def test_a_failed_pipeline_is_unavailable_and_says_nothing_of_itself(
    start_gateway, make_engine
):
    engine = make_engine(fail_at=3, error=SessionError("stage 1 at 10.1.2.3 is lost"))
    async with start_gateway(engine) as gateway:
        error = await fails(
            gateway,
            openai.InternalServerError,
            lambda c: c.chat.completions.create(model=MODEL, messages=USER),
        )
        assert error.status_code == 503
        assert error.code == "pipeline_unavailable"
        assert "10.1.2.3" not in str(error)


async def test_a_request_that_fails_alone_is_a_defect_not_an_outage(start_gateway, make_engine):
    engine = make_engine(fail_at=3, error=RequestFailed("choosing a token failed: KeyError"))
    async with start_gateway(engine) as gateway:
        error = await fails(
            gateway,
            openai.InternalServerError,
            lambda c: c.chat.completions.create(model=MODEL, messages=USER),
        )
        assert (error.status_code, error.type, error.code) == (500, "server_error", None)
        assert "retry-after" not in error.response.headers
        assert "KeyError" not in str(error)


async def test_a_pipeline_that_fails_mid_stream_is_an_error_not_an_end(start_gateway, make_engine):
    received = []

    def use(client):
        for chunk in client.chat.completions.create(model=MODEL, messages=USER, stream=True):
            received.append(chunk.choices[0].delta.content)

    engine = make_engine(fail_at=3, error=SessionError("stage 1 is lost"))
    async with start_gateway(engine) as gateway:
        error = await fails(gateway, openai.APIError, use)
    assert received == ["", "H", "e", "l"]
    assert error.code == "pipeline_unavailable"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_text_that_takes_too_long_ends_by_itself_and_says_so(
    start_gateway, make_engine, stream
):
    received = []

    def use(client):
        answer = client.chat.completions.create(model=MODEL, messages=USER, stream=stream)
        received.extend(chunk.choices[0].delta.content for chunk in answer)

    engine = make_engine(seconds=3600)  # between two of its tokens
    async with start_gateway(engine, request_seconds=0.2) as gateway:
        error = await fails(gateway, openai.APIError, use)
        while engine.num_active:  # noqa: ASYNC110 - it may not have begun, or be just leaving
            await trio.sleep(0.01)
        assert (error.code, error.type) == ("request_timeout", "server_error")
        assert "0.2 s" in str(error)
        assert received in ([], [""], ["", "H"])
        assert stream or error.status_code == 408
