"""A session in a request's body is the API key's own, and goes on in one way."""

import openai
import pytest

from pipeline.errors import InputError
from tests.pipeline.gateway.http.openai_calls import MODEL, USER, fails, with_client


def ask(kind="completions", **body):
    def use(client):
        if kind == "chat":
            return client.chat.completions.create(model=MODEL, messages=USER, **body)
        return client.completions.create(model=MODEL, prompt="Hi", **body)

    return use


def named(name):
    return {"extra_body": {"session": name}}


async def test_a_session_is_known_by_its_key_and_its_name(start_gateway, make_engine):
    engine, keys = make_engine(), ("sk-one", "sk-two")
    async with start_gateway(engine, keys=keys, sessions=lambda *pair: pair) as gateway:
        for key in keys:
            for kind in ("chat", "completions"):
                await with_client(gateway, ask(kind, **named("../../a")), key)
        await with_client(gateway, ask(), keys[0])
    *pairs, none = [each.stored for each in engine.generations]
    assert [name for _, name in pairs] == ["../../a"] * 4
    assert pairs[0] == pairs[1] != pairs[2] == pairs[3]
    assert not any("sk-" in owner for owner, _ in pairs)
    assert none is None


async def test_a_server_without_sessions_says_so(start_gateway):
    async with start_gateway() as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(**named("a")))
    assert error.param == "session"
    assert "--secret-file" in error.message


@pytest.mark.parametrize("name", ["", "a" * 257])
async def test_a_name_that_is_none_is_refused(start_gateway, name):
    async with start_gateway(sessions=lambda *pair: pair) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(**named(name)))
    assert error.param == "session"


async def test_a_session_takes_one_continuation(start_gateway):
    async with start_gateway(sessions=lambda *pair: pair) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(n=2, **named("a")))
    assert error.param == "session"


async def test_a_session_that_cannot_be_read_is_one_clear_error(start_gateway):
    def broken(owner, name):
        raise InputError("a.session is damaged, or of another secret; forget it")

    async with start_gateway(sessions=broken) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(**named("a")))
    assert "is damaged" in error.message
