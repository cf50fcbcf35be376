"""Clients of doors, against the doors themselves and against what only looks like one."""

import json

import pytest
import trio

from pipeline.doors.dial import connect, load_bearer_key
from pipeline.doors.listening import listen
from pipeline.doors.messages import AttestRequest, DoorError, DoorFault, InferRequest
from pipeline.errors import InputError, PipelineError, PolicyError, SessionError
from pipeline.gateway.http.tls import load_tls

REQUEST = InferRequest(b"sealed", b"key", b"nonce", (1, -2), "float32", "s", 1, 0.5)
KINDS = ["grpc", "http"]


def url_of(served, kind):
    return f"{kind}://127.0.0.1:{getattr(served, kind)}"


def fields(message):
    return {
        name: bytes(value) if isinstance(value, (bytes, memoryview)) else value
        for name in message.__slots__
        if (value := getattr(message, name)) is not None and name != "shape"
    }


async def test_both_doors_give_the_same_bytes_for_the_same_request(serve_door):
    async with serve_door() as served:
        answers = []
        for kind in KINDS:
            async with connect(url_of(served, kind), is_dev=True) as door:
                answers.append(await door.infer(REQUEST))
        by_grpc, by_http = answers
        asked_by_grpc, asked_by_http = served.door.requests
        assert fields(asked_by_grpc) == fields(asked_by_http) == fields(REQUEST)
        assert tuple(asked_by_grpc.shape) == tuple(asked_by_http.shape) == (1, -2)
        assert fields(by_grpc) | {"nonce": b"answer nonce"} == fields(by_http)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refusal_arrives_with_its_fault_and_key(serve_door, shown_key, kind):
    async with serve_door() as served, connect(url_of(served, kind), is_dev=True) as door:
        assert await door.attest(AttestRequest(b"n" * 32)) == shown_key
        for fault in DoorFault:
            served.door.fault = DoorError(fault, "why 100 %", shown_key)
            with pytest.raises(DoorError, match=r"^why 100 %$") as caught:
                await door.infer(REQUEST)
            assert (caught.value.fault, caught.value.key) == (fault, shown_key)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_call_stops_the_work_and_the_next_one_is_answered(serve_door, kind):
    async with serve_door() as served, connect(url_of(served, kind), is_dev=True) as door:
        served.door.before = trio.sleep_forever
        async with trio.open_nursery() as nursery:
            nursery.start_soon(door.infer, REQUEST)
            while not served.door.requests:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        with trio.fail_after(120):
            while not served.door.num_cancelled:  # noqa: ASYNC110
                await trio.sleep(0.01)
        served.door.before = None
        assert bytes((await door.infer(REQUEST)).output) == b"sealed"


@pytest.mark.parametrize("kind", KINDS)
async def test_large_bodies_pass_both_ways(serve_door, kind):
    async with serve_door() as served, connect(url_of(served, kind), is_dev=True) as door:
        body = bytes(range(256)) * (6 << 12)
        request = InferRequest(body, b"", b"", (1,), "float32", "s")
        assert bytes((await door.infer(request)).output) == body
        assert door.max_body_bytes > 90_000_000


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_goes_on_after_the_door_was_restarted(serve_door, kind):
    async with serve_door() as served:
        url, port = url_of(served, kind), {f"port_{kind}": getattr(served, kind)}
    async with connect(url, is_dev=True) as door:
        for _ in range(2):
            async with serve_door(**port):
                assert bytes((await door.infer(REQUEST)).output) == b"sealed"
            with pytest.raises(SessionError, match="door at"):
                await door.infer(REQUEST)


@pytest.mark.parametrize("kind", KINDS)
async def test_tls_is_checked_and_serves(serve_door, certificate, kind):
    tls = {"tls_grpc": load_tls(*certificate, protocol="h2"), "tls_http": load_tls(*certificate)}
    async with serve_door(**tls) as served:
        url = url_of(served, kind).replace("://", "s://")
        async with connect(url, ca_file=certificate[0]) as door:
            assert bytes((await door.infer(REQUEST)).output) == b"sealed"
        async with connect(url) as door:
            with pytest.raises(SessionError, match=r"cannot reach .*self.signed certificate"):
                await door.infer(REQUEST)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer", [b"", b"\x16\x03\x01\x02", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]"]
)
async def test_what_is_no_door_is_one_clear_error(kind, answer):
    async def speak(stream):
        await stream.receive_some(65536)
        await stream.send_all(answer)
        await stream.aclose()

    listeners = await listen("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, speak, listeners)
        async with connect(f"{kind}://127.0.0.1:{port}", is_dev=True) as door:
            with trio.fail_after(120), pytest.raises(SessionError, match=r"^[^\n]*door at[^\n]*$"):
                await door.infer(REQUEST)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_there_is_one_clear_error(kind):
    async with connect(f"{kind}://127.0.0.1:1", is_dev=True) as door:
        with pytest.raises(SessionError, match=r"cannot reach the door at [^\n]+$"):
            await door.attest(AttestRequest(b""))


@pytest.fixture
async def endpoint():
    """An endpoint of a service: `jobs` answers each exchange, whose heads and bodies are kept."""
    seen, jobs = [], []

    async def speak(stream):
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some(65536)
        seen.append(data)
        status, body = jobs.pop(0)
        text = json.dumps(body).encode()
        await stream.send_all(
            b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
            % (status, len(text), text)
        )
        await stream.aclose()

    listeners = await listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, speak, listeners)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v2", seen, jobs
        nursery.cancel_scope.cancel()


