"""Users who leave, dawdle, crowd in or talk nonsense, at a server over real stages."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack

import httpx
import openai
import pytest

from tests.e2e.processes import stopped

KEY = "sk-right"
HEADERS = {"authorization": f"Bearer {KEY}"}


def start_server(cluster):
    """With supervised workers of a tiny model."""
    cluster.plan(2)
    key = cluster.directory / "keys"
    key.write_text(f"sk-other\n{KEY}\n")
    return cluster.serve(
        "--supervise", "--context", "2048", "--log-format", "json", "--verbose",
        "--api-key-file", key, "--max-body-bytes", "100000",
        headers=HEADERS, preexec_fn=few_files,
    )  # fmt: skip


def few_files():
    """What many systems start a process with, and less."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))


@pytest.fixture(scope="module")
def shared_server(shared_cluster):
    return start_server(shared_cluster)


@pytest.fixture
def server(shared_server):
    """The one server, whose log begins anew for every test."""
    shared_server.wait_for(lambda: shared_server.num_running() == 0)
    shared_server.begin()
    return shared_server


def figures(server):
    """What every stage last told; it is asked every second."""

    def told():
        found = [stage["figures"] for stage in server.pipeline()["stages"]]
        return found if all(found) else None

    return server.wait_for(told)


def raw(server, data=b"", receive_buffer=None):
    """A connection on which that has been sent."""
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(300)
    sock.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    sock.sendall(data)
    return sock


def ask(server, data):
    """Everything that is answered before the server closes the connection."""
    with raw(server, data) as sock:
        return read_all(sock)


def read_all(sock):
    answer = b""
    while more := sock.recv(65536):
        answer += more
    return answer


