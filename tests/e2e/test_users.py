"""Users who leave, dawdle, crowd in or talk nonsense, at a server over real stages."""

import itertools
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import threading
import time
from contextlib import ExitStack

import httpx
import openai
import pytest

KEY = "sk-right"
HEADERS = {"authorization": f"Bearer {KEY}"}


class Server:
    """`pipeline-orch serve` with supervised workers of a tiny model."""

    def __init__(self, cluster):
        self.log_path = cluster.directory / "serve.log"
        self._begin = 0
        key = cluster.directory / "keys"
        key.write_text(f"sk-other\n{KEY}\n")
        with self.log_path.open("wb") as file:
            self.process = subprocess.Popen(
                [cluster.bin / "pipeline-orch", "serve", "--manifest", cluster.manifest,
                 "--model-dir", cluster.model_dir, "--supervise", "--port", "0", "--dev",
                 "--max-batch", "8", "--context", "2048", "--log-format", "json", "--verbose",
                 "--api-key-file", key, "--max-body-bytes", "100000"],
                stdout=file, stderr=file, env=cluster.environment, preexec_fn=few_files,
            )  # fmt: skip
        self.url = self.wait_for(lambda: re.search(r'"url": "(http://\S+)"', self.log()))[1]
        self.port = int(self.url.rpartition(":")[2])
        self.wait_for(self.is_ready)

    def begin(self):
        """Forget what has been logged."""
        self._begin += len(self.log().encode())

    def log(self):
        """Whole lines only: what is being written can be seen half done."""
        written = self.log_path.read_bytes()[self._begin :]
        return written[: written.rfind(b"\n") + 1].decode()

    def events(self, name):
        lines = [json.loads(line) for line in self.log().splitlines()]
        return [line for line in lines if line.get("event") == name]

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError(self.log()[-5000:])

    def pipeline(self):
        return httpx.get(f"{self.url}/pipeline", headers=HEADERS).raise_for_status().json()

    def figures(self):
        """What every stage last told; it is asked every second."""

        def told():
            found = [stage["figures"] for stage in self.pipeline()["stages"]]
            return found if all(found) else None

        return self.wait_for(told, 5)

    def post(self, path="/v1/completions", headers=HEADERS, **body):
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def text(self, prompt, max_tokens):
        answer = self.post(**wish(prompt, max_tokens))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def raw(self, data=b"", receive_buffer=None):
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", self.port))
        sock.sendall(data)
        return sock

    def ask(self, data):
        """Everything that is answered before the server closes the connection."""
        with self.raw(data) as sock:
            answer = b""
            while more := sock.recv(65536):
                answer += more
        return answer

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(15) == 0


def few_files():
    """What many systems start a process with, and less."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))


@pytest.fixture(scope="module")
def shared_server(shared_cluster):
    shared_cluster.plan(2)
    server = Server(shared_cluster)
    yield server
    server.stop()


@pytest.fixture
def server(shared_server):
    """The one server, whose log begins anew for every test."""
    shared_server.wait_for(lambda: shared_server.pipeline()["engine"]["num_running"] == 0)
    shared_server.begin()
    return shared_server


@pytest.fixture
def own_server(cluster):
    cluster.plan(2)
    server = Server(cluster)
    yield server
    server.stop()


def wish(prompt="Hello", max_tokens=40, **more):
    return {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True} | more  # fmt: skip


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
        assert last.usage == whole.usage
        long = {"model": "model", "prompt": "On and on", "max_tokens": 1500, "temperature": 0}
        stream = client.completions.create(**long, stream=True, extra_body={"ignore_eos": True})
        text = "".join(part.choices[0].text for part, _ in zip(stream, range(8), strict=False))
        stream.close()
        server.wait_for(lambda: server.pipeline()["engine"]["num_running"] == 0)
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
def test_who_leaves_at_token_5_of_500_frees_every_stage_within_two_steps(server, num_choices):
    began_at = server.pipeline()["engine"]["num_steps"]
    body = wish("Once upon a time", 500, stream=True, n=num_choices)
    sock = server.raw(request(body))
    data = b""
    while data.count(b"data: ") < 5 * num_choices:
        data += sock.recv(4096)
    sock.close()
    aborts = server.wait_for(lambda: server.events("generation_aborted"))
    server.wait_for(lambda: server.pipeline()["engine"]["num_running"] == 0)
    server.wait_for(lambda: all(each["slots_in_use"] == 0 for each in server.figures()), 5)
    assert len(server.events("generation_aborted")) == num_choices
    left_at = max(abort["step"] for abort in aborts)
    assert left_at - began_at < 250
    # The steps under way when it left, one for each stage, and the one that clears its slots.
    under_way = min(num_choices, 2)
    settled = server.wait_for(lambda: idle_figures(server), 10)
    for figures in settled:
        assert figures["num_steps"] <= left_at + under_way + 1
        assert figures["kv_tokens"] == 0
        assert figures["num_slots"] == 8
    assert server.text("And on it goes", 20)


def idle_figures(server):
    """The stages' figures, once two answers in a row say the same."""
    before = server.figures()
    time.sleep(1.5)
    after = server.figures()
    same = [a["num_steps"] == b["num_steps"] for a, b in zip(before, after, strict=True)]
    return after if all(same) else None


def gaps(server, max_tokens):
    """Times between the pieces of one streamed completion, seconds."""
    times = []
    body = wish("A fast reader", max_tokens, stream=True)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=60
    ) as answer:
        times.extend(time.perf_counter() for line in answer.iter_lines() if "text" in line)
    return [b - a for a, b in itertools.pairwise(times)]


