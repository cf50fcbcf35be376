"""Everything a user can get wrong ends in one clear line and the right exit code."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.cli import common, logs, pipeline_orch, stage_worker

BIN = Path(sys.executable).parent


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs a console command in this process: (exit code, stderr lines with 'error:')."""

    def run(module, *arguments):
        name = "stage-worker" if module is stage_worker else "pipeline-orch"
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            module.main()
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        errors = [line for line in stderr.splitlines() if f"{name}: error:" in line]
        assert len(errors) == 1, stderr
        return caught.value.code, errors[0]

    return run


@pytest.fixture
def worker(command, cluster):
    cluster.plan(2)

    def run(*extra, stage_idx=0, manifest=None, dev=True):
        return command(
            stage_worker, "--manifest", manifest or cluster.manifest, "--stage-idx", stage_idx,
            "--model-dir", cluster.model_dir, *(["--dev"] if dev else []), *extra,
        )  # fmt: skip

    return run


@pytest.fixture
def orch(command, cluster):
    cluster.plan(1)

    def run(text="Hi", *extra):
        return command(pipeline_orch, *cluster.arguments(text, *extra))

    return run


def expect(result, code, *words):
    assert result[0] == code, result[1]
    for word in words:
        assert word in result[1]


def test_a_precision_the_manifest_contradicts(command, worker, cluster, tmp_path):
    fields = json.loads(Path(cluster.manifest).read_text())
    for stage in fields["stages"]:
        stage["precision"] = "int8"
    pinned = tmp_path / "pinned.json"
    pinned.write_text(json.dumps(fields))
    expect(worker("--dtype", "float32", manifest=pinned), 2, "--dtype float32", "int8", "agree")
    for arguments in (("plan", "--stages", "2"), ("shard", "--manifest", pinned, "--out", "out")):
        result = command(
            pipeline_orch, *arguments, "--model-dir", cluster.model_dir, "--dtype", "int12"
        )
        expect(result, 2, "--dtype int12", "float32, bfloat16, int8")


def test_sampling_that_makes_no_sense(orch):
    for flag, value, *words in (
        ("--temperature", "2.5", "temperature is 2.5", "from 0 to 2"),
        ("--temperature", "-1", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--temperature", "warm", "--temperature"),
        ("--top-p", "1.01", "top_p", "from 0 to 1"),
        ("--top-k", "-2", "top_k"),
        ("--min-p", "inf", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--presence-penalty", "3", "presence_penalty", "from -2 to 2"),
        ("--frequency-penalty", "-3", "frequency_penalty"),
        ("--seed", "1e3", "--seed"),
        ("--seed", str(1 << 70), "seed"),
        ("--stop", "", "stop strings"),
        ("--chooser", "dice", "'dice'", "draw, greedy, mirostat"),
        ("--chooser", "mirostat", "temperature above 0"),
        ("--chooser", "mirostat:tau=x", "tau is 'x'"),
    ):
        expect(orch("Hi", flag, value), 2, *words)


def test_usage_errors(command, worker, orch):
    expect(command(stage_worker), 2, "--manifest")
    expect(command(pipeline_orch), 2, "--manifest, --tokenizer, --text")
    expect(worker("--threads", "0"), 2, "--threads", "1")
    for cpus in ("one", "", "0-", "3-1", "0,3-1", "0,0", "0-1,1"):
        expect(worker("--cpus", cpus), 2, f"--cpus {cpus}")
    expect(worker("--cpus", "0", "--threads", "2"), 2, "1 CPUs for --threads 2")
    expect(worker("--cpus", "9999"), 2, "CPU 9999", "may use")
    expect(worker("--colour", "red"), 2, "--colour")
    expect(worker("--device", "abacus"), 2, "abacus", "cpu, cuda or cuda:N")
    expect(worker("--device", "cuda:99"), 2, "--device cuda:99: ")
    expect(worker("--dtype", "float12"), 2, "float12", "float32")
    expect(worker("--kernels", "fast"), 2, "--kernels fast", "native", "torch")
    expect(worker("--control-listen", "nowhere"), 2, "--control-listen", "nowhere")
    expect(orch("Hi", "--max-tokens", "none"), 2, "--max-tokens", "integer")
    expect(orch("Hi", "--latency-out", "/nowhere/at/all.json"), 2, "/nowhere/at")
    for directory in ("/", ".", "/tmp", "/dev/null"):
        expect(orch("Hi", "--latency-out", directory), 2, f"cannot write {directory}")
    expect(
        command(pipeline_orch, "plan", "--model-dir", "/nowhere", "--stages", "2"), 2, "/nowhere"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(colour=1), ["unknown field 'colour'"]),
        (lambda m: m["stages"][1].update(layer_start=3), ["gap", "3"]),
        (lambda m: m["stages"][1].update(layer_start=1), ["overlap"]),
        (lambda m: m["stages"][1].update(stage_idx=4), ["stage_idx 4"]),
        (lambda m: m.update(total_layers=9), ["expected 9 layers"]),
        (lambda m: m["stages"][0]["endpoint"]["control"].update(addr="x"), ["'x'"]),
        (lambda m: m["stages"][0].update(weight_hashes=["0" * 64]), ["sha", "0" * 64]),
        (lambda m: m["stages"][0].update(weight_hashes=[]), ["requires weight hashes"]),
        (lambda m: m["stages"][0].update(weight_hashes=["0" * 64] * 2), ["2", "1"]),
        (lambda m: m.update(config_hash="0" * 64), ["config.json", "0" * 64]),
        (lambda m: m["activation_spec"].update(hidden_dim=99), ["99", "64"]),
    ],
)
def test_a_manifest_that_cannot_be_served(worker, cluster, change, words):
    code, line = worker(manifest=cluster.edit(change, cluster.directory / "bad.json"))
    assert code == 2, line
    for word in words:
        assert word.lower() in line.lower()


