"""Options from the environment: a flag beats a variable, and errors name the one that counted."""

import sys

import pytest

from pipeline.cli import pipeline_orch, stage_worker


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
    _, line = run(pipeline_orch, "--manifest", "m", **both)
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


def test_a_worker_that_is_supervised_is_told_everything_and_reads_no_variable(run):
    arguments = ("--until-stdin-ends", "--stage-idx", 0, "--model-dir", "m")
    code, line = run(stage_worker, *arguments, VEILPIPE_MANIFEST="nowhere.json")
    assert code == 2
    assert "'--manifest'" in line


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


@pytest.mark.parametrize("command", ["plan", "shard", "keygen"])
def test_what_writes_files_once_takes_no_variable(monkeypatch, capfd, command):
    monkeypatch.setattr(sys, "argv", ["pipeline-orch", command, "--help"])
    with pytest.raises(SystemExit):
        pipeline_orch.main()
    assert "VEILPIPE_" not in capfd.readouterr().out


def test_an_error_names_no_variable_that_it_does_not_speak_of(run):
    arguments = ("--manifest", "nowhere.json", "--tokenizer", "t", "--text", "x")
    code, line = run(pipeline_orch, *arguments, VEILPIPE_THREADS="2", VEILPIPE_LOG_FORMAT="json")
    assert code == 2
    assert "VEILPIPE" not in line
