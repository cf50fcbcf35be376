"""`pipeline-orch pull` and `models` against a hub on loopback, and the names that they give."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from pipeline.cli import pipeline_orch
from pipeline.planning.pulled_models import ModelName, parse_name

REPO = "some-owner/tiny-llama"
MAIN, OLDER = "0" * 39 + "1", "0" * 39 + "2"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that fetching a model uses; each server's class has its own."""

    revisions: dict[str, str]
    files: dict[str, dict[str, bytes]]
    wrong_digest = False
    required_token: str | None = None
    # How much of each answer is sent before the connection is cut.
    cut_at: int | None = None

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        self.asked.append(self.path)
        if self.required_token and self.headers["Authorization"] != f"Bearer {self.required_token}":
            self._status(401, {"X-Error-Code": "GatedRepo"})
        elif found := re.fullmatch(rf"/api/models/{REPO}(?:/revision/(.+))?", self.path):
            self._about(found[1] or "main")
        elif found := re.fullmatch(rf"/api/models/{REPO}/tree/([^?]+)\?.*", self.path):
            held = self.files[self.revisions.get(found[1], found[1])].items()
            tree = [{"type": "file", "path": name, "size": len(body)} for name, body in held]
            self._json([each | {"oid": "0" * 40} for each in tree])
        elif found := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", self.path):
            self._file(self.revisions.get(found[1], found[1]), found[2], with_body)
        else:
            self._status(404, {"X-Error-Code": "RepoNotFound"})

    def _about(self, revision):
        commit = self.revisions.get(revision, revision)
        if commit not in self.files:
            self._status(404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.files[commit]]
        self._json({"id": REPO, "sha": commit, "siblings": siblings})

    def _json(self, value):
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _file(self, commit, name, with_body):
        body = self.files[commit].get(name)
        if body is None:
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        digest = hashlib.sha256(body + b"?" * self.wrong_digest).hexdigest()
        is_large = name.endswith(".safetensors")
        tag = digest if is_large else hashlib.sha1(body).hexdigest()
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
        sent = body[start:] if with_body else b""
        size = len(body) - start
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Content-Length": str(size)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if is_large and self.cut_at is not None:
            sent = sent[: self.cut_at]
            self.close_connection = True
        self._send(206 if start else 200, headers, sent)

    def _status(self, status, headers):
        self._send(status, headers, b"")

    def _send(self, status, headers, body):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def files(tiny_model):
    whole = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    return whole | {"chat_template.jinja": b"{{ messages }}", "generation_config.json": b"{}"}


@pytest.fixture(scope="module")
def sharded(files, tiny_model, tmp_path_factory):
    tensors = load_file(tiny_model / "model.safetensors")
    directory, weight_map = tmp_path_factory.mktemp("sharded"), {}
    names = sorted(tensors)
    for part, kept in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in kept}, directory / file)
        weight_map |= dict.fromkeys(kept, file)
    parts = {path.name: path.read_bytes() for path in directory.iterdir()}
    kept = {name: body for name, body in files.items() if name != "model.safetensors"}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    return kept | parts | index