def test_a_manifest_that_cannot_be_read(worker, cluster):
    expect(worker(manifest="/nowhere.json"), 2, "/nowhere.json")
    bad = cluster.directory / "bad.json"
    bad.write_text("{")
    expect(worker(manifest=bad), 2, "bad.json", "not JSON")
    expect(worker(manifest=cluster.directory), 2, str(cluster.directory))
    expect(worker(stage_idx=2), 2, "2", "0 to 1")
    expect(worker(stage_idx=-1), 2, "-1")


def weights_file(cluster):
    return cluster.model_dir / "model.safetensors"


def without_hashes(manifest):
    for stage in manifest["stages"]:
        stage.update(weight_hashes=[], require_weight_hashes=False)
    manifest.pop("config_hash")


def rewrite_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_model_directories_that_cannot_be_served(worker, cluster):
    cluster.edit(without_hashes)
    path = weights_file(cluster)
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    expect(worker(), 2, "model.safetensors", "truncated")
    path.write_bytes(good[:4])
    expect(worker(), 2, "model.safetensors")
    path.write_bytes(b"\xff" * 64)
    expect(worker(), 2, "model.safetensors")
    path.write_bytes(good)
    norm = "model.layers.0.input_layernorm.weight"
    rewrite_header(path, lambda header: header.update(other=header.pop(norm)))
    expect(worker(), 2, norm, "missing")
    path.write_bytes(good)
    rewrite_header(path, lambda header: header[norm].update(shape=[8, 8]))
    expect(worker(), 2, norm, "64")
    path.unlink()
    expect(worker(), 2, "model.safetensors")
    config = cluster.model_dir / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "model_type": "mamba"}))
    expect(worker(), 2, "mamba")
    config.write_text("{")
    expect(worker(), 2, "config.json")
    shutil.rmtree(cluster.model_dir)
    expect(worker(), 2, "config.json")


def test_a_port_in_use(worker, cluster, orch):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        expect(worker("--control-listen", f"127.0.0.1:{port}"), 2, str(port), "in use")
        expect(orch("Hi", "--data-out-listen", f"127.0.0.1:{port}"), 2, str(port), "in use")


def test_prompts_and_tokenizers(orch, cluster):
    expect(orch(""), 2, "prompt is empty")
    expect(orch("x" * 5000), 2, "5000", "4096")
    tokenizer = cluster.model_dir / "tokenizer.json"
    tokenizer.write_text("{}")
    expect(orch(), 2, "tokenizer.json")
    tokenizer.unlink()
    expect(orch(), 2, "tokenizer.json")


