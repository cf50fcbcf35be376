"""Everything a user can get wrong ends in one clear line and the right exit code."""

import json
import shutil
import socket
import struct
import sys
from pathlib import Path

import pytest

from pipeline.cli import pipeline_orch, stage_worker
from tests.e2e.conftest import expect


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
        expect(result, 2, "--dtype int12", "float32, bfloat16, int8, int4")


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
    expect(command(pipeline_orch), 2, "--manifest, --text")
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
        (lambda m: m["stages"][0].update(weight_hashes=[]), ["require_weight_hashes", "plan"]),
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


def test_plans_that_no_manifest_can_hold(command, cluster):
    def plan(*extra):
        return command(pipeline_orch, "plan", "--model-dir", cluster.model_dir, *extra)

    expect(plan("--stages", "2", "--base-port", "65535"), 2, "65536")
    expect(plan("--stages", "2", "--orchestrator-key", "zz"), 2, "'zz'")
    expect(plan("--stages", "2", "--host", "a b"), 2, "'a b'")
    expect(plan("--stages", "2", "--host", ""), 2, "':9000'")
    for path in (cluster.manifest / "x.json", "a" * 300, ".", "/"):
        expect(plan("--stages", "2", "-o", path), 2, f"cannot write {path}")


LONG = "a" * 300  # more than a file system's names may have
ENDLESS = "/dev/zero"


@pytest.mark.parametrize("path", [LONG, "a/" * 3000, "nowhere", "new\nline", "\udcff", "", ENDLESS])
def test_a_path_may_be_anything(command, cluster, path):
    cluster.plan(1)
    manifest, model = cluster.manifest, cluster.model_dir
    orch = ["--manifest", manifest, "--dev", "--connect-timeout", "0.1"]
    for arguments in (
        [*orch, "--tokenizer", path, "--text", "Hi"],
        [*orch, "--tokenizer", model / "tokenizer.json", "--text-file", path],
        ["plan", "--stages", "2", "--model-dir", path],
        ["shard", "--manifest", path, "--model-dir", model, "--out", "out"],
        ["shard", "--manifest", manifest, "--model-dir", path, "--out", "out"],
        ["serve", "--manifest", manifest, "--dev", "--model-dir", path],
        ["serve", "--manifest", manifest, "--dev", "--model-dir", model, "--api-key-file", path],
        ["top", "--once", "--url", "http://127.0.0.1:1", "--api-key-file", path],
        ["attest", "show", path],
        ["attest", "verify", manifest, "--root", path],
    ):
        expect(command(pipeline_orch, *arguments), 2)
    expect(command(stage_worker, "--manifest", manifest, "--stage-idx", 0, "--model-dir", path), 2)


@pytest.mark.parametrize("path", [LONG, "a/" * 3000, ENDLESS, "/", "."])
def test_an_output_path_may_be_anything(command, cluster, path):
    cluster.plan(1)
    expect(command(pipeline_orch, *cluster.arguments("Hi", "--latency-out", path)), 2)
    for name, rest in (("plan", ("--stages", "2")), ("shard", ("--manifest", cluster.manifest))):
        result = command(pipeline_orch, name, *rest, "--model-dir", cluster.model_dir, "-o", path)
        expect(result, 2)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-1", "", "x", "9" * 5000, "1e999"])
def test_a_number_must_be_one(command, cluster, worker, number):
    expect(worker("--kv-memory", number), 2, "--kv-memory")
    for flag in ("--connect-timeout", "--hang-timeout", "--max-tokens", "--data-out-port"):
        expect(command(pipeline_orch, *cluster.arguments("Hi", flag, number)), 2, flag)
    serve = ("serve", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir)
    for flag in ("--prefix-share", "--prefix-ttl"):
        expect(command(pipeline_orch, *serve, flag, number), 2, flag)
    expect(command(pipeline_orch, "top", "--once", "--interval", number), 2, "--interval")
    expect(command(pipeline_orch, "plan", "--model-dir", ".", "--stages", number), 2, "--stages")


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)  # fmt: skip
@pytest.mark.parametrize("leads_to", [LONG, "nowhere", ".", ENDLESS])
def test_a_model_whose_file_leads_nowhere(cluster, command, file, leads_to):
    cluster.plan(1)
    path = cluster.model_dir / file
    path.unlink(missing_ok=True)
    path.symlink_to(leads_to)
    model, manifest = cluster.model_dir, cluster.manifest
    # With each file that is needed gone, each command says so; without the others it goes on, and
    # finds that nobody can listen there.
    nobody = ("--control-listen", "0.0.0.1:1")
    for module, arguments in (
        (stage_worker, ["--manifest", manifest, "--stage-idx", 0, "--model-dir", model, *nobody]),
        (pipeline_orch, ["serve", "--manifest", manifest, "--model-dir", model,
                         "--data-out-listen", "0.0.0.1:1", "--port", "0"]),
    ):  # fmt: skip
        expect(command(module, *arguments, "--dev"), 2)
