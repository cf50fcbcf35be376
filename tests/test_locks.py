"""What scripts/setup.sh installs is pinned by hash, all of it, and nothing else is installed."""

import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "scripts/locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def entries(name):
    """Versions and hashes of a lock, by name."""
    text = (LOCKS / f"{name}.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [re.match(r"([\w.-]+)==(\S+)(?: ; [^-]*)?(.*)", line) for line in lines]
    return {
        each[1]: (each[2], re.findall(r"--hash=sha256:[0-9a-f]{64}", each[3])) for each in found
    }


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", ["base", "torch", "torch-cpu", "cuda", *EXTRAS])
def test_every_locked_package_has_a_hash_and_the_version_of_the_constraints(name):
    for package, (version, hashes) in entries(name).items():
        assert hashes, package
        assert name == "cuda" or version.removesuffix("+cpu") == pins()[package], package


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_locks_hold_whatever_is_required_by_what_they_hold(extra):
    """As far as the packages are installed here: one that is not cannot say what it requires."""
    locked = {**entries("base"), **entries("torch"), **(entries(extra) if extra else {})}
    required = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    required += EXTRAS[extra] if extra else []
    pending, seen = [(Requirement(each), "") for each in required], set()
    while pending:
        requirement, of_extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is in no lock: run scripts/lock.sh"
        version = locked[name][0]
        assert requirement.specifier.contains(version), f"{requirement}: run scripts/lock.sh"
        for each in requirement.extras or {""}:
            if (name, each) not in seen:
                seen.add((name, each))
                try:
                    pending += [(Requirement(text), each) for text in requires(name) or ()]
                except PackageNotFoundError:
                    pass


@pytest.mark.slow  # pip has an environment to make
def test_a_wheel_that_differs_from_the_locked_one_is_not_installed(tmp_path):
    scripts, wheels = tmp_path / "checkout/scripts", tmp_path / "wheels"
    (scripts / "locks").mkdir(parents=True)
    for room in ("pipeline", "transport", "wheels"):
        (scripts.parent / room).mkdir()
    wheels.mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", scripts)
    for name in ("base", "torch", "torch-cpu", "cuda"):
        (scripts / f"locks/{name}.lock").write_text(f"altered==1.0 --hash=sha256:{'0' * 64}\n")
    (scripts.parent / "pyproject.toml").touch()
    with zipfile.ZipFile(wheels / "altered-1.0-py3-none-any.whl", "w") as wheel:
        about = "altered-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: altered\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    environment = {**os.environ, "VEILPIPE_VENV": str(tmp_path / "venv"), "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["bash", scripts / "setup.sh"], capture_output=True, text=True, timeout=300,
        env={**environment, "PIP_FIND_LINKS": str(wheels)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip failed" in done.stderr
    assert "HASHES" in (tmp_path / "venv/install.log").read_text()
    assert not list((tmp_path / "venv").rglob("altered*"))
    assert not (tmp_path / "venv/.veilpipe-base").exists()