def test_nothing_starts_without_protection_unless_development_says_so(command, cluster, worker):
    arguments = [each for each in cluster.arguments() if each != "--dev"]
    expect(command(pipeline_orch, *arguments), 2, "expected_measurements", "--dev")
    expect(worker(dev=False), 2, "orchestrator_keys")
    cluster.edit(lambda m: m["stages"][0].update(weight_hashes=[]))
    expect(worker(dev=False), 2, "weight_hashes")

    def pin(manifest):
        for stage in manifest["stages"]:
            stage["expected_measurements"] = {"0": "ab" * 48}
            stage["weight_hashes"] = ["ab" * 32]

    cluster.edit(pin)
    expect(command(pipeline_orch, *arguments), 2, "--identity")
    expect(command(pipeline_orch, *arguments, "--identity", "/nowhere.pem"), 2, "/nowhere.pem")
    not_a_key = cluster.directory / "not.pem"
    not_a_key.write_text("hello")
    expect(command(pipeline_orch, *arguments, "--identity", not_a_key), 2, "not.pem")


def test_keygen_makes_a_private_file_once(command, cluster, capfd, monkeypatch):
    path = cluster.directory / "key.pem"
    monkeypatch.setattr(sys, "argv", ["pipeline-orch", "keygen", str(path)])
    with pytest.raises(SystemExit) as caught:
        pipeline_orch.main()
    assert caught.value.code == 0
    assert len(bytes.fromhex(capfd.readouterr().out.strip())) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    expect(command(pipeline_orch, "keygen", path), 2, "key.pem")


def test_development_evidence_is_refused_where_it_is_not_allowed(command, cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    key = cluster.directory / "key.pem"
    assert cluster.orch_command("keygen", key).returncode == 0
    cluster.edit(lambda m: m["stages"][0].update(expected_measurements={"0": "ab" * 48}))
    cluster.wait_for_log(0, "event=listening")
    arguments = [each for each in cluster.arguments() if each != "--dev"]
    code, line = command(pipeline_orch, *arguments, "--identity", key)
    assert code == 1, line
    assert "stage 0" in line
    assert "DEV" in line


def test_manifests_that_differ_are_told_apart_before_the_prompt_leaves(command, cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    cluster.wait_for_log(0, "event=listening")
    cluster.edit(lambda m: m.update(model_version="2"))
    code, line = command(pipeline_orch, *cluster.arguments())
    assert code == 1, line
    assert "manifest" in line


@contextmanager
def impostor(port, behave):
    """Something that is not veilpipe where stage 0 should be."""
    held = []
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve():
            try:
                while True:
                    sock, _ = server.accept()
                    held.append(sock)
                    behave(sock)
            except OSError:
                pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for sock in held:
                sock.close()


@pytest.mark.parametrize(
    ("behave", "word"),
    [
        (lambda sock: sock.close(), "closed"),
        (lambda sock: (sock.recv(10), sock.close()), "stage 0"),
        (lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100), "stage 0"),
        (lambda sock: sock.sendall(b"\xff" * 70_000), "stage 0"),
        (lambda sock: sock.sendall(b"\0" * 70_000), "stage 0"),
        (lambda sock: None, "silent"),
    ],
    ids=["closes", "closes-later", "http", "ones", "zeros", "silent"],
)
def test_a_peer_that_is_not_veilpipe(orch, cluster, monkeypatch, behave, word):
    monkeypatch.setattr("pipeline.protocol.peers.HANDSHAKE_SECONDS", 1.0)
    with impostor(cluster.base_port, behave):
        code, line = orch("Hi", "--connect-timeout", "5")
    assert code == 1
    assert "stage 0" in line


def test_stages_that_never_come_up(orch, cluster):
    code, line = orch("Hi", "--connect-timeout", "0.5")
    assert code == 1
    assert "stage 0" in line
    assert f"127.0.0.1:{cluster.base_port}" in line


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 70_000, b"\0\x20"])
def test_a_worker_survives_strangers_and_still_serves(cluster, garbage):
    cluster.plan(1)
    cluster.start_worker(0)
    cluster.wait_for_log(0, "event=listening")
    strangers = []
    for port in (cluster.base_port, cluster.base_port + 1):
        for _ in range(5):
            sock = socket.create_connection(("127.0.0.1", port))
            try:
                sock.sendall(garbage)
            except OSError:
                pass  # the worker has hung up already
            strangers.append(sock)
    result = cluster.orch("Hi", "--max-tokens", "3")
    for sock in strangers:
        sock.close()
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in cluster.log(0)


