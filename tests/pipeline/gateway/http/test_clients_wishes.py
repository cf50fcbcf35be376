"""Small things that clients of other servers are used to."""

from importlib.metadata import version

import httpx
import openai
import pytest

from tests.pipeline.gateway.http.openai_calls import KEY, MODEL, fails, with_client
from tests.pipeline.gateway.random_engine import RandomEngine

AUTH = {"authorization": f"Bearer {KEY}"}
ORIGIN = "https://page.example"


async def test_the_one_model_need_not_be_named(start_gateway):
    async with start_gateway() as gateway, httpx.AsyncClient(headers=AUTH) as client:
        body = {"prompt": "Hi", "max_tokens": 2}
        answer = await client.post(f"{gateway.url}/v1/completions", json=body)
        other = await client.post(f"{gateway.url}/v1/completions", json={**body, "model": "x"})
    assert (answer.status_code, answer.json()["model"]) == (200, MODEL)
    assert other.status_code == 404


async def test_the_version_is_told(start_gateway):
    async with start_gateway() as gateway, httpx.AsyncClient(headers=AUTH) as client:
        answer = await client.get(f"{gateway.url}/version")
    assert answer.json() == {"version": version("veilpipe")}


@pytest.mark.parametrize(("origins", "allowed"), [((), None), ((ORIGIN,), ORIGIN), (("*",), "*")])
async def test_pages_of_named_origins_may_ask_and_no_others(start_gateway, origins, allowed):
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with start_gateway(cors=origins) as gateway, httpx.AsyncClient() as client:
        url = f"{gateway.url}/v1/completions"
        preflight = await client.options(url, headers=asked)
        body = {"prompt": "Hi", "max_tokens": 2}
        answer = await client.post(url, json=body, headers={**AUTH, "origin": ORIGIN})
        refused = await client.post(url, json=body, headers={"origin": ORIGIN})
        other = await client.options(url, headers={**asked, "origin": "https://other.example"})
    name = "access-control-allow-origin"
    assert (preflight.status_code == 200) is (allowed is not None)
    assert preflight.headers.get(name) == allowed
    assert answer.status_code == 200
    assert answer.headers.get(name) == allowed
    assert refused.status_code == 401  # its reason can be read, too
    assert refused.headers.get(name) == allowed
    assert other.headers.get(name) == ("*" if allowed == "*" else None)


async def test_bad_words_never_come(start_gateway, tokenizer):
    engine = RandomEngine(tokenizer, "abc")
    asked = {"bad_words": ["b", "ac"], "max_tokens": 300, "temperature": 0.2}

    def use(client):
        return client.completions.create(model=MODEL, prompt="Hi", extra_body=asked)

    async with start_gateway(engine) as gateway:
        text = (await with_client(gateway, use)).choices[0].text
    assert text.count("a") > 20
    assert text.count("c") > 20
    assert "b" not in text
    assert "ac" not in text


@pytest.mark.parametrize("words", [[""], [3], "b", ["b"] * 300])
async def test_what_is_no_list_of_words_is_refused(start_gateway, words):
    def use(client):
        return client.completions.create(model=MODEL, prompt="Hi", extra_body={"bad_words": words})

    async with start_gateway() as gateway:
        error = await fails(gateway, openai.BadRequestError, use)
    assert error.param.startswith("bad_words")


async def test_the_models_own_advice_is_followed_where_a_client_is_silent(
    start_gateway, make_engine
):
    engine = make_engine()
    advice = {"temperature": 0.25}
    async with start_gateway(engine, defaults=advice) as gateway:
        for fields in ({}, {"temperature": 0.5}):
            await with_client(
                gateway,
                lambda c, fields=fields: c.completions.create(model=MODEL, prompt="Hi", **fields),
            )
    assert [each.sampling.temperature for each in engine.generations] == [0.25, 0.5]
