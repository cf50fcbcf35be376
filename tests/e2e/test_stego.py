"""Messages in texts by the commands and over HTTP, with real processes."""

import json

import httpx
import pytest

from pipeline.cli import pipeline_orch
from pipeline.kernels.kernel_selection import why_not_native
from tests.e2e.conftest import new_cluster

PROMPT = "In the beginning"
MESSAGE = b"\xffmeet\0at nine\n"


@pytest.fixture(scope="module")
def stego(text_model, tmp_path_factory, command_parent):
    directory = tmp_path_factory.mktemp("stego")
    with new_cluster(directory, text_model, command_parent) as cluster:
        cluster.plan(2)
        yield cluster


def start_workers(cluster, *flags):
    for stage in json.loads(cluster.manifest.read_text())["stages"]:
        cluster.start_worker(stage["stage_idx"], *flags)


def run(cluster, what, *arguments, stdin=b""):
    """A command that drives a pipeline: its exit code, stdout and stderr, as bytes."""
    common = ("--manifest", cluster.manifest, "--model-dir", cluster.model_dir, "--dev")
    common += ("--prompt", PROMPT)
    return cluster.orch_command("stego", what, *common, *arguments, stdin=stdin, text=False)


def test_a_message_comes_back_by_the_commands_over_other_stages(stego):
    secret, text = stego.directory / "secret", stego.directory / "text"
    made = stego.orch_command(
        "stego", "keygen", "--out", secret, "--manifest", stego.manifest,
        "--model-dir", stego.model_dir, "--temperature", "0.9",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    start_workers(stego, "--once")
    written = run(stego, "encode", "--secret-file", secret, "--out", text, stdin=MESSAGE)
    assert written.returncode == 0, written.stderr
    assert written.stdout == b""
    assert b"bits a token" in written.stderr
    assert b"not as the secret's fingerprint" not in written.stderr
    assert "float32" in (stego.directory / "secret.fingerprint.json").read_text()
    stego.plan(3)
    start_workers(stego, "--threads", "2")
    read = run(
        stego, "decode", "--secret-file", secret,
        stdin=text.read_bytes().rstrip() + b"\n\n",
    )  # fmt: skip
    assert (read.returncode, read.stdout) == (0, MESSAGE), read.stderr
    wrong = run(stego, "decode", "--secret-file", secret, "--temperature", "1", "--in", text)
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert wrong.stderr.count(b"error:") == 1
    assert b"altered text; temperature is 1.0, and was 0.9" in wrong.stderr
    for output in (written.stderr, read.stderr, wrong.stderr):
        assert b"meet" not in output
        assert PROMPT.encode() not in output


@pytest.mark.slow  # tests/pipeline/gateway/http/test_stego.py has it without processes
@pytest.mark.skipif(why_not_native() is not None, reason="no native kernels")
def test_a_message_comes_back_over_http(stego):
    stego.end_workers()
    stego.plan(2)
    start_workers(stego)
    server = stego.serve()
    wish = {"prompt": PROMPT, "passphrase": "correct horse"}

    def post(what, **body):
        return httpx.post(f"{server.url}/v1/stego/{what}", json=wish | body, timeout=300)

    answer = post("encode", message="grüße").raise_for_status().json()
    assert post("decode", text=answer["text"]).raise_for_status().json()["message"] == "grüße"
    wrong = post("decode", text=answer["text"], passphrase="wrong donkey")
    assert wrong.status_code == 400
    assert "wrong secret" in wrong.json()["error"]["message"]
    assert not any(word in server.log() for word in ("grüße", "correct horse", PROMPT))
    server.stop()


@pytest.mark.parametrize(("arguments", "what"), [
    (["encode", "--message", "a", "--secret-file", "S"], "missing --prompt"),
    (["encode", "--message", "a", "--prompt", "p"], "secret is missing"),
    (["encode", "--message", "a", "--prompt", "p", "--secret-file", "none"], "No such file"),
    (["encode", "--message", "", "--prompt", "p", "--secret-file", "S"], "empty"),
    (["encode", "--message", "a", "--in", "b", "--prompt", "p", "--secret-file", "S"], "exclude"),
    (["encode", "--in", "BIG", "--prompt", "p", "--secret-file", "S"], "larger than 65536"),
    (["encode", "--message", "a", "--prompt", "", "--secret-file", "S"], "prompt is empty"),
    (["encode", "--message", "a", "--prompt", "p", "--secret-file", "BIG"], "no secret"),
    (["encode", "--message", "a", "--prompt", "p", "--secret-file", "S", "--temperature", "0"],
     "only the most likely"),
    (["encode", "--message", "a", "--prompt", "p", "--secret-file", "S", "--top-k", "1"],
     "only the most likely"),
    (["encode", "--message", "a", "--prompt", "p", "--secret-file", "S", "--codec", "morse"],
     "no codec 'morse'"),
    (["encode", "--message", "a", "--prompt", "p", "--secret-file", "S", "--temperature", "9"],
     "temperature is 9"),
    (["decode", "--in", "none", "--prompt", "p", "--secret-file", "S"], "cannot read none"),
    (["decode", "--in", "BINARY", "--prompt", "p", "--secret-file", "S"], "not UTF-8"),
])  # fmt: skip
def test_bad_input_is_one_line_before_anything_starts(
    stego, command, arguments, what, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, content in (("S", bytes(32)), ("BIG", bytes(1 << 17)), ("BINARY", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    code, line = command(
        pipeline_orch, "stego", *arguments, "--manifest", stego.manifest,
        "--model-dir", stego.model_dir, "--supervise", "--dev",
    )  # fmt: skip
    assert code == 2
    assert what in line


def test_keygen_overwrites_no_secret(stego, command, tmp_path):
    path = tmp_path / "secret"
    path.touch()
    code, line = command(pipeline_orch, "stego", "keygen", "--out", path)
    assert code == 2
    assert "File exists" in line
    assert list(tmp_path.iterdir()) == [path]
