"""Development mode: what a manifest demands is not looked past without being told to, by name."""

import logging
import sys

import pytest

from pipeline.agreement.addresses import StageEndpoint, UnixAddress
from pipeline.agreement.manifest import dump_manifest
from pipeline.cli import door_server, linear_worker, part_worker, pipeline_orch, stage_worker
from pipeline.doors.served_shard import ShardOptions, load_door
from pipeline.errors import PolicyError
from pipeline.planning.plan import PlanOptions, plan
from transport.dial_and_listen import TcpEndpoint

PINS = {0: "ab" * 48, 2: "cd" * 48}
PLANS = {
    "stages": PlanOptions(2),
    "client": PlanOptions(1, split="client"),
    "attention": PlanOptions(1, part=("attention", TcpEndpoint("127.0.0.1", 9), None)),
    "linear": PlanOptions(1, part=("linear", TcpEndpoint("127.0.0.1", 9), None)),
}
PROMPT = ("--tokenizer", "{model}/tokenizer.json", "--text", "x", "--connect-timeout", "0.1")
MODEL = ("--model-dir", "{model}")
COMMANDS = {
    "generate": (pipeline_orch, (), "stages", PROMPT),
    "serve": (pipeline_orch, ("serve",), "stages", (*MODEL, "--port", "0")),
    "chat": (pipeline_orch, ("chat",), "stages", MODEL),
    "stego": (pipeline_orch, ("stego", "encode"), "stages",
              (*MODEL, "--prompt", "x", "--message", "y", "--passphrase-file", "{phrase}")),
    "supervise": (pipeline_orch, (), "stages", (*PROMPT, *MODEL, "--supervise")),
    "behind a door": (pipeline_orch, (), "client", (*PROMPT, "--door", "grpc://127.0.0.1:9")),
    "stage": (stage_worker, (), "stages", (*MODEL, "--stage-idx", "0")),
    "attention": (part_worker, (), "attention", ()),
    "linear": (linear_worker, (), "linear", MODEL),
    "door": (door_server, (), "client", (*MODEL, "--grpc", "127.0.0.1:0")),
}  # fmt: skip


@pytest.fixture
def pinned(tiny_model, tmp_path, monkeypatch):
    """Writes a manifest of that kind whose last stage's measurements are pinned."""
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(tmp_path / "dev"))
    (tmp_path / "phrase").write_text("a passphrase that is long enough")
    (tmp_path / "phrase").chmod(0o600)

    def write(kind):
        manifest = plan(tiny_model, PLANS[kind])
        *others, last = manifest.stages
        # A socket that nobody has made: nothing answers there, whatever else runs.
        nowhere = UnixAddress(type="unix", path=str(tmp_path / "nowhere"))
        endpoint = StageEndpoint(control=nowhere, data_in=nowhere, data_out=nowhere)
        others = [each.model_copy(update={"endpoint": endpoint}) for each in others]
        last = last.model_copy(update={"expected_measurements": PINS, "endpoint": endpoint})
        path = tmp_path / "manifest.json"
        path.write_text(dump_manifest(manifest.model_copy(update={"stages": (*others, last)})))
        return path

    return write


@pytest.fixture
def run(pinned, tiny_model, tmp_path, monkeypatch, capfd):
    """Runs one of the commands on a pinned manifest: (exit code, the lines on stderr)."""

    def run(name, *flags):
        module, words, kind, own = COMMANDS[name]
        own = [each.format(model=tiny_model, phrase=tmp_path / "phrase") for each in own]
        line = ["command", *words, "--manifest", str(pinned(kind)), *own, *flags]
        monkeypatch.setattr(sys, "argv", line)
        # The command's own, and none of pytest's.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        with pytest.raises(SystemExit) as caught:
            module.main()
        return caught.value.code, capfd.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_pinned_measurements_are_named_and_not_looked_past(run, name):
    code, lines = run(name, "--dev")
    assert code == 2
    last = 1 if COMMANDS[name][2] == "stages" else 0
    assert f"stage {last}'s PCR 0, 2" in lines[-1]
    assert "--ignore-measurements" in lines[-1]
    assert not any("development_mode" in line for line in lines if name != "door")


@pytest.mark.parametrize("name", COMMANDS)
def test_ignoring_them_outside_of_development_is_refused(run, name):
    code, lines = run(name, "--ignore-measurements")
    assert code == 2
    assert lines[-1].endswith("--ignore-measurements goes with --dev; without it they are compared")


def test_who_means_it_goes_on_and_is_told_so_in_every_line(run):
    code, lines = run("generate", "--dev", "--ignore-measurements")
    *status, last = lines
    assert code == 1
    assert "gave up" in last
    assert any("event=measurements_ignored" in line and "PCR 0, 2" in line for line in status)
    assert status
    assert all("measurements=ignored" in line for line in status)


def test_a_door_of_another_program_does_not_look_past_them_either(pinned, tiny_model):
    options = ShardOptions(tiny_model, pinned("client"), is_dev=True)
    with pytest.raises(PolicyError, match="stage 0's PCR 0, 2"):
        load_door(options)
    assert load_door(ShardOptions(tiny_model, options.manifest, True, True)).shard