OUTPUT = {"output": "AAAA", "nonce": "", "shape": [1], "dtype": "F32", "tokens_processed": 1}


async def test_an_endpoint_gets_the_key_and_is_polled_until_the_job_is_done(endpoint):
    api, seen, jobs = endpoint
    jobs += [
        (200, {"id": "sync-1", "status": "IN_QUEUE"}),
        (200, {"id": "sync-1", "status": "IN_PROGRESS"}),
        (200, {"id": "sync-1", "status": "COMPLETED", "output": OUTPUT}),
    ]
    async with connect("runpod://abc123", bearer_key="secret", runpod_api=api) as door:
        assert bytes((await door.infer(REQUEST)).output) == b"\0\0\0"
        assert door.max_body_bytes < 15_000_000
        with pytest.raises(DoorError) as caught:
            await door.infer(InferRequest(bytes(16_000_000), b"", b"", (1,), "F32", "s"))
        assert caught.value.fault is DoorFault.TOO_LARGE
    first_lines = [each.splitlines()[0] for each in seen]
    assert (
        first_lines
        == [b"POST /v2/abc123/runsync HTTP/1.1"] + [b"GET /v2/abc123/status/sync-1 HTTP/1.1"] * 2
    )
    assert all(b"authorization: bearer secret" in each.lower() for each in seen)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, {"id": "1", "status": "FAILED", "error": "worker exited"}, "ended as FAILED"),
        (200, {"id": "1", "status": "CANCELLED"}, "ended as CANCELLED"),
        (200, {"id": "../x", "status": "IN_QUEUE"}, "without a usable id"),
        (200, [], "HTTP 200"),
        (200, {"status": "COMPLETED", "output": OUTPUT | {"shape": "x"}}, "cannot be read"),
        (200, {"status": "FAILED", "error": '{"fault": "busy", "key": 7}'}, "cannot be read"),
        (401, "no", "refuses the key"),
        (500, "no", "HTTP 500"),
        (302, {}, "HTTP 302"),
    ],
)
async def test_an_endpoint_that_fails_is_one_clear_error(endpoint, status, body, reason):
    api, _, jobs = endpoint
    jobs.append((status, body))
    async with connect("runpod://abc123", bearer_key="secret", runpod_api=api) as door:
        with pytest.raises(SessionError, match=reason) as caught:
            await door.infer(REQUEST)
        assert "secret" not in str(caught.value)


async def test_a_fault_passes_through_an_endpoint_as_text(endpoint):
    api, _, jobs = endpoint
    error = json.dumps({"fault": "unknown_session", "message": "begin anew"})
    jobs.append((200, {"id": "1", "status": "FAILED", "error": error}))
    async with connect("runpod://abc123", bearer_key="secret", runpod_api=api) as door:
        with pytest.raises(DoorError, match="begin anew") as caught:
            await door.infer(REQUEST)
        assert caught.value.fault is DoorFault.UNKNOWN_SESSION


@pytest.mark.parametrize(
    "url",
    [
        "", "door", "ftp://x", "grpcs://x", "grpcs://", "grpcs://x:0", "grpcs://x:70000",
        "grpcs://x:1/path", "https://", "https://u:p@x", "https://x/?q", "https://x/#f",
        "https://[::1", "runpod://", "runpod://a/b", "runpod://a:1", "runpod://a.b",
    ],
)  # fmt: skip
async def test_what_names_no_door_is_refused(url):
    with pytest.raises(InputError):
        async with connect(url, is_dev=True, bearer_key="k"):
            pass


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
async def test_plain_doors_are_for_development(url):
    with pytest.raises(PolicyError, match="--dev"):
        async with connect(url):
            pass


async def test_keys_and_authorities_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match="RUNPOD_API_KEY"):
        async with connect("runpod://abc"):
            pass
    with pytest.raises(InputError, match="no header can carry"):
        async with connect("runpod://abc", bearer_key="a\nb"):
            pass
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="authority"):
            async with connect("https://x", ca_file=path):
                pass


def test_a_bearer_key_comes_from_its_owners_file_or_a_variable(tmp_path):
    path = tmp_path / "key"
    path.write_text("abc\n")
    with pytest.raises(PolicyError):
        load_bearer_key(path, {})
    path.chmod(0o600)
    assert load_bearer_key(path, {"RUNPOD_API_KEY": "other"}) == "abc"
    assert load_bearer_key(None, {"RUNPOD_API_KEY": " other "}) == "other"
    assert load_bearer_key(None, {}) is None
    for text in (b"", b"\xff"):
        path.write_bytes(text)
        with pytest.raises(PipelineError):
            load_bearer_key(path, {})
