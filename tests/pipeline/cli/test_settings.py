"""Settings from flags and the environment: a flag beats a variable, errors name what counted."""

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import pydantic
import pytest
import typer

from pipeline.cli import linear_worker, machine, part_worker, pipeline_orch, stage_worker
from pipeline.cli import settings as settings_module
from pipeline.cli.chat_flags import ChatFlags
from pipeline.cli.cluster_flags import JoinFlags, PartsFlags, PushFlags
from pipeline.cli.door_server import DoorServerFlags
from pipeline.cli.generate_flags import GenerateFlags
from pipeline.cli.linear_worker import LinearFlags
from pipeline.cli.machine_flags import MachineFlags, OfferFlags
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.ray_flags import PlaceRayFlags
from pipeline.cli.serve_flags import ServeFlags
from pipeline.cli.settings import takes_flags
from pipeline.cli.stego_flags import DecodeFlags, EncodeFlags, KeygenFlags
from pipeline.cli.top_flags import TopFlags
from pipeline.cli.worker_flags import WorkerFlags
from pipeline.errors import InputError


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Runs a command: (exit code, stderr's last line)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments, **variables):
        name = "stage-worker" if module is stage_worker else "pipeline-orch"
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, str(value))
            with pytest.raises(SystemExit) as caught:
                module.main()
        out, err = capfd.readouterr()
        return caught.value.code, (err or out).splitlines()[-1]

    return run


def test_variables_stand_for_flags_of_either_command(run):
    for module in (pipeline_orch, stage_worker):
        more = ["--tokenizer", "t", "--text", "x"] if module is pipeline_orch else []
        more = more or ["--stage-idx", 0, "--model-dir", "m"]
        code, line = run(module, *more, VEILPIPE_MANIFEST="nowhere.json")
        assert code == 2
        assert "cannot read manifest nowhere.json" in line
        assert "VEILPIPE_MANIFEST" in line


def test_a_flag_beats_its_variable(run):
    arguments = ("--manifest", "flag.json", "--stage-idx", 0, "--model-dir", "m")
    code, line = run(stage_worker, *arguments, VEILPIPE_MANIFEST="variable.json")
    assert code == 2
    assert "flag.json" in line
    assert "VEILPIPE" not in line


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"VEILPIPE_DP_EPSILON": "many"}, "VEILPIPE_DP_EPSILON"),
        ({"INFEMERAL_CRYPTO_DP_EPSILON": "many"}, "INFEMERAL_CRYPTO_DP_EPSILON"),
        ({"INFEMERAL_CRYPTO_DP_DELTA": "many"}, "INFEMERAL_CRYPTO_DP_DELTA"),
        ({"VEILPIPE_CONNECT_TIMEOUT": "nan"}, "VEILPIPE_CONNECT_TIMEOUT"),
        ({"VEILPIPE_SUPERVISE": "perhaps"}, "VEILPIPE_SUPERVISE"),
        ({"VEILPIPE_LOG_FORMAT": "xml"}, "VEILPIPE_LOG_FORMAT"),
        ({"VEILPIPE_TEMPERATURE": "9"}, "VEILPIPE_TEMPERATURE"),
        ({"VEILPIPE_DATA_OUT_LISTEN": "nonsense"}, "VEILPIPE_DATA_OUT_LISTEN"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_line_that_names_the_variable_it_came_from(run, variables, named):
    arguments = ("--manifest", "m", "--tokenizer", "t", "--text", "x")
    code, line = run(pipeline_orch, *arguments, **variables)
    assert code == 2
    assert line.startswith("pipeline-orch: error:")
    assert f"(from the environment: {named})" in line


def test_a_value_of_the_command_line_is_no_variables(run):
    arguments = ("--manifest", "m", "--tokenizer", "t", "--text", "x", "--dp-epsilon", "many")
    code, line = run(pipeline_orch, *arguments)
    assert code == 2
    assert "VEILPIPE" not in line
    assert "env var" not in line


def test_the_newer_name_counts_where_both_are_set(run):
    both = {"VEILPIPE_DP_EPSILON": "one", "INFEMERAL_CRYPTO_DP_EPSILON": "other"}
    arguments = ("--manifest", "m", "--tokenizer", "t", "--text", "x")
    _, line = run(pipeline_orch, *arguments, **both)
    assert "(from the environment: VEILPIPE_DP_EPSILON)" in line


def test_the_older_names_of_the_stages_weights_and_of_the_context_count(run, tmp_path):
    code, line = run(
        stage_worker, "--manifest", tmp_path / "m", "--stage-idx", 0,
        INFEMERAL_SERVER_WEIGHTS_PATH="weights",
    )  # fmt: skip
    assert code == 2
    assert "cannot read manifest" in line
    code, line = run(
        pipeline_orch, "serve", "--manifest", "m", "--model-dir", "d",
        INFEMERAL_SERVER_MAX_CONTEXT_LENGTH="1",
    )  # fmt: skip
    assert "(from the environment: INFEMERAL_SERVER_MAX_CONTEXT_LENGTH)" in line


def test_giving_up_attestation_is_said_by_hand(run, tiny_model, tmp_path):
    manifest = tmp_path / "manifest.json"
    arguments = ("--model-dir", tiny_model, "--stages", 1, "-o", manifest)
    assert run(pipeline_orch, "plan", *arguments)[0] == 0
    arguments = ("--manifest", manifest, "--tokenizer", tiny_model / "tokenizer.json")
    code, line = run(pipeline_orch, *arguments, "--text", "x", VEILPIPE_DEV="1")
    assert code == 2
    assert "--dev" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "give --cid 0=CID"),
        (("--cid", "0=16"), "give --cid 1=CID"),
        (("--cid", "0=16", "--cid", "1"), "--cid 1: write STAGE=CID"),
        (("--cid", "2=16"), "--cid 2: the manifest has 2 stages"),
    ],
    ids=str,
)
def test_a_template_is_used_with_the_cids_of_its_enclaves(
    run, tiny_model, tmp_path, monkeypatch, flags, words
):
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(tmp_path / "dev"))
    template = Path(__file__).resolve().parents[3] / "manifests/manifest_2stage_vsock.json"
    arguments = ("--manifest", template, "--tokenizer", tiny_model / "tokenizer.json")
    code, line = run(pipeline_orch, *arguments, "--text", "x", "--dev", *flags)
    assert code == 2
    assert words in line


