"""`pipeline-orch top`: what it shows, and of what it cannot show the reason."""

import dataclasses
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli.top import ServerAddress, render
from pipeline.errors import InputError, PipelineError
from pipeline.gateway.metrics import LatencyView
from pipeline.gateway.pipeline_status import (
    EngineView,
    PipelineView,
    ReplicaView,
    StageRates,
    StageView,
)
from pipeline.gateway.readiness import Phase
from pipeline.protocol.messages import StageFigures

FIGURES = StageFigures(
    **dict.fromkeys(StageFigures.model_fields, 0)
    | {"num_slots": 8, "kv_tokens": 512, "last_batch": 3, "slots_in_use": 3}
)
RATES = StageRates(
    load=0.41, steps_per_second=20, tokens_per_second=60, bytes_per_second=51234,
    compute_ms=20.5, crypto_ms=0.25, wire_ms=1.5,
)  # fmt: skip
VIEW = PipelineView(
    model="smollm2",
    is_ready=True,
    engine=EngineView(
        max_batch=8, max_seq_len=1024, num_running=3, num_waiting=2, last_batch=3, num_steps=9,
        num_tokens=27, num_failovers=1, num_handshakes=8, recovery_seconds=0.75,
    ),
    latency=LatencyView(
        tokens_per_second=61.2, ttft_p50_seconds=0.12, ttft_p95_seconds=0.3,
        inter_token_p50_seconds=0.016, inter_token_p95_seconds=None,
    ),
    stages=(
        StageView(
            stage_idx=0, layer_start=0, layer_end=15, precision="float32", state="ready",
            kernels="native", evidence="nitro", measurement="ab12" * 24, handshake_age_seconds=4000,
            address="tcp:10.0.0.7:9000",
            figures=FIGURES, rates=RATES,
        ),
        StageView(stage_idx=1, layer_start=15, layer_end=30, precision="int8", state="down"),
    ),
)  # fmt: skip


def shown(view, width=142, problem=""):
    output = io.StringIO()
    Console(width=width, file=output).print(render(view, width, problem))
    return output.getvalue().splitlines()


def test_a_row_tells_all_of_a_stage_and_dashes_stand_for_the_unknown():
    lines = shown(VIEW, 170)
    assert lines[0].split("  ") == [
        "smollm2", "ready", "running 3/8", "waiting 2", "61.2 tokens/s",
        "failovers 1 (last took 0.75 s)",
    ]  # fmt: skip
    assert "first token p50 120.0 p95 300.0 ms" in lines[1]
    assert "between tokens -" in lines[1]
    first = "0 0-14 float32 native ready 41% 3 512 tok 6% 51.2 kB 22.25 20.50 0.25 1.50"
    assert " ".join(lines[-2].split()) == f"{first} nitro ab12ab12ab12 67 min tcp:10.0.0.7:9000"
    assert " ".join(lines[-1].split()) == "1 15-29 int8 - down - - - - - - - - - - -"


def test_slots_that_idle_explain_what_kv_memory_holds_while_nobody_runs():
    engine = dataclasses.replace(VIEW.engine, num_running=0, num_idle_prefixes=3)
    line = shown(VIEW.model_copy(update={"engine": engine}))[0]
    assert "running 0/8  waiting 2  idle prefixes 3" in line


def test_what_requests_share_is_shown_and_how_often_one_gave_way():
    engine = dataclasses.replace(
        VIEW.engine, pool_tokens=132_000, held_tokens=1_100, num_given_way=7
    )
    lines = shown(VIEW.model_copy(update={"engine": engine}), 200)
    assert "waiting 2  holding 1,100 of 132,000 tokens  gave way 7  61.2" in lines[0]
    assert " 512 tok 0% " in " ".join(lines[-2].split())


