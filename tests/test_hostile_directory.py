"""Modules that lie in the directory one is in, beside a downloaded model say, are never run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Whatever a command of the project imports first: of itself, of others, of Python.
MODULES = ("enclave", "pipeline", "transport", "typer", "trio", "torch", "numpy", "json", "random",
           "socket", "pathlib", "argparse", "pip", "_native")  # fmt: skip


@pytest.fixture
def hostile(tmp_path):
    """A directory of modules that leave a mark when they are run."""
    directory = tmp_path / "downloads"
    for name in MODULES:
        (directory / name).mkdir(parents=True)
        mark = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n"
        (directory / name / "__init__.py").write_text(mark)
        (directory / name / "__main__.py").write_text(mark)
    for name in ("python", "pipeline-orch", "nitro-cli"):
        (directory / name).write_text(f"#!/bin/sh\nmkdir {tmp_path / 'mark'}\n")
        (directory / name).chmod(0o755)
    return directory


def run(*command, cwd, **environment):
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def is_untouched(directory):
    return not (directory.parent / "mark").exists()


def test_the_trap_works(hostile):
    run(sys.executable, "-c", "import json", cwd=hostile)
    assert not is_untouched(hostile)


def test_functions_of_the_scripts_run_nothing_there(hostile):
    done = run(
        "bash", "-c", f". {ROOT}/scripts/lib.sh && free_base_port 2 && command -v nitro-cli",
        cwd=hostile, PATH=f":.:{os.environ['PATH']}", VEILPIPE_VENV=sys.prefix,
    )  # fmt: skip
    assert re.fullmatch(r"\d+\n", done.stdout), done.stderr
    assert is_untouched(hostile)


def test_running_enclaves_runs_nothing_there(hostile, tmp_path):
    """As far as it goes without an image: the manifest has been read, the image looked for."""
    scripts = tmp_path / "checkout/scripts"
    scripts.mkdir(parents=True)
    for name in ("lib.sh", "run_nitro.sh"):
        shutil.copy(ROOT / "scripts" / name, scripts)
    (scripts / "setup.sh").touch()
    (hostile / "m.json").write_text(json.dumps({"stages": [{"stage_idx": 0}]}))
    done = run(
        "bash", scripts / "run_nitro.sh", "--manifest", "m.json", "--results", "h:1",
        cwd=hostile, VEILPIPE_VENV=sys.prefix, PYTHONPATH=str(hostile),
    )  # fmt: skip
    assert "stage0.eif is not what m.json pins for stage 0: error: " in done.stderr
    assert is_untouched(hostile)


@pytest.mark.parametrize("cid", ["1", "1=x", "08=9", "1=$(touch x)"])
def test_what_is_no_cid_is_refused_before_anything_runs(hostile, cid):
    script = ROOT / "scripts/run_nitro.sh"
    done = run("bash", script, "--manifest", "m.json", "--cid", cid, cwd=hostile)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().endswith("write STAGE=CID, such as 1=17")
    assert is_untouched(hostile)


def test_building_images_runs_nothing_there(hostile, tmp_path):
    done = run(
        sys.executable, "-P", "-m", "enclave", "build", "--manifest", "m.json", "--stage", "0",
        "--model-dir", ".", "-o", "x.eif", cwd=hostile, PATH=f":.:{os.environ['PATH']}",
    )  # fmt: skip
    assert "cannot cut stage 0" in done.stderr
    assert is_untouched(hostile)


def python_sources():
    for room in ("pipeline", "transport", "enclave", "scripts"):
        yield from sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize(
    "path", list(python_sources()), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_python_that_is_started_keeps_off_the_directory(path):
    """After sys.executable comes the path of a script, or -P or -I before any -c or -m."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.List | ast.Tuple):
            words = [each.value if isinstance(each, ast.Constant) else None for each in node.elts]
            names = [ast.unparse(each) for each in node.elts]
            for at, name in enumerate(names[:-1]):
                if name == "sys.executable":
                    assert words[at + 1] in {None, "-P", "-I"}, f"line {node.lineno}"


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "scripts").rglob("*.sh"), ROOT / "scripts/check", ROOT / ".ci/run"]),
    ids=lambda path: path.name,
)
def test_every_python_of_a_script_keeps_off_the_directory(path):
    code = re.sub(r"(?m)^\s*#.*", "", path.read_text())
    python = r"(?<![\w-])(?:python3?|candidate)\"?"
    started = re.findall(python + r"((?: +-(?!-)\w*)+)", code)
    for flags in started:
        assert re.match(r" +-(I|P)", flags), flags