def test_a_worker_that_is_supervised_is_told_everything_and_reads_no_variable(run):
    arguments = ("--supervised", "--stage-idx", 0, "--model-dir", "m")
    code, line = run(stage_worker, *arguments, VEILPIPE_MANIFEST="nowhere.json")
    assert code == 2
    assert "missing --manifest" in line


@pytest.mark.parametrize("command", [(), ("serve",), ("stego", "encode")], ids=str)
def test_help_names_a_flag_and_its_variable(monkeypatch, capfd, command):
    monkeypatch.setattr(sys, "argv", ["pipeline-orch", *command, "--help"])
    with pytest.raises(SystemExit):
        pipeline_orch.main()
    shown = " ".join(capfd.readouterr().out.split())
    assert "--manifest FILE" in shown
    assert "VEILPIPE_MODEL_DIR" in shown
    assert "VEILPIPE_DP_EPSILON, INFEMERAL_CRYPTO_DP_EPSILON" in shown
    assert "INFEMERAL_CLIENT_WEIGHTS_PATH" in shown
    for content in ("TEXT", "PROMPT", "MESSAGE"):
        assert f"VEILPIPE_{content}" not in shown


# What is said where it is done: what gives up a protection, and what is of one run alone.
BY_HAND = {
    "--allow-dial", "--beside-fd", "--beside-stage", "--cid", "--core", "--cors-origin", "--dev",
    "--help", "--ignore-measurements", "--in", "--message", "--out", "--pipelines", "--prompt",
    "--prompt-file", "--ray-network", "--ray-resource", "--remove", "--remove-unused",
    "--session-fd", "--stats-out", "--stop", "--supervised", "--system", "--text", "--text-file",
    "--weights-fd", "--yes",
}  # fmt: skip
# Commands that a person runs once: nothing that is meant for what runs on should reach them.
COMMANDS_BY_HAND = {
    "attest verify", "attest show", "keygen", "leakage", "masks make", "place k8s", "place slurm",
    "plan", "session forget", "session list", "shard",
}  # fmt: skip


def commands(command, name=""):
    """Every command that can be called, by name."""
    below = getattr(command, "commands", {})
    if not below or name == "":
        yield name, command
    for word, each in below.items():
        yield from commands(each, f"{name} {word}".strip())


