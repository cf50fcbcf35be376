"""A session in a request's body is the API key's own, and goes on in one way."""

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

import openai
import pytest
import trio

from pipeline.errors import InputError, SessionInUse
from tests.pipeline.gateway.http.openai_calls import MODEL, USER, fails, with_client


@dataclass(frozen=True)
class Kept:
    """A session that one request at a time can have."""

    owner: str
    name: str
    in_use: ClassVar[set] = set()

    @asynccontextmanager
    async def held(self):
        if self in self.in_use:
            raise SessionInUse("it is in use")
        self.in_use.add(self)
        try:
            yield
        finally:
            self.in_use.remove(self)


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
    async with start_gateway(engine, keys=keys, sessions=Kept) as gateway:
        for key in keys:
            for kind in ("chat", "completions"):
                await with_client(gateway, ask(kind, **named("../../a")), key)
        await with_client(gateway, ask(), keys[0])
    *pairs, none = [each.stored for each in engine.generations]
    assert [each.name for each in pairs] == ["../../a"] * 4
    assert pairs[0] == pairs[1] != pairs[2] == pairs[3]
    assert not any("sk-" in owner for owner in (each.owner for each in pairs))
    assert none is None


async def test_a_server_without_sessions_says_so(start_gateway):
    async with start_gateway() as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(**named("a")))
    assert error.param == "session"
    assert "--secret-file" in error.message


@pytest.mark.parametrize("name", ["", "a" * 257])
async def test_a_name_that_is_none_is_refused(start_gateway, name):
    async with start_gateway(sessions=Kept) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(**named(name)))
    assert error.param == "session"


async def test_a_session_takes_one_continuation(start_gateway):
    async with start_gateway(sessions=Kept) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(n=2, **named("a")))
    assert error.param == "session"


async def test_a_session_that_cannot_be_read_is_one_clear_error(start_gateway):
    def broken(owner, name):
        raise InputError("a.session is damaged, or of another secret; forget it")

    async with start_gateway(sessions=broken) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask(**named("a")))
    assert "is damaged" in error.message


@pytest.mark.parametrize("streams", [False, True])
async def test_a_session_that_another_request_has_is_a_conflict_until_it_ends(
    start_gateway, make_engine, streams
):
    engine = make_engine(repeats=True, seconds=0.01)
    async with start_gateway(engine, sessions=Kept) as gateway, trio.open_nursery() as nursery:
        nursery.start_soon(with_client, gateway, ask(max_tokens=1000, **named("a")))
        while not engine.num_active:  # noqa: ASYNC110
            await trio.sleep(0.01)
        error = await fails(
            gateway, openai.ConflictError, ask(max_tokens=2, stream=streams, **named("a"))
        )
        assert (error.code, error.param) == ("session_in_use", "session")
        assert engine.num_active == 1
        await with_client(gateway, ask(max_tokens=2, **named("b")))
        engine.seconds = 0.0  # the client is waited for, whose text is long
        nursery.cancel_scope.cancel()
    assert not Kept.in_use
