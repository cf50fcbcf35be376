"""The scripts' command lines: what is wrong is one line on stderr, and nothing has been started."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Ports

SCRIPTS = Path(__file__).parents[1] / "scripts"
MODEL = ("--model-dir", "MODEL")


@pytest.fixture
def refuse(monkeypatch, capfd, tiny_model):
    """Runs a script that has to refuse its arguments: its line on stderr."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = signal.getsignal(signal.SIGTERM)

    def start(*_arguments, **_options):
        raise AssertionError("a process was started")

    def run(script, *arguments):
        module = importlib.import_module(script)
        words = [str(tiny_model) if word == "MODEL" else word for word in arguments]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        monkeypatch.setattr(subprocess, "Popen", start)
        monkeypatch.setattr(module, "set_num_threads", lambda count: None, raising=False)
        with pytest.raises(SystemExit) as caught:
            module.run_main(script, module.main)
        out, err = capfd.readouterr()
        assert caught.value.code == 2
        assert out == ""
        assert err.count("\n") == 1, err
        assert " error: " in err
        return err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model-dir"),
        (("--model-dir", "/nowhere"), "no config.json in /nowhere"),
        ((*MODEL, "--requests", "-1"), "--requests: -1: give a whole number from 0"),
        ((*MODEL, "--losses", "-1"), "--losses: -1"),
        ((*MODEL, "--losses", "many"), "--losses: many: give a whole number from 0"),
        ((*MODEL, "--losses", "0"), "nothing to do: give --losses, --minutes or --requests"),
        ((*MODEL, "--clients", "0"), "--clients: 0: give a whole number from 1"),
        ((*MODEL, "--stages", "0"), "--stages: 0"),
        ((*MODEL, "--stages", "99"), "layers into 99 stages"),
        ((*MODEL, "--minutes", "-0.5"), "--minutes: -0.5: give a number from 0"),
        ((*MODEL, "--minutes", "inf"), "--minutes: inf"),
        ((*MODEL, "--pause", "nan"), "--pause: nan: give a number from 0"),
        ((*MODEL, "--max-tokens", "1"), "--max-tokens: 1: give a whole number from 2 to 256"),
        ((*MODEL, "--max-tokens", "257"), "--max-tokens: 257"),
        ((*MODEL, "--threads", "0"), "--threads: 0: give a whole number from 1 to 1024"),
        ((*MODEL, "--base-port", "70000"), "--base-port: 70000"),
        ((*MODEL, "--colour", "red"), "--colour"),
    ],
)
def test_a_soak_that_cannot_be_meant(refuse, arguments, words):
    line = refuse("soak", *arguments)
    assert line.startswith("soak: error: ")
    assert words in line


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("bench", ("--model-dir", "/nowhere"), "no config.json in /nowhere"),
        ("bench", (*MODEL, "--stages", "1,0"), "--stages: 0: give a whole number from 1"),
        ("bench", (*MODEL, "--stages", "1,99"), "--stages: 99: the model has 4 layers"),
        ("bench", (*MODEL, "--tokens", "1"), "--tokens: 1: give a whole number from 2"),
        ("bench_modes", ("--model-dir", "/nowhere"), "no config.json in /nowhere"),
        ("bench_modes", (*MODEL, "--modes", "scx,x"), "--modes: x: use scx, scx-paper, offload"),
        ("bench_modes", (*MODEL, "--contexts", "8,9999"), "--contexts: the model has 4096"),
        ("bench_compare", ("--model-dir", "/nowhere"), "no config.json in /nowhere"),
        ("bench_compare", ("--threads", "1,x"), "--threads: x: give a whole number from 1"),
        ("bench_channel", ("--rounds", "0"), "--rounds: 0"),
        ("bench_kernels", ("--rows", "0"), "--rows: 0"),
        ("bench_wire", ("--model-dir", "/nowhere"), "no config.json in /nowhere"),
        ("bench_wire", (*MODEL, "--text", "/nowhere", "--windows", "1"), "/nowhere: No such file"),
        ("bench_wire", (*MODEL, "--windows", "0"), "--windows: 0"),
        ("quality", ("--model-dir", "/nowhere"), "no config.json in /nowhere"),
        ("quality", (*MODEL, "--kernels", "x"), "--kernels x"),
        ("quality", (*MODEL, "--tokens", "-4"), "--tokens: -4"),
        ("random_model", ("/dev/null/x",), "/dev/null/x: Not a directory"),
        ("random_model", ("x", "--layers", "0"), "--layers: 0"),
    ],
)
def test_a_benchmark_that_cannot_be_meant(refuse, script, arguments, words):
    if script == "bench_kernels":
        pytest.importorskip("pipeline.kernels._native", reason="the kernels are not compiled")
    assert words in refuse(script, *arguments)


@pytest.fixture
def base_port():
    ports = Ports(20)
    yield ports.base
    ports.release()


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("exec", id="foreground"),
        pytest.param("trap '' INT; exec", id="background", marks=pytest.mark.slow),
    ],
)
def test_ending_a_soak_ends_what_it_has_started(tiny_model, tmp_path, base_port, before):
    command = [
        "sh", "-c", f'{before} "$0" "$@"',
        sys.executable, SCRIPTS / "soak.py", "--model-dir", tiny_model, "--stages", "1",
        "--base-port", str(base_port),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(tmp_path), "VEILPIPE_DEV_DIR": str(tmp_path / "dev")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    logs = []
    for _ in range(6000):
        logs = [
            path for path in tmp_path.glob("*/serve.log") if "worker_started" in path.read_text()
        ]
        if logs or process.poll() is not None:
            break
        time.sleep(0.05)
    assert logs, "no worker was started"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.terminate()
    assert process.wait(300) == 130
    assert not Path(f"/proc/{children[0]}").exists()
    assert not list(tmp_path.glob("*/serve.log"))
