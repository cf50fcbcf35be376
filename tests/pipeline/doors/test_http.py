"""The older handler's event, over HTTP."""

import json
import math
import ssl
from base64 import b64decode, b64encode

import httpx
import pytest
import trio

from pipeline.doors.faults import HTTP_STATUSES
from pipeline.doors.messages import AttestRequest, DoorError, DoorFault
from pipeline.gateway.http.tls import load_tls


def text(data):
    return b64encode(data).decode()


EVENT = {
    "cloaked_embedding": text(b"sealed"),
    "encrypted_session_key": text(b"key"),
    "nonce": text(b"nonce"),
    "shape": [1, 2],
    "dtype": "float32",
    "session_id": "s",
}


@pytest.fixture
async def client():
    async with httpx.AsyncClient(timeout=300) as client:
        yield client


async def post(client, served, path, content):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return await client.post(
        f"http://127.0.0.1:{served.http}{path}",
        content=content,
        headers={"content-type": "application/json"},
    )


async def test_an_event_is_answered_as_the_older_handler_did(serve_door, client):
    async with serve_door() as served:
        answer = await post(client, served, "/runsync", {"input": EVENT})
        assert answer.status_code == 200
        assert answer.json().keys() == {"id", "status", "output"}
        assert answer.json()["status"] == "COMPLETED"
        assert answer.json()["output"] == {
            "output": text(b"sealed"), "nonce": text(b"answer nonce"), "shape": [1, 2],
            "dtype": "float32", "tokens_processed": 7,
        }  # fmt: skip
        (request,) = served.door.requests
        assert (request.max_new_tokens, request.temperature) == (0, 0.0)


async def test_a_job_is_looked_up_until_it_is_done(serve_door, client):
    async with serve_door() as served:
        gate = trio.Event()
        served.door.before = gate.wait
        job = (await post(client, served, "/run", {"input": EVENT})).json()
        url = f"http://127.0.0.1:{served.http}/status/{job['id']}"
        assert job["status"] == "IN_QUEUE"
        with trio.fail_after(120):
            while not served.door.requests:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert (await client.get(url)).json()["status"] == "IN_PROGRESS"
        gate.set()
        view = await until_done(client, url)
        assert view["status"] == "COMPLETED"
        assert view["output"]["output"] == text(b"sealed")
        assert (await client.post(url)).json() == view


async def test_a_job_that_is_refused_says_why(serve_door, client):
    async with serve_door() as served:
        served.door.fault = DoorError(DoorFault.CONFLICT, "step 1 was run")
        job = (await post(client, served, "/run", {"input": EVENT})).json()
        view = await until_done(client, f"http://127.0.0.1:{served.http}/status/{job['id']}")
        assert view["status"] == "FAILED"
        assert view["error"] == {"fault": "conflict", "message": "step 1 was run"}


async def test_jobs_that_nobody_fetches_are_bounded(serve_door, client):
    async with serve_door() as served:
        served.door.before = trio.sleep_forever
        answers = [await post(client, served, "/run", {"input": EVENT}) for _ in range(33)]
        assert [answer.status_code for answer in answers] == [200] * 32 + [429]
        assert answers[-1].headers["retry-after"] == "1"


async def test_evidence_has_a_route_and_can_be_asked_for_in_a_job(serve_door, client, shown_key):
    async with serve_door() as served:
        asked = {"nonce": text(b"n" * 32)}
        direct = await post(client, served, "/attest", asked)
        by_job = await post(client, served, "/runsync", {"input": {"attest": asked}})
        assert direct.json() == by_job.json()["output"]
        assert b64decode(direct.json()["evidence"]) == shown_key.evidence
        assert served.door.requests == [AttestRequest(b"n" * 32)] * 2


@pytest.mark.parametrize("fault", DoorFault)
async def test_each_fault_has_its_status_and_names_itself(serve_door, client, fault, shown_key):
    async with serve_door() as served:
        served.door.fault = DoorError(fault, "why", shown_key)
        answer = await post(client, served, "/runsync", {"input": EVENT})
        assert answer.status_code == HTTP_STATUSES[fault]
        error = answer.json()["error"]
        assert (error["fault"], error["message"]) == (fault.value, "why")
        assert b64decode(error["key"]["public_key"]) == shown_key.public_key