def test_plans_that_no_manifest_can_hold(command, cluster):
    def plan(*extra):
        return command(pipeline_orch, "plan", "--model-dir", cluster.model_dir, *extra)

    expect(plan("--stages", "2", "--base-port", "65535"), 2, "65536")
    expect(plan("--stages", "2", "--orchestrator-key", "zz"), 2, "'zz'")
    expect(plan("--stages", "2", "--host", "a b"), 2, "'a b'")
    expect(plan("--stages", "2", "--host", ""), 2, "':9000'")
    for path in (cluster.manifest / "x.json", "a" * 300, ".", "/"):
        expect(plan("--stages", "2", "-o", path), 2, f"cannot write {path}")


SHELL = {"full": '"$@" >/dev/full', "closed": '"$@" >&-'}


@pytest.mark.parametrize("redirection", SHELL.values(), ids=SHELL)
@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--stages", "2", "--model-dir"]], ids=["help", "plan"]
)
def test_output_that_cannot_be_written_is_one_line(cluster, redirection, arguments):
    if arguments[-1] == "--model-dir":
        arguments = [*arguments, cluster.model_dir]
    result = subprocess.run(
        ["sh", "-c", redirection, "sh", BIN / "pipeline-orch", *arguments],
        capture_output=True, text=True, env=cluster.environment, timeout=90,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("pipeline-orch: error: cannot write to stdout: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_worker_needs_no_output_to_say_what_is_wrong(cluster):
    result = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", BIN / "stage-worker", "--stage-idx", "0",
         "--manifest", "/nowhere.json", "--model-dir", "/nowhere"],
        capture_output=True, text=True, env=cluster.environment, timeout=90,
    )  # fmt: skip
    assert result.returncode == 2
    assert "/nowhere.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def broken_command(monkeypatch, capfd):
    """Runs a command with a bug in it: (exit code, stderr)."""

    def run(*flags):
        app = common.new_app()

        @app.command()
        def broken(verbose: bool = False):
            raise KeyError("the prompt")

        monkeypatch.setattr(sys, "argv", ["stage-worker", *flags])
        with pytest.raises(SystemExit) as caught:
            common.run_app(app, "stage-worker")
        return caught.value.code, capfd.readouterr().err

    return run


def test_a_bug_is_one_line_that_says_where_and_quotes_nothing(broken_command):
    code, err = broken_command()
    assert code == 1
    assert "stage-worker: error: internal error: KeyError: in test_bad_input.py line" in err
    assert "--verbose" in err
    assert "prompt" not in err
    assert len(err.splitlines()) == 1


def test_a_bug_is_traced_when_asked(broken_command):
    code, err = broken_command("--verbose")
    assert code == 1
    assert "Traceback" in err
    assert "internal error" in err.splitlines()[-1]


def test_text_from_elsewhere_cannot_drive_the_terminal():
    forged = "peer said\x1b]0;owned\x07\r\npipeline-orch: error: \u202e\udcff\x9b"
    shown = logs.printable(forged)
    assert shown == r"peer said\x1b]0;owned\x07 pipeline-orch: error: \u202e\udcff\x9b"
    assert shown.isprintable()
    assert len(logs.printable("x\x1b" * 10**6)) <= logs.MAX_SHOWN + 1


# Stands in for seconds of importing: says when it has begun, and never ends by itself.
SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "numpy" or name == "typer":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
from pipeline.cli import entry
entry.{command}()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
@pytest.mark.parametrize("command", ["stage_worker", "pipeline_orch"])
def test_a_signal_during_the_imports_ends_a_command_quietly(command, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT.format(command=command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert stderr == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_a_signal_while_a_worker_loads_ends_it_quietly(cluster, number):
    cluster.plan(1)
    config = cluster.model_dir / "config.json"
    config.unlink()
    os.mkfifo(config)  # opening it for writing waits until the worker reads
    worker = cluster.start_worker(0)
    with config.open("wb"):
        worker.send_signal(number)
        assert worker.wait(20) == 128 + number
    assert "Traceback" not in cluster.log(0)
    assert "error" not in cluster.log(0)


def test_a_shard_that_is_interrupted_leaves_nothing_behind(cluster):
    cluster.plan(1)
    config = cluster.model_dir / "config.json"
    config.unlink()
    os.mkfifo(config)
    process = subprocess.Popen(
        [BIN / "pipeline-orch", "shard", "--manifest", cluster.manifest,
         "--model-dir", cluster.model_dir, "-o", cluster.directory / "shards"],
        env=cluster.environment,
    )  # fmt: skip
    before = {"model", "manifest.json"}
    with config.open("wb"):
        assert {each.name for each in cluster.directory.iterdir()} > before
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert {each.name for each in cluster.directory.iterdir()} == before