def test_every_option_of_every_command_has_its_variable_or_is_said_by_hand():
    names = set()
    apps = [each.app for each in (stage_worker, machine, part_worker, linear_worker)]
    for app in (pipeline_orch.command_line(["--help"]), *apps):
        for name, command in commands(typer.main.get_command(app)):
            names.add(name)
            for option in command.params:
                if option.param_type_name != "option":
                    continue
                flag = next(each for each in option.opts if each.startswith("--"))
                variable = "VEILPIPE_" + flag.removeprefix("--").replace("-", "_").upper()
                is_by_hand = name in COMMANDS_BY_HAND or flag in BY_HAND
                assert (f"env var: {variable}" in (option.help or "")) != is_by_hand, (name, flag)
                assert option.envvar is None  # it would count before any flag is looked at
    assert names > COMMANDS_BY_HAND


ROLES = [
    ChatFlags, GenerateFlags, PipelineFlags, ServeFlags, TopFlags, WorkerFlags, EncodeFlags,
    DecodeFlags, KeygenFlags, MachineFlags, OfferFlags, JoinFlags, PushFlags, PartsFlags,
    LinearFlags, PlaceRayFlags,
]  # fmt: skip
NEEDED = {"manifest": "m", "model_dir": "d", "tokenizer": "t", "text": "x", "prompt": "x",
          "out": "o", "output": "o", "stage_idx": "0"}  # fmt: skip


def read(role, **given):
    """What a command with a role's flags is called with."""
    command = takes_flags(role=role)(lambda *, role: role)
    names = inspect.signature(command).parameters
    needed = {name: value for name, value in NEEDED.items() if name in names}
    return command(**dict.fromkeys(names) | needed | given)


def is_text(annotation):
    """Whether anything will do that can be written."""
    kinds = get_args(annotation) or (annotation,)
    kinds = [getattr(kind, "__origin__", kind) for kind in kinds]  # without what checks it
    return any(getattr(kind, "__name__", "") in {"str", "Path"} for kind in kinds)


def leaves(role):
    for name, info in role.model_fields.items():
        if hasattr(info.annotation, "model_fields"):
            yield from leaves(info.annotation)
        elif not is_text(info.annotation):
            yield name


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
def test_every_setting_that_is_no_text_says_in_one_line_what_will_not_do(role, monkeypatch):
    tried = 0
    for name in leaves(role):
        flag, variable = "--" + name.replace("_", "-"), f"VEILPIPE_{name.upper()}"
        if flag in BY_HAND:
            continue
        tried += 1
        given = {} if name not in NEEDED else {name: None}
        with monkeypatch.context() as patch:
            patch.setenv(variable, "no such thing")
            with pytest.raises(InputError) as caught:
                read(role, **given)
        assert str(caught.value).startswith(f"{flag} no such thing: ")
        assert "\n" not in str(caught.value)
        assert caught.value.__notes__ == [variable]
    assert tried


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
def test_settings_are_frozen_and_told_of_nothing_else(role):
    settings = read(role)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(settings, next(iter(role.model_fields)), None)
    with pytest.raises(pydantic.ValidationError, match="extra"):
        role.model_validate(settings.model_dump() | {"colour": "red"})