WRONG_BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"input": "\xff"}',
    "deep": b"[" * 200_000,
    "deep input": b'{"input": ' + b'{"a":' * 100_000,
    "a list": [],
    "no input": {},
    "more than input": {"input": EVENT, "webhook": "http://x"},
    "input of another type": {"input": [EVENT]},
    "no input at all": {"input": None},
    "missing field": {"input": {k: v for k, v in EVENT.items() if k != "nonce"}},
    "extra field": {"input": EVENT | {"extra": 1}},
    "attest and more": {"input": EVENT | {"attest": {"nonce": ""}}},
    "attest of another type": {"input": {"attest": 7}},
    "base64 with spaces": {"input": EVENT | {"nonce": "AA A="}},
    "base64 cut off": {"input": EVENT | {"nonce": "AAA"}},
    "base64 that is not ASCII": {"input": EVENT | {"nonce": "é"}},
    "bytes as a list": {"input": EVENT | {"nonce": [1, 2]}},
    "shape of text": {"input": EVENT | {"shape": "12"}},
    "shape of floats": {"input": EVENT | {"shape": [1.0]}},
    "shape of bools": {"input": EVENT | {"shape": [True]}},
    "huge shape": {"input": EVENT | {"shape": [1 << 63]}},
    "long shape": {"input": EVENT | {"shape": [1] * 17}},
    "huge number": b'{"input": ' + b"9" * 5000 + b"}",
    "null": {"input": EVENT | {"dtype": None}},
    "long name": {"input": EVENT | {"session_id": "s" * 5000}},
    "NaN": {"input": EVENT | {"temperature": math.nan}},
    "infinity": b'{"input": {"temperature": 1e999}}',
    "infinite": {"input": EVENT | {"temperature": math.inf}},
    "tokens beyond 32 bits": {"input": EVENT | {"max_new_tokens": 1 << 40}},
    "lone surrogate": b'{"input": {"dtype": "\\ud800"}}',
}


@pytest.mark.parametrize("name", WRONG_BODIES)
@pytest.mark.parametrize("path", ["/runsync", "/run"])
async def test_a_bad_body_is_refused_in_one_line(serve_door, client, caplog, path, name):
    async with serve_door() as served:
        answer = await post(client, served, path, WRONG_BODIES[name])
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["fault"] == "invalid"
        assert "\n" not in error["message"]
        assert len(error["message"]) < 300
        assert not served.door.requests
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("method", "path", "content_type", "status"),
    [
        ("GET", "/", "application/json", 404),
        ("POST", "/runsync/", "application/json", 404),
        ("GET", "/runsync", "application/json", 405),
        ("DELETE", "/run", "application/json", 405),
        ("POST", "/runsync", "text/plain", 415),
        ("POST", "/attest", "application/x-www-form-urlencoded", 415),
        ("GET", "/status/0123", "", 404),
        ("GET", "/status/%2e%2e%2frun", "", 404),
    ],
)
async def test_what_is_no_route_says_so(serve_door, client, method, path, content_type, status):
    async with serve_door() as served:
        answer = await client.request(
            method,
            f"http://127.0.0.1:{served.http}{path}",
            content=b"{}",
            headers={"content-type": content_type},
        )
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_beyond_its_limit_is_refused(serve_door, client, is_declared):
    async def chunks():
        for _ in range(3 << 6):
            yield bytes(1 << 16)

    async with serve_door() as served:
        answer = await client.post(
            f"http://127.0.0.1:{served.http}/run",
            content=bytes(12 << 20) if is_declared else chunks(),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["fault"] == "too_large"


async def test_a_client_that_leaves_stops_the_work(serve_door, client):
    async with serve_door() as served:
        served.door.before = trio.sleep_forever
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post, client, served, "/runsync", {"input": EVENT})
            while not served.door.requests:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        with trio.fail_after(120):
            while not served.door.num_cancelled:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_events_are_answered_over_tls(serve_door, certificate):
    async with serve_door(tls_http=load_tls(*certificate)) as served:
        context = ssl.create_default_context(cafile=str(certificate[0]))
        async with httpx.AsyncClient(verify=context) as client:
            answer = await client.post(
                f"https://127.0.0.1:{served.http}/runsync", json={"input": EVENT}
            )
            assert answer.status_code == 200


async def until_done(client, url):
    with trio.fail_after(120):
        while (view := (await client.get(url)).json())["status"] == "IN_PROGRESS":  # noqa: ASYNC110
            await trio.sleep(0.01)
    return view
