"""scripts/fetch_hub.py against a hub on loopback, and download_model.sh's refusals."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPO = "openai-community/gpt2"
COMMIT = "0" * 39 + "1"
FILES = {
    "config.json": json.dumps({"model_type": "gpt2"}).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 64,
    "merges.txt": b"#version: 0.2\n",
}

pytest.importorskip("huggingface_hub", reason="needs the download extra")


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a file download uses: HEAD and GET of /REPO/resolve/..."""

    files = FILES
    wrong_digest = False
    required_token: str | None = None

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        prefix = f"/{REPO}/resolve/main/"
        name = self.path.removeprefix(prefix)
        if self.required_token and self.headers["Authorization"] != f"Bearer {self.required_token}":
            self._status(401, {"X-Error-Code": "GatedRepo"})
        elif not self.path.startswith(prefix):
            self._status(404, {"X-Error-Code": "RepoNotFound"})
        elif name not in self.files:
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._file(name, with_body)

    def _file(self, name, with_body):
        body = self.files[name]
        digest = hashlib.sha256(body + b"?" * self.wrong_digest).hexdigest()
        is_large = name.endswith(".safetensors")
        tag = digest if is_large else hashlib.sha1(body).hexdigest()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _status(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    """A hub with the given behaviour; its address."""
    servers = []

    def start(**behaviour):
        handler = type("Handler", (Hub,), behaviour)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetch(tmp_path):
    """Run fetch_hub.py with only the given hub settings."""

    def run(directory, **settings):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = kept | {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, ROOT / "scripts/fetch_hub.py", REPO, directory],
            capture_output=True,
            text=True,
            check=False,
            env=environment | settings,
        )

    return run


def assert_one_line_error(result, *words):
    lines = [line for line in result.stderr.splitlines() if line.startswith("fetch_hub: error:")]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert all(word in lines[0] for word in words), lines


def test_files_arrive_whole_from_the_endpoint_asked_for(serve, fetch, tmp_path):
    result = fetch(tmp_path / "model", HF_ENDPOINT=serve())
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == FILES


def test_a_cached_model_is_found_offline(serve, fetch, tmp_path):
    assert fetch(tmp_path / "first", HF_ENDPOINT=serve()).returncode == 0
    result = fetch(tmp_path / "second", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == FILES


def test_a_token_opens_a_gated_model(serve, fetch, tmp_path):
    endpoint = serve(required_token="hf_secret")
    refused = fetch(tmp_path / "model", HF_ENDPOINT=endpoint)
    assert_one_line_error(refused, endpoint, "401", "HF_TOKEN")
    result = fetch(tmp_path / "model", HF_ENDPOINT=endpoint, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr


def test_weights_that_differ_from_the_announced_checksum_are_refused(serve, fetch, tmp_path):
    result = fetch(tmp_path / "model", HF_ENDPOINT=serve(wrong_digest=True))
    assert_one_line_error(result, "model.safetensors has SHA-256")


def test_a_missing_file_is_named(serve, fetch, tmp_path):
    without = {name: body for name, body in FILES.items() if name != "tokenizer.json"}
    assert_one_line_error(fetch(tmp_path / "model", HF_ENDPOINT=serve(files=without)), REPO)


def test_an_unreachable_hub_is_one_line(fetch, tmp_path):
    result = fetch(tmp_path / "model", HF_ENDPOINT="http://127.0.0.1:9")
    assert_one_line_error(result, "cannot reach http://127.0.0.1:9", "HF_ENDPOINT")


def test_nothing_cached_and_offline_is_one_line(fetch, tmp_path):
    assert_one_line_error(fetch(tmp_path / "model", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


def download(*arguments):
    return subprocess.run(
        ["bash", ROOT / "scripts/download_model.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_model_is_refused():
    result = download("gpt5")
    assert result.returncode == 2
    assert "unknown model 'gpt5'; use smollm2 or gpt2" in result.stderr


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    result = download("smollm2", tmp_path)
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_finished_download_is_not_fetched_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "SHA256SUMS").write_text("")
    result = download("gpt2", tmp_path)
    assert result.returncode == 0
    assert "is ready" in result.stderr