@pytest.mark.parametrize("width", [48, 60, 80, 129])
def test_nothing_is_cut_off_in_a_narrow_terminal(width):
    lines = shown(VIEW, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert "…" not in "".join(words)
    assert set(words) >= {"22.25", "ab12ab12ab12", "down", "51.2", "6%", "tcp:10.0.0.7:9000"}


@pytest.mark.parametrize("width", [1, 10, 30])
def test_every_figure_has_its_place_in_the_narrowest_terminal(width):
    lines = shown(VIEW, width)
    assert max(map(len, lines)) <= width
    if width == 30:
        assert {"22.25", "67", "51.2", "down"} <= set(" ".join(lines).split())


def test_several_pipelines_are_told_apart_row_by_row():
    views = [VIEW.stages[0], VIEW.stages[1].model_copy(update={"replica": 1})]
    told = [
        ReplicaView(replica=idx, state=state, num_running=idx, num_waiting=3, num_tokens=9)
        for idx, state in enumerate((Phase.READY, Phase.DRAINING))
    ]
    lines = shown(VIEW.model_copy(update={"replicas": told, "stages": views}), 180)
    assert lines[2] == "replicas  0: ready 0 running 3 waiting  1: draining 1 running 3 waiting"
    assert lines[3].split()[:3] == ["replica", "stage", "layers"]
    # The room of one of them.
    assert " ".join(lines[-2].split()).startswith("0 0 0-14 float32 native ready 41% 3 512 tok 12%")
    assert lines[-1].split()[:3] == ["1", "1", "15-29"]
    narrow = shown(VIEW.model_copy(update={"replicas": told, "stages": views}), 60)
    heads = [line.split()[:2] for line in narrow if "stage" in line]
    assert len(heads) > 1
    assert all(head == ["replica", "stage"] for head in heads)


def test_a_pipeline_without_stages_has_no_table():
    assert len(shown(VIEW.model_copy(update={"stages": ()}))) == 2


def test_a_server_cannot_drive_the_terminal():
    view = VIEW.model_copy(update={"model": "\x1b[2Jmodel[red]\nx"})
    lines = shown(view, problem="gone\x1b]0;title\x07")
    assert lines[0].startswith(r"\x1b[2Jmodel[red] x  ready")
    assert "\x1b" not in "".join(lines)
    assert any(line.startswith("not current: gone") for line in lines)


@pytest.fixture
def server():
    """Answers every GET with `answer`; remembers what was asked."""

    requests = []

    class Handler(BaseHTTPRequestHandler):
        answer = (200, VIEW.model_dump_json().encode())
        asked = requests

        def do_GET(self):
            self.asked.append((self.path, self.headers.get("authorization")))
            status, body = self.answer
            self.send_response(status)
            if status == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        Handler.url = f"http://127.0.0.1:{http.server_port}"
        yield Handler
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_key_goes_along_and_the_apis_address_will_do(server, tmp_path, suffix, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    key = tmp_path / "key"
    key.write_text("sk-1\n")
    assert ServerAddress.parse(server.url + suffix, key).fetch() == VIEW
    assert server.asked == [("/pipeline", "Bearer sk-1")]


@pytest.mark.parametrize(
    ("status", "body", "kind", "word"),
    [
        (401, b"", InputError, "--api-key-file"),
        (403, b"", InputError, "--api-key-file"),
        (302, b"", PipelineError, "302"),
        (404, b"", PipelineError, "is it a veilpipe server"),
        (200, b"<html>", PipelineError, "something else"),
        (200, b'{"model": "x"}', PipelineError, "something else"),
        (200, b"\xff" * 3, PipelineError, "something else"),
        (200, b"[" * 100_000, PipelineError, "something else"),
    ],
)
def test_every_other_answer_is_one_line(server, status, body, kind, word):
    server.answer = (status, body)
    with pytest.raises(kind, match=word) as caught:
        ServerAddress.parse(server.url, None).fetch()
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(PipelineError, match=r"http://127\.0\.0\.1:1 .*pipeline-orch serve"):
        ServerAddress.parse("http://127.0.0.1:1", None).fetch()


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://h", "http://", "http://h:99999", "http://h\r\nx", "http://a b"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError, match="--url"):
        ServerAddress.parse(url, None)


@contextmanager
def on_a_terminal(server, term, *arguments):
    """`top` on a terminal of its own: the process, and the terminal's other end."""
    leader, follower = pty.openpty()
    command = [
        Path(sys.executable).parent / "pipeline-orch",
        "top",
        "--url",
        server.url,
        *arguments,
    ]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=os.environ | {"TERM": term}
    )
    os.close(follower)
    try:
        yield process, leader
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def read_until(leader, is_enough):
    seen = b""
    while not is_enough(seen):
        assert select.select([leader], [], [], 600)[0], seen
        try:
            seen += os.read(leader, 65536)
        except OSError:  # the other end has closed it
            return seen
    return seen


def test_a_terminal_that_can_only_print_is_shown_one_table_after_another(server):
    with on_a_terminal(server, "dumb", "--interval", "0.1") as (_, leader):
        seen = read_until(leader, lambda seen: seen.count(b"tokens/s") >= 3)
    assert b"\x1b" not in seen


@pytest.mark.parametrize(("key", "term"), [(b"q", "xterm"), (b"Q", "dumb"), (None, "xterm")])
def test_a_key_leaves_it_and_the_terminal_is_as_it_was(server, term, key):
    with on_a_terminal(server, term, "--interval", "1000") as (process, leader):
        before = termios.tcgetattr(leader)
        read_until(leader, lambda seen: b"tokens/s" in seen)
        while termios.tcgetattr(leader) == before:
            time.sleep(0.01)
        os.write(leader, b"x")
        if key is None:
            process.send_signal(signal.SIGINT)
        else:
            os.write(leader, key)
        assert process.wait(300) == 0
        assert termios.tcgetattr(leader)[3] == before[3]
        seen = read_until(leader, lambda seen: False)
    assert b"Traceback" not in seen
    if term == "xterm":
        assert b"\x1b[?1049l" in seen  # the screen that was there before


def test_a_reader_that_leaves_ends_it_quietly(server):
    command = [Path(sys.executable).parent / "pipeline-orch", "top", "--url", server.url]
    process = subprocess.Popen(
        [*command, "--interval", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_measurement_that_nothing_compares_is_said_above_and_in_its_stages_line():
    assert not any("ignored" in line.lower() for line in shown(VIEW))
    stage = VIEW.stages[0].model_copy(update={"evidence": "dev", "ignores_measurements": True})
    lines = shown(VIEW.model_copy(update={"stages": (stage, VIEW.stages[1])}))
    assert "MEASUREMENTS IGNORED" in lines[0]
    (line,) = (line for line in lines if line.split()[:2] == ["0", "0-14"])
    assert "pins ignored" in line