def test_clients_that_read_a_byte_a_second_slow_nobody(server):
    """Whoever waited for one of them would wait minutes for a token, not milliseconds."""
    stopped = threading.Event()
    with ExitStack() as stack:
        for _ in range(3):
            body = wish("A slow reader", 1500, stream=True, logprobs=5)
            sock = stack.enter_context(server.raw(request(body), receive_buffer=2048))
            thread = threading.Thread(target=dawdle, args=(sock, stopped))
            thread.start()
            stack.callback(thread.join)
        stack.callback(stopped.set)
        server.wait_for(lambda: server.pipeline()["engine"]["num_running"] == 3, 10)
        assert statistics.median(gaps(server, 200)) < 0.2
        # Their own requests are not held up either, but for the sending.
        server.wait_for(lambda: server.pipeline()["engine"]["num_running"] == 0)


def dawdle(sock, stopped):
    while not stopped.wait(1.0):
        sock.recv(1)


def test_nonsense_gets_its_error_and_disturbs_no_one(server):
    expected = server.text("The steady one", 400)
    found = []
    steady = threading.Thread(target=lambda: found.append(server.text("The steady one", 400)))
    steady.start()
    good = wish()
    cases = [
        (b"{", 400), (b"", 400), (b"\xff\xfe{}", 400), (b"[1]", 400), (b'{"a": NaN}', 400),
        (b"[" * 50_000, 400), (b"x" * 100_001, 413),
        (good | {"model": "gpt-4"}, 404), (good | {"prompt": 5}, 400),
        (good | {"prompt": []}, 400), (good | {"prompt": [1 << 40]}, 400),
        (good | {"max_tokens": -1}, 400), (good | {"max_tokens": 10**30}, 400),
        (good | {"max_tokens": "7"}, 400), (good | {"temperature": 1e300}, 400),
        (good | {"n": 10**9}, 400), (good | {"stop": {"a": 1}}, 400),
        (good | {"prompt": "x" * 3000}, 400), (good | {"seed": 1 << 70}, 400),
    ]  # fmt: skip
    for body, status in cases:
        answer = server.ask(request(body))
        assert answer.startswith(b"HTTP/1.1 %d" % status), (str(body)[:200], answer)
        assert b"x-request-id: " in answer
        assert b'"error":{"message":' in answer
    assert server.ask(request(good, key="sk-wrong")).startswith(b"HTTP/1.1 401")
    assert server.ask(request(good | {"zzz": {"unknown": 1}})).startswith(b"HTTP/1.1 200")
    for data in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"):
        assert not server.ask(data).startswith(b"HTTP/1.1 200")
    steady.join(60)
    assert found == [expected]
    # Half-closed: whoever will not read on has left.
    with server.raw(request(good | {"stream": True, "max_tokens": 2000})) as sock:
        sock.shutdown(socket.SHUT_WR)
        server.wait_for(lambda: server.pipeline()["engine"]["num_running"] == 0)
    assert "Traceback" not in server.log()


def test_a_thousand_connections_and_slow_headers_keep_nobody_out(server):
    expected = server.text("Through the crowd", 100)
    with ExitStack() as stack:
        crowd = [stack.enter_context(server.raw()) for _ in range(1000)]
        for sock in crowd[:500]:  # the start of a request that never ends
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
        server.wait_for(lambda: connections(server) >= 1000)
        started = time.monotonic()
        assert server.text("Through the crowd", 100) == expected
        assert time.monotonic() - started < 10
        more = [stack.enter_context(server.raw()) for _ in range(60)]
        for sock in more[:24]:
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answers = [sock.recv(4096)[:12] for sock in more]
        assert b"HTTP/1.1 503" in answers
        # All of them are idle or slow, and are cut off after ten seconds.
        for sock in crowd:
            assert sock.recv(4096)[:12] in (b"", b"HTTP/1.1 408", b"HTTP/1.1 400")
    server.wait_for(lambda: connections(server) < 5)
    assert server.text("Through the crowd", 100) == expected


def test_a_lost_stage_is_seen_to_go_and_to_be_replaced(own_server):
    server = own_server
    time.sleep(1.5)  # so that ages differ
    pids = {line["stage"]: line["pid"] for line in server.events("worker_started")}
    before = server.pipeline()
    assert [stage["state"] for stage in before["stages"]] == ["ready", "ready"]
    os.kill(pids[1], signal.SIGKILL)
    states = set()
    server.wait_for(lambda: seen_states(server, states) and not server.is_ready(), 10)
    server.wait_for(lambda: seen_states(server, states) and server.is_ready(), 20)
    assert server.text("Back again", 20)
    after = server.pipeline()
    assert {state for idx, state in states if idx == 1} & {"down", "connecting"}
    assert {state for idx, state in states if idx == 0} <= {"ready", "connecting"}
    assert [stage["state"] for stage in after["stages"]] == ["ready", "ready"]
    ages = [stage["handshake_age_seconds"] for stage in after["stages"]]
    assert ages[0] > before["stages"][0]["handshake_age_seconds"] > 1
    assert ages[1] < ages[0] - 1
    uptimes = [figures["uptime_ns"] for figures in server.figures()]
    assert uptimes[1] < uptimes[0]
    assert after["engine"]["num_failovers"] == 1
    assert 0 < after["engine"]["recovery_seconds"] < 20
    assert after["engine"]["num_handshakes"] > before["engine"]["num_handshakes"]
    text = httpx.get(f"{server.url}/metrics", headers=HEADERS).text
    assert "\nveilpipe_failovers_total 1.0\n" in text
    assert '\nveilpipe_stage_up{stage="1"} 1.0\n' in text


def seen_states(server, states):
    """Add what the stages are now."""
    states |= {(stage["stage_idx"], stage["state"]) for stage in server.pipeline()["stages"]}
    return True


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
        text = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=10).text
    except httpx.TransportError:
        return 0
    found = re.search(r"^veilpipe_http_connections (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0