@pytest.fixture
def hub(files):
    """Starts a hub with the given behaviour: its address, and what it is asked for."""
    servers = []

    def start(of_main=files, **behaviour):
        asked: list[str] = []
        held = {"revisions": {"main": MAIN, "v0.9": OLDER}, "files": {MAIN: of_main, OLDER: files}}
        handler = type("Handler", (Hub,), {"asked": asked} | held | behaviour)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def orch(tmp_path, monkeypatch, capfd):
    """Runs commands in an empty directory with only the given hub settings, and its own cache."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf/hub"))

    def run(*arguments, endpoint="http://127.0.0.1:9", token="", is_offline=False):
        with monkeypatch.context() as patch:
            # What the variables are read into when the library is imported.
            patch.setattr(constants, "ENDPOINT", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
            patch.setenv("HF_TOKEN", token)
            patch.setattr(sys, "argv", ["pipeline-orch", *map(str, arguments)])
            capfd.readouterr()
            with pytest.raises(SystemExit) as ended:
                pipeline_orch.main()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capfd.readouterr())

    return run


def directory_of(result):
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def assert_refused(result, code, *words):
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert all(word in lines[0] for word in words), lines


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_pulled_model_is_planned_cut_listed_and_removed_by_its_name(hub, orch, files, tmp_path):
    unread = {"pytorch_model.bin": b"pickle", "modeling_tiny.py": b"import os", "README.md": b"#"}
    endpoint, _ = hub(of_main=files | unread)
    assert contents(directory_of(orch("pull", REPO, endpoint=endpoint))) == files
    # From here on nobody answers.
    manifest = tmp_path / "manifest.json"
    planned = orch("plan", "--model-dir", REPO, "--stages", 2, "-o", manifest)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(manifest.read_text())["model_name"] == "tiny-llama"
    shards = tmp_path / "shards"
    cut = orch("shard", "--manifest", manifest, "--model-dir", REPO, "--out", shards)
    assert cut.returncode == 0, cut.stderr
    assert (shards / "chat_template.jinja").read_bytes() == files["chat_template.jinja"]
    name, size, where = orch("models").stdout.strip().split("\t")
    assert (name, size.endswith(" MB")) == (REPO, True)
    assert contents(Path(where)) == files
    assert orch("models", "remove", REPO).returncode == 0
    assert orch("models").stdout == ""
    assert_refused(orch("models", "remove", REPO), 2, "no model", REPO)
    again = orch("plan", "--model-dir", REPO, "--stages", 2)
    assert_refused(again, 2, REPO, "pipeline-orch pull")


def test_the_variables_of_the_hubs_library_say_where_and_what(hub, files, tmp_path):
    endpoint, _ = hub(required_token="hf_secret")
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret"}
    command = [Path(sys.executable).with_name("pipeline-orch"), "pull", REPO]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        command, env=kept | settings, capture_output=True, text=True, check=False
    )
    directory = directory_of(result)
    assert contents(directory) == files
    assert directory.is_relative_to(tmp_path / "hf/hub")


def test_a_model_in_several_files_goes_on_where_it_was_cut(hub, orch, sharded):
    cut, _ = hub(of_main=sharded, cut_at=20_000)
    assert_refused(orch("pull", REPO, endpoint=cut), 1, REPO)
    plan = ("plan", "--model-dir", REPO, "--stages", 1)
    assert_refused(orch(*plan), 2, "not been fetched whole", f"pipeline-orch pull {REPO}")
    endpoint, _ = hub(of_main=sharded)
    assert contents(directory_of(orch("pull", REPO, endpoint=endpoint))) == sharded
    assert orch(*plan).returncode == 0


def test_a_revision_is_a_model_of_its_own(hub, orch, files, sharded):
    endpoint, _ = hub(of_main=sharded)
    older = directory_of(orch("pull", f"{REPO}@v0.9", endpoint=endpoint))
    assert contents(older) == files
    assert_refused(orch("plan", "--model-dir", REPO, "--stages", 1), 2, "pipeline-orch pull")
    assert orch("plan", "--model-dir", f"{REPO}@v0.9", "--stages", 1).returncode == 0
    assert orch("models").stdout.startswith(f"{REPO}@v0.9\t")
    offline = directory_of(orch("pull", f"{REPO}@v0.9", is_offline=True))
    assert offline == older
    assert_refused(orch("pull", REPO, is_offline=True), 2, "HF_HUB_OFFLINE")
    assert_refused(orch("pull", f"{REPO}@v7", endpoint=endpoint), 2, "no revision v7")


def test_weights_that_differ_from_the_announced_checksum_are_not_kept(hub, orch, files):
    wrong, _ = hub(wrong_digest=True)
    assert_refused(orch("pull", REPO, endpoint=wrong), 1, "SHA-256", "pull it again")
    assert_refused(orch("plan", "--model-dir", REPO, "--stages", 1), 2, "pipeline-orch pull")
    endpoint, _ = hub()
    assert contents(directory_of(orch("pull", REPO, endpoint=endpoint))) == files


def test_a_token_opens_a_gated_model(hub, orch):
    endpoint, _ = hub(required_token="hf_secret")
    assert_refused(orch("pull", REPO, endpoint=endpoint), 2, endpoint, "HF_TOKEN")
    directory_of(orch("pull", REPO, endpoint=endpoint, token="hf_secret"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config.json": b'{"model_type": "bert"}'}, ["bert"]),
        ({"config.json": b"{"}, ["config.json"]),
        ({"model.safetensors": None}, ["safetensors"]),
        ({"config.json": None}, ["config.json"]),
        (
            {
                "model.safetensors": None,
                "model.safetensors.index.json": b'{"weight_map": {"a": "../../stolen"}}',
            },
            ["outside its directory"],
        ),
    ],
)
def test_what_no_stage_computes_is_refused_before_its_weights_are_fetched(
    hub, orch, files, changes, words
):
    held = {name: body for name, body in (files | changes).items() if body is not None}
    endpoint, asked = hub(of_main=held)
    assert_refused(orch("pull", REPO, endpoint=endpoint), 2, *words)
    assert not [path for path in asked if path.endswith(".safetensors")]


def test_a_shard_that_the_repository_lacks_is_one_line(hub, orch, sharded):
    held = {name: body for name, body in sharded.items() if "00002-of" not in name}
    endpoint, _ = hub(of_main=held)
    assert_refused(orch("pull", REPO, endpoint=endpoint), 1, "lacks files")


def test_what_is_not_there_is_one_line(hub, orch):
    endpoint, _ = hub()
    assert_refused(orch("pull", "no-owner/nothing", endpoint=endpoint), 2, "no-owner/nothing")
    assert_refused(orch("pull", REPO), 1, "cannot reach http://127.0.0.1:9", "HF_ENDPOINT")
    assert_refused(orch("pull", "/no/such/place"), 2, "/no/such/place")
    assert_refused(orch("models", "remove", "../home"), 2, "no model's name")


def test_a_directory_is_copied_and_called_by_its_name(orch, files, tiny_model, tmp_path):
    copy = directory_of(orch("pull", tiny_model))
    name = tiny_model.name
    assert contents(copy) == contents(tiny_model)
    assert not [path for path in copy.iterdir() if path.is_symlink()]
    assert orch("plan", "--model-dir", name, "--stages", 1).returncode == 0
    assert_refused(orch("pull", tiny_model), 2, "exists already")
    assert orch("models").stdout.startswith(f"{name}\t")
    assert orch("models", "remove", name).returncode == 0
    assert not copy.exists()
    out = tmp_path / "written"
    assert directory_of(orch("pull", tiny_model, "--out", out)) == out
    assert (out / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert_refused(orch("pull", tmp_path, "--out", tmp_path / "other"), 2, "config.json")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("gpt2", ModelName("gpt2")),
        ("a/b-1.5_x@refs/pr/1", ModelName("a/b-1.5_x", "refs/pr/1")),
        *[(text, None) for text in ("", "..", "../x", "a/../b", "/a", "a/b/c", "a@", "a b", "a\n")],
    ],
)
def test_no_path_out_of_a_directory_is_a_name(text, name):
    assert parse_name(text) == name
