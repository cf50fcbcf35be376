"""Modules that lie in the directory one is in, beside a downloaded model say, are never run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest

from tests.sources import ROOT, parsed

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
        timeout=300,
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


def starts(path):
    """What follows sys.executable in each command of a module: the word, or None for a path."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.List | ast.Tuple):
            for this, following in pairwise(node.elts):
                if isinstance(this, ast.Attribute) and ast.unparse(this) == "sys.executable":
                    word = following.value if isinstance(following, ast.Constant) else None
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", word


def test_every_python_that_is_started_keeps_off_the_directory():
    """After sys.executable comes the path of a script, or -P or -I before any -c or -m."""
    rooms = ("pipeline", "transport", "enclave", "scripts")
    found = [
        each for room in rooms for path in (ROOT / room).rglob("*.py") for each in starts(path)
    ]
    assert found
    assert not [place for place, word in found if word not in {None, "-P", "-I"}]


def test_every_python_of_a_script_keeps_off_the_directory():
    scripts = [*(ROOT / "scripts").rglob("*.sh"), ROOT / "scripts/check", ROOT / ".ci/run"]
    python = r"(?<![\w-])(?:python3?|candidate)\"?"
    started = {
        (path.name, flags)
        for path in scripts
        for flags in re.findall(
            python + r"((?: +-(?!-)\w*)+)", re.sub(r"(?m)^\s*#.*", "", path.read_text())
        )
    }
    assert started
    assert not {each for each in started if not re.match(r" +-(I|P)", each[1])}