def test_what_kubernetes_says_of_a_service_is_no_setting(monkeypatch):
    for name in ("", "DATA_OUT_", "SERVE_"):  # of services that are called so
        monkeypatch.setenv(f"VEILPIPE_{name}PORT", "tcp://10.0.0.1:80")
        monkeypatch.setenv(f"VEILPIPE_{name}PORT_80_TCP", "tcp://10.0.0.1:80")
        monkeypatch.setenv(f"VEILPIPE_{name}PORT_80_TCP_PORT", "80")
        monkeypatch.setenv(f"VEILPIPE_{name}SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv(f"VEILPIPE_{name}SERVICE_PORT", "80")
    for role in ROLES:
        plain = read(role)
        with monkeypatch.context() as patch:
            for name in ("", "DATA_OUT_"):
                patch.delenv(f"VEILPIPE_{name}PORT")
            assert read(role) == plain
    monkeypatch.setenv("VEILPIPE_PORT", "8123")
    assert read(ServeFlags).port == 8123


def test_a_variable_that_is_empty_is_not_set(monkeypatch):
    monkeypatch.setenv("VEILPIPE_MAX_BATCH", "")
    monkeypatch.setenv("VEILPIPE_CONTEXT", "")
    monkeypatch.setenv("INFEMERAL_SERVER_MAX_CONTEXT_LENGTH", "77")
    assert (read(ServeFlags).max_batch, read(ServeFlags).context) == (16, 77)


@pytest.mark.parametrize("variable", ["VEILPIPE_MAX_TOKENS", "VEILPIPE_TEMPERATURE"])
def test_variables_of_generating_are_nothing_to_commands_below(run, tmp_path, variable):
    code, line = run(pipeline_orch, "keygen", tmp_path / "key.pem", **{variable: "many"})
    assert (code, len(line)) == (0, 64)
    code, line = run(pipeline_orch, "serve", "--model-dir", "d", **{variable: "many"})
    assert (code, line) == (2, "pipeline-orch: error: missing --manifest; see --help")


def test_flags_of_generating_before_another_command_are_refused(run, tmp_path):
    code, line = run(pipeline_orch, "--max-tokens", "3", "keygen", tmp_path / "key.pem")
    assert (code, line) == (2, "pipeline-orch: error: --max-tokens belongs behind keygen")
    assert not (tmp_path / "key.pem").exists()


def test_an_older_servers_file_of_weights_comes_first_where_it_is_there(tmp_path):
    """Then its directory; without that, the file that is missing is what is told of."""
    path, directory = str(tmp_path / "w.tensors"), str(tmp_path)
    older = {"INFEMERAL_SERVER_TENSORIZED_WEIGHTS_PATH": path}
    both = older | {"INFEMERAL_SERVER_WEIGHTS_PATH": directory}
    newer = both | {"VEILPIPE_MODEL_DIR": "newer"}
    for settings in (WorkerFlags, DoorServerFlags):
        chosen = partial(chosen_variable, settings, "model_dir")
        assert [chosen(each) for each in (older, both, newer)] == [
            "INFEMERAL_SERVER_TENSORIZED_WEIGHTS_PATH", "INFEMERAL_SERVER_WEIGHTS_PATH",
            "VEILPIPE_MODEL_DIR",
        ]  # fmt: skip
    Path(path).touch()
    for settings in (WorkerFlags, DoorServerFlags):
        chosen = partial(chosen_variable, settings, "model_dir")
        assert chosen(both) == "INFEMERAL_SERVER_TENSORIZED_WEIGHTS_PATH"
        assert chosen(newer) == "VEILPIPE_MODEL_DIR"


def chosen_variable(settings, name, environment):
    _, flag = settings_module._flags(settings)[name]
    return next(settings_module._set_variables(name, flag, environment))


@pytest.mark.parametrize(
    ("older", "role", "name", "value"),
    [
        ("INFEMERAL_CLIENT_WEIGHTS_PATH", PipelineFlags, "client_part", "w"),
        ("INFEMERAL_CLIENT_SERVER_URL", TopFlags, "url", "http://h:1"),
        ("INFEMERAL_CLIENT_MODEL_ID", ServeFlags, "served_model_name", "m"),
        ("INFEMERAL_SERVER_MODEL_ID", ServeFlags, "served_model_name", "m"),
        ("INFEMERAL_SERVER_WEIGHTS_PATH", WorkerFlags, "model_dir", "w"),
        ("INFEMERAL_SERVER_MAX_CONTEXT_LENGTH", GenerateFlags, "context", "99"),
        ("INFEMERAL_SERVER_MAX_CONTEXT_LENGTH", ServeFlags, "context", "99"),
        ("INFEMERAL_CRYPTO_DP_EPSILON", PipelineFlags, "dp_epsilon", "2.5"),
        ("INFEMERAL_CRYPTO_DP_DELTA", PipelineFlags, "dp_delta", "1e-07"),
    ],
)
def test_an_older_name_counts_where_neither_flag_nor_newer_name_is_given(
    monkeypatch, older, role, name, value
):
    needed = {name: None} if name in NEEDED else {}
    monkeypatch.setenv(older, value)
    assert str(getattr(read(role, **needed), name)) == value
    monkeypatch.setenv(f"VEILPIPE_{name.upper()}", "7")
    assert str(getattr(read(role, **needed), name)) in {"7", "7.0"}
    assert str(getattr(read(role, **{name: "8"}), name)) in {"8", "8.0"}


def test_an_error_names_no_variable_that_it_does_not_speak_of(run):
    arguments = ("--manifest", "nowhere.json", "--tokenizer", "t", "--text", "x")
    code, line = run(pipeline_orch, *arguments, VEILPIPE_THREADS="2", VEILPIPE_LOG_FORMAT="json")
    assert code == 2
    assert "VEILPIPE" not in line


def groups(command):
    """A command's and those below it, where they have others below them."""
    for name, each in getattr(command, "commands", {}).items():
        yield name, each
        yield from groups(each)


def test_every_command_says_what_it_does():
    for app in (pipeline_orch.command_line(["--help"]), stage_worker.app):
        for name, each in groups(typer.main.get_command(app)):
            assert each.help, name