def request(body, path="/v1/completions", key=KEY):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def test_the_openai_client_gets_what_it_asks_of_real_stages(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["model"]
        ask = client.chat.completions.create
        question = {"model": "model", "messages": [{"role": "user", "content": "Hi"}]}
        question |= {"seed": 7, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
        whole = ask(**question, logprobs=True, top_logprobs=2)
        assert whole.usage.completion_tokens == 12
        assert len(whole.choices[0].logprobs.content) == 12
        assert whole.choices[0].finish_reason == "length"
        *parts, last = ask(**question, stream=True, stream_options={"include_usage": True})
        assert "".join(part.choices[0].delta.content or "" for part in parts) == (
            whole.choices[0].message.content
        )
        # What of the prompt was there already differs, the second time.
        known = {"prompt_tokens_details": None}
        assert last.usage.model_copy(update=known) == whole.usage.model_copy(update=known)
        long = {"model": "model", "prompt": "On and on", "max_tokens": 1500, "temperature": 0}
        stream = client.completions.create(**long, stream=True, extra_body={"ignore_eos": True})
        text = "".join(part.choices[0].text for part, _ in zip(stream, range(8), strict=False))
        stream.close()
        server.wait_for(lambda: server.num_running() == 0)
        stop = text[-1]
        stopped = client.completions.create(**long, stop=stop, extra_body={"ignore_eos": True})
        assert stopped.choices[0].text == text[: text.index(stop)]
        assert stopped.choices[0].finish_reason == "stop"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            ask(model="gpt-4", messages=question["messages"])
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.completions.create(model="model", prompt="x" * 5000)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize("num_choices", [1, 4])
def test_who_leaves_at_token_5_of_2000_frees_every_stage_within_two_steps(server, num_choices):
    held = [each["kv_tokens"] for each in server.wait_for(lambda: idle_figures(server))]
    body = server.wish("Once upon a time", 2000, stream=True, n=num_choices)
    sock = raw(server, request(body))
    data = b""
    while data.count(b"data: ") < 5 * num_choices:
        data += sock.recv(4096)
    with stopped(server.workers()[1]):
        assert server.num_running() == num_choices
        sock.close()
        server.wait_for(lambda: len(server.events("generation_aborted")) == num_choices)
    aborts = server.events("generation_aborted")
    server.wait_for(lambda: server.num_running() == 0)
    server.wait_for(lambda: holds_idle_prefixes_alone(server))
    left_at = max(abort["step"] for abort in aborts)
    # The steps under way when it left, one for each stage or that of a lone request and the one
    # promised behind it, and the one that clears its slots.
    for settled, before in zip(server.wait_for(lambda: idle_figures(server)), held, strict=True):
        assert settled["num_steps"] <= left_at + 2 + 1
        assert settled["kv_tokens"] <= before
        assert settled["num_slots"] == 8
    assert server.text("And on it goes", 20)


def holds_idle_prefixes_alone(server):
    """Whether stages hold nothing but what requests have left that had all they wanted."""
    num_idle = server.pipeline()["engine"]["num_idle_prefixes"]
    return all(each["slots_in_use"] == num_idle for each in figures(server))


def idle_figures(server):
    """The stages' figures, once two answers in a row say the same."""
    before = figures(server)

    def told_again():
        after = figures(server)
        pairs = zip(before, after, strict=True)
        return after if all(a["uptime_ns"] != b["uptime_ns"] for a, b in pairs) else None

    after = server.wait_for(told_again)
    same = [a["num_steps"] == b["num_steps"] for a, b in zip(before, after, strict=True)]
    return after if all(same) else None


def test_clients_that_read_a_byte_a_second_hold_nobody_up(server):
    """Whoever waited for one of them would wait for as many seconds as there are bytes."""
    is_over = threading.Event()
    with ExitStack() as stack:
        with stopped(server.workers()[1]):
            for _ in range(3):
                body = server.wish("A slow reader", 500, stream=True, logprobs=5)
                sock = stack.enter_context(raw(server, request(body), receive_buffer=2048))
                thread = threading.Thread(target=dawdle, args=(sock, is_over))
                thread.start()
                stack.callback(thread.join)
            stack.callback(is_over.set)
            server.wait_for(lambda: server.num_taken() == 3)
        assert server.text("A fast reader", 200)
        # Their own requests are not held up either, but for the sending.
        server.wait_for(lambda: server.num_running() == 0)


def dawdle(sock, is_over):
    while not is_over.wait(1.0):
        sock.recv(1)


def test_nonsense_gets_its_error_and_disturbs_no_one(server):
    expected = server.text("The steady one", 400)
    found = []
    steady = threading.Thread(target=lambda: found.append(server.text("The steady one", 400)))
    steady.start()
    good = server.wish("Hello", 40)
    cases = [
        (b"{", 400), (b"", 400), (b"\xff\xfe{}", 400), (b"[1]", 400), (b'{"a": NaN}', 400),
        (b"[" * 50_000, 400), (b"x" * 100_001, 413),
        (good | {"model": "gpt-4"}, 404), (good | {"prompt": 5}, 400),
        (good | {"prompt": []}, 400), (good | {"prompt": [1 << 40]}, 400),
        (good | {"max_tokens": -1}, 400), (good | {"max_tokens": 10**30}, 400),
        (good | {"max_tokens": "7"}, 400), (good | {"temperature": 1e300}, 400),
        (good | {"n": 10**9}, 400), (good | {"stop": {"a": 1}}, 400),
        (good | {"prompt": "x" * 3000}, 400), (good | {"seed": 1 << 70}, 400),
        (good | {"zzz": {"unknown": 1}}, 400),
    ]  # fmt: skip
    for body, status in cases:
        answer = ask(server, request(body))
        assert answer.startswith(b"HTTP/1.1 %d" % status), (str(body)[:200], answer)
        assert b"x-request-id: " in answer
        assert b'"error":{"message":' in answer
    assert ask(server, request(good, key="sk-wrong")).startswith(b"HTTP/1.1 401")
    assert ask(server, request(good | {"user": "somebody"})).startswith(b"HTTP/1.1 200")
    for data in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"):
        assert not ask(server, data).startswith(b"HTTP/1.1 200")
    steady.join(300)
    assert found == [expected]
    # Half-closed: whoever will not read on has left.
    with raw(server, request(good | {"stream": True, "max_tokens": 2000})) as sock:
        sock.shutdown(socket.SHUT_WR)
        server.wait_for(lambda: server.num_running() == 0)
    assert "Traceback" not in server.log()


def test_a_thousand_connections_and_slow_headers_keep_nobody_out(server):
    expected = server.text("Through the crowd", 100)
    with ExitStack() as stack:
        # The start of a request that never ends, and nothing at all.
        begun = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: "
        crowd = [stack.enter_context(raw(server, begun * (i % 2))) for i in range(1000)]
        assert server.text("Through the crowd", 100) == expected
        # All of them are idle or slow, and are cut off after ten seconds.
        for sock in crowd:
            assert sock.recv(4096)[:12] in (b"", b"HTTP/1.1 408", b"HTTP/1.1 400")
    server.wait_for(lambda: connections(server) < 5)
    assert server.text("Through the crowd", 100) == expected


def test_a_lost_stage_is_seen_to_go_and_to_be_replaced(server, shared_cluster):
    time.sleep(1.5)  # so that ages differ
    before = server.pipeline()
    assert states(server) == ["ready", "ready"]
    manifest = shared_cluster.manifest
    right = manifest.read_text()
    manifest.write_text("no worker starts with this")
    os.kill(server.workers()[1], signal.SIGKILL)
    first, _ = server.wait_for(lambda: told if (told := states(server))[1] == "down" else None)
    assert first in {"ready", "connecting"}
    assert not server.is_ready()
    manifest.write_text(right)
    server.wait_for(server.is_ready)
    assert server.text("Back again", 20)
    after = server.pipeline()
    assert states(server) == ["ready", "ready"]
    ages = [stage["handshake_age_seconds"] for stage in after["stages"]]
    assert ages[0] > before["stages"][0]["handshake_age_seconds"] > 1
    assert ages[1] < ages[0] - 1
    uptimes = [told["uptime_ns"] for told in figures(server)]
    assert uptimes[1] < uptimes[0]
    assert after["engine"]["num_failovers"] == 1
    assert 0 < after["engine"]["recovery_seconds"] < 60
    assert after["engine"]["num_handshakes"] > before["engine"]["num_handshakes"]
    text = server.get("/metrics").text
    assert "\nveilpipe_failovers_total 1.0\n" in text
    assert '\nveilpipe_stage_up{replica="0",stage="1"} 1.0\n' in text


def states(server):
    return [stage["state"] for stage in server.pipeline()["stages"]]


def test_connections_this_process_may_not_have_are_refused_at_the_start(cluster):
    cluster.plan(1)
    command = [
        "sh", "-c", 'ulimit -n 500; exec "$@"', "sh", cluster.bin / "pipeline-orch", "serve",
        "--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--dev",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.environment)
    assert done.returncode == 2
    assert "lower --max-connections" in done.stderr


def connections(server):
    try:
        text = server.get("/metrics").text
    except httpx.TransportError:
        return 0
    found = re.search(r"^veilpipe_http_connections (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0
