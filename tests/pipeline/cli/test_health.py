"""A worker's probes: answered whatever it does, and nothing learnt but yes or no."""

import http.client
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import trio

from pipeline.agreement.manifest import dump_manifest
from pipeline.cli import health as module
from pipeline.cli.health import MAX_CONNECTIONS, MAX_REQUEST_BYTES, Health, answer, answering
from pipeline.planning.plan import PlanOptions, plan
from transport.dial_and_listen import TcpEndpoint, UnixEndpoint
from transport.errors import EndpointError

HERE = TcpEndpoint("127.0.0.1", 0)


@pytest.fixture
def health():
    return Health()


def status(reply):
    version, code, _ = reply.split(b" ", 2)
    assert version == b"HTTP/1.1"
    return int(code)


def ask(address, path, method="GET"):
    connection = http.client.HTTPConnection(address.host, address.port, timeout=300)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


@pytest.mark.parametrize("is_ready", [False, True])
def test_alive_and_ready_are_two_questions(health, is_ready):
    health.is_ready = is_ready
    assert status(answer(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", health)) == 200
    expected = 200 if is_ready else 503
    assert status(answer(b"GET /readyz HTTP/1.1\r\n\r\n", health)) == expected
    assert status(answer(b"HEAD /readyz?verbose HTTP/1.0\r\n\r\n", health)) == expected


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /livez/ HTTP/1.1\r\n\r\n", 404),
        (b"GET http://a/livez HTTP/1.1\r\n\r\n", 404),
        (b"POST /livez HTTP/1.1\r\n\r\n", 405),
        (b"get /livez HTTP/1.1\r\n\r\n", 405),
        (b"PRI * HTTP/2.0\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET  /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez\r\n\r\n", 400),
        (b"\xff\x00 \xff HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01" + bytes(MAX_REQUEST_BYTES), 400),
    ],
)
def test_what_is_no_probe_is_told_so(health, request_bytes, expected):
    assert status(answer(request_bytes, health)) == expected


def test_a_request_may_come_in_pieces_and_not_for_ever(health):
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    assert all(answer(request[:length], health) is None for length in range(len(request)))
    assert answer(b"a" * (MAX_REQUEST_BYTES - 1), health) is None
    assert status(answer(b"a" * MAX_REQUEST_BYTES, health)) == 400


def test_answers_tell_nothing_but_their_status(health):
    replies = [
        answer(f"GET {path} HTTP/1.1\r\n\r\n".encode(), health) for path in ("/livez", "/readyz")
    ]
    heads = {reply.split(b"\r\n", 1)[1] for reply in replies}
    assert heads == {b"Content-Length: 0\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"}


async def test_a_loop_that_turns_no_more_is_not_alive_and_one_that_has_not_begun_is(health):
    assert health.is_alive
    async with trio.open_nursery() as nursery:
        nursery.start_soon(health.keep_turning)
        await trio.testing.wait_all_tasks_blocked()
        assert health.is_alive
        nursery.cancel_scope.cancel()
    health._turned_at = time.monotonic() - module.STUCK_SECONDS
    assert not health.is_alive
    assert status(answer(b"GET /livez HTTP/1.1\r\n\r\n", health)) == 503


def test_it_is_answered_while_nobody_looks_up(health):
    with answering(HERE, health) as listener:  # no event loop turns in this thread
        assert ask(listener.endpoint, "/livez") == (200, b"")
        assert ask(listener.endpoint, "/readyz") == (503, b"")
        health.is_ready = True
        assert ask(listener.endpoint, "/readyz") == (200, b"")
        assert ask(listener.endpoint, "/readyz", "HEAD") == (200, b"")
        assert ask(listener.endpoint, "/metrics")[0] == 404


def test_connections_that_say_nothing_keep_nobody_out(health, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 3600)
    silent = []
    try:
        with answering(HERE, health) as listener:
            place = (listener.endpoint.host, listener.endpoint.port)
            for _ in range(2 * MAX_CONNECTIONS):
                silent.append(socket.create_connection(place))
                silent[-1].sendall(b"GET /livez HTTP/1.1\r\nX: ")
            assert ask(listener.endpoint, "/livez") == (200, b"")
            # Whoever has come first has made room.
            silent[0].settimeout(60)
            with suppress(ConnectionResetError):  # it had not been read yet
                assert not silent[0].recv(1)
    finally:
        for each in silent:
            each.close()


def test_nothing_listens_or_runs_afterwards(health, tmp_path):
    place = UnixEndpoint(tmp_path / "health")
    with answering(place, health):
        assert place.path.exists()
        with pytest.raises(EndpointError, match="health"), answering(place, health):
            pass
    assert not place.path.exists()
    with pytest.raises(RuntimeError, match="the worker's own"), answering(place, health):
        raise RuntimeError("the worker's own")
    assert not place.path.exists()


# Runs the command with what its probes are told at each turn of its life on stdout.
TOLD = """
import http.client, os, signal
from contextlib import contextmanager
import trio
import pipeline.cli.stage_worker as command

def ask(path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", path)
    return connection.getresponse().status

def tell(when):
    print(when, ask("/livez"), ask("/readyz"), flush=True)

@contextmanager
def answering(endpoint, health, answering=command.answering):
    global port
    with answering(endpoint, health) as listener:
        port = listener.endpoint.port
        tell("begun")
        yield listener

def load_stage(*arguments, load_stage=command.load_stage):
    tell("loading")
    return load_stage(*arguments)

class Worker(command.StageWorker):
    async def serve(self, *listeners, once):
        tell("serving")  # and computing: the event loop stands still
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    async def leave(self):
        tell("leaving")

command.answering, command.load_stage, command.StageWorker = answering, load_stage, Worker
command.main()
"""


def test_a_worker_is_alive_all_along_and_ready_between_loading_and_leaving(tiny_model, tmp_path):
    manifest = tmp_path / "manifest.json"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    manifest.write_text(dump_manifest(plan(model, PlanOptions(num_stages=2))))
    listens = [f"--{name}-listen=127.0.0.1:0" for name in ("control", "data-in")]
    found = subprocess.run(
        [sys.executable, "-c", TOLD, f"--manifest={manifest}", "--stage-idx=0", "--dev",
         f"--model-dir={model}", "--health=127.0.0.1:0", *listens],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.stdout.splitlines() == [
        "begun 200 503", "loading 200 503", "serving 200 200", "leaving 200 503"
    ], found.stderr  # fmt: skip
    assert "event=health_answered address=tcp:127.0.0.1:" in found.stderr


def test_a_worker_that_is_not_asked_to_answers_nobody(monkeypatch):
    from pipeline.cli import stage_worker
    from pipeline.cli.worker_flags import WorkerFlags

    assert WorkerFlags.model_fields["health"].default is None
    monkeypatch.setattr(stage_worker, "answering", None)
    monkeypatch.setattr(stage_worker, "_prepare", lambda flags: ())
    monkeypatch.setattr(stage_worker, "_run", lambda *rest: None)
    stage_worker.serve(
        manifest="m", stage_idx="0", model_dir="d", **dict.fromkeys(_others(WorkerFlags))
    )


def _others(settings):
    for name, info in settings.model_fields.items():
        if hasattr(info.annotation, "model_fields"):
            yield from _others(info.annotation)
        elif name not in {"manifest", "stage_idx", "model_dir"}:
            yield name
