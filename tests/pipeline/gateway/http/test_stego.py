"""Messages in texts over HTTP."""

import base64
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
from prometheus_client import CollectorRegistry

from pipeline.gateway.http.app import build_app
from pipeline.gateway.http.stego import stego_routes
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.fingerprint import Settings
from pipeline.stego.keys import Secret
from pipeline.stego.service import Found, Hidden
from pipeline.stego.statistics import Statistics, StepRecord
from tests.pipeline.gateway.conftest import KEY, FakeEngine

SECRET = base64.b64encode(bytes(range(32))).decode()
TOOK = Statistics([StepRecord(3.0, 2.5, 0.0)] * 16, 5, 328, 0.5, 1)


class FakeService:
    """Hides a message by writing it down."""

    is_row_exact = True

    def __init__(self):
        self.tasks = []
        self.error = None
        self.waits = None

    async def hide(self, message, task, *, compresses):
        await self._take(task)
        return Hidden("text of " + message.hex(), TOOK)

    async def find(self, text, task):
        await self._take(task)
        return Found(bytes.fromhex(text.removeprefix("text of ")), TOOK)

    async def _take(self, task):
        self.tasks.append(task)
        if self.error is not None:
            raise self.error
        if self.waits is not None:
            await self.waits.wait()


@pytest.fixture
def service():
    return FakeService()


@pytest.fixture
def app(make_desk, tokenizer, service):
    def make(**limits):
        desk = make_desk(FakeEngine(tokenizer), **limits)
        routes = stego_routes(desk, lambda: service)
        return build_app(desk, CollectorRegistry(), more=routes)

    return make


@asynccontextmanager
async def client(app):
    transport = httpx.ASGITransport(app)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers=headers
    ) as client:
        yield client


async def post(app, what, **body):
    async with client(app) as http:
        return await http.post(f"/v1/stego/{what}", json={"prompt": "Hi", "secret": SECRET} | body)


async def test_a_text_is_written_as_it_was_asked_for(app, service, tokenizer):
    answer = await post(app(), "encode", message="hello", top_k=0, temperature=0.8)
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "stego.text", "text": "text of " + b"hello".hex(), "model": "tiny/model",
        "usage": {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18},
        "statistics": {"bits": 328, "entropy_bits": 48.0, "retries": 1, "seconds": 0.5},
    }  # fmt: skip
    (task,) = service.tasks
    assert task.prompt_ids == tokenizer.encode("Hi")
    assert task.secret == Secret(bytes(range(32)))
    assert task.settings == Settings(top_k=0, temperature=0.8)


@pytest.mark.parametrize("message", [b"hello", b"\xff\x00"])
async def test_a_message_is_read_as_bytes_and_as_text_where_it_is(app, message):
    answer = (await post(app(), "decode", text="text of " + message.hex())).json()
    assert base64.b64decode(answer["message_base64"]) == message
    assert answer["message"] == ("hello" if message == b"hello" else None)


async def test_bytes_and_passphrases_are_taken(app, service):
    body = {"message_base64": "/wA=", "secret": None, "passphrase": "correct horse"}
    answer = await post(app(), "encode", **body)
    assert answer.json()["text"] == "text of ff00"
    assert service.tasks[0].secret == Secret(passphrase=b"correct horse")


async def test_a_prompt_can_be_a_message_by_the_chat_template(app, service, tokenizer, template):
    await post(app(), "encode", message="m", chat=True)
    rendered = template.render([{"role": "user", "content": "Hi"}])
    assert service.tasks[0].prompt_ids == tokenizer.encode_rendered(rendered)


@pytest.mark.parametrize(("body", "what"), [
    ({}, "message"),
    ({"message": "a", "message_base64": "YQ=="}, "either"),
    ({"message_base64": "a"}, "base64"),
    ({"message": "a", "secret": "?"}, "base64"),
    ({"message": "a", "secret": "YQ=="}, "32 bytes"),
    ({"message": "a", "secret": None}, "no secret"),
    ({"message": "a", "passphrase": ""}, "passphrase"),
    ({"message": "a", "passphrase": "p" * 2000}, "passphrase"),
    ({"message": "a", "prompt": ""}, "empty"),
    ({"message": "a", "prompt": 5}, "prompt"),
    ({"message": "a", "chooser": {"name": "mirostat"}}, "chooser"),
    ({"message": "a", "stop": ["x"]}, "stop"),
    ({"message": "a", "codec": "a" * 300}, "codec"),
    ({"message": "a", "codec": "fimec:block_bits=13"}, "block_bits"),
    ({"message": "a", "temperature": "hot"}, "temperature"),
    ({"message": "a", "max_tokens": 0}, "max_tokens"),
])  # fmt: skip
async def test_what_makes_no_sense_is_refused_by_name(app, service, body, what):
    answer = await post(app(), "encode", **body)
    assert answer.status_code == 400
    assert what in answer.json()["error"]["message"]
    assert not service.tasks


async def test_another_model_is_not_there(app):
    assert (await post(app(), "encode", message="a", model="other")).status_code == 404


@pytest.mark.parametrize("error", [StegoError("it carries 5 of 9 bits"), Unreadable()])
async def test_errors_are_error_objects(app, service, error):
    service.error = error
    for what, body in (("encode", {"message": "a"}), ("decode", {"text": "text of 61"})):
        answer = await post(app(), what, **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == str(error)


async def test_a_text_longer_than_the_context_is_not_even_split(app, service):
    answer = await post(app(), "decode", text="text of 61" * 100_000)
    assert answer.status_code == 400
    assert not service.tasks


async def test_kernels_without_exact_rows_are_refused(app, service):
    service.is_row_exact = False
    answer = await post(app(), "encode", message="a")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "kernels_not_exact"


async def test_keys_rates_and_room_hold_here_as_well(app, service):
    without = httpx.AsyncClient(transport=httpx.ASGITransport(app()), base_url="http://localhost")
    async with without as http:
        answer = await http.post("/v1/stego/encode", json={})
    assert answer.status_code == 401
    limited = app(requests_per_minute=1)
    assert (await post(limited, "encode", message="a")).status_code == 200
    assert (await post(limited, "encode", message="a")).status_code == 429
    service.waits = trio.Event()
    full = app(max_open_choices=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: post(full, "encode", message="a"))
        await trio.testing.wait_all_tasks_blocked()
        answer = await post(full, "encode", message="a")
        service.waits.set()
    assert answer.status_code == 503


async def test_no_get(app):
    async with client(app()) as http:
        assert (await http.get("/v1/stego/encode")).status_code == 405


async def test_a_client_that_hangs_up_ends_its_request(start_gateway, connect, service):
    # As the server wires it: what waits is cancelled when the connection closes.
    service.waits = trio.Event()
    begun, ended = trio.Event(), trio.Event()
    real = service._take

    async def take(task):
        begun.set()
        try:
            await real(task)
        finally:
            ended.set()

    service._take = take
    async with start_gateway(stego=lambda: service) as gateway:
        async with connect(gateway) as raw:
            body = b'{"prompt":"Hi","message":"a","secret":"%s"}' % SECRET.encode()
            await raw.post("/v1/stego/encode", body)
            await begun.wait()
        with trio.fail_after(60):
            await ended.wait()
