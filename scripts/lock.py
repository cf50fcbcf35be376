"""Write scripts/locks: every package that scripts/setup.sh installs, by version and SHA-256.

`base` is what the project needs, `torch-cpu` torch where an index of the machine has
its build without CUDA, else `torch` and `cuda`; each extra of pyproject.toml has what it needs
besides. Run scripts/lock.sh.
"""

import re
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "scripts/locks"
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = "# Written by scripts/lock.sh.\n"
CONSTRAINTS_HEADER = """\
# Exact versions of everything installed, which scripts/lock.sh keeps to and adds to. What torch's
# builds for GPUs bring besides follows from it, and stands in scripts/locks/cuda.lock.
"""
# Where the project runs: what only other systems need is left out.
ENVIRONMENTS = [
    {
        "python_version": version, "python_full_version": f"{version}.0",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
        "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux",
        "platform_machine": machine, "extra": "",
    }
    for version, machine in product(("3.11", "3.12", "3.13"), ("x86_64", "aarch64"))
]  # fmt: skip
ENTRY = re.compile(
    r"(?m)^(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; (?P<marker>.*?))? \\\n(?: .*\n?)+"
)
CUDA = re.compile(r"cuda-|nvidia-|triton$")


def resolved(project, extra=None):
    """Entries of a lock by name: of what builds the project and it needs, with one of its extras."""
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", ROOT / "pyproject.toml", "-"]
    command += ["--constraint", CONSTRAINTS, "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-build", "--no-header", "--no-annotate", "--quiet"]
    command += [] if extra is None else ["--extra", extra]
    build = "\n".join(project["build-system"]["requires"])
    text = subprocess.run(
        command, check=True, input=build, stdout=subprocess.PIPE, text=True
    ).stdout
    return {
        entry["name"]: entry
        for entry in ENTRY.finditer(text)
        if entry["marker"] is None
        or any(Marker(entry["marker"]).evaluate(each) for each in ENVIRONMENTS)
    }


def cpu_build_of_torch():
    """The build without CUDA, which PyTorch's own index has, as images carry it."""
    lock = (ROOT / "enclave/recipes/python.lock").read_text()
    return re.search(r"(?m)^torch==\S+\+cpu .*", lock)[0].replace(" ", " \\\n    ")


def write(name, entries):
    text = "".join(entry if entry.endswith("\n") else f"{entry}\n" for entry in entries)
    (LOCKS / f"{name}.lock").write_text(HEADER + text)


def main():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    base = resolved(project, "torch")  # which scripts/setup.sh always installs
    extras = project["project"]["optional-dependencies"].keys() - {"torch", "cuda"}
    by_extra = {extra: resolved(project, extra) for extra in sorted(extras)}
    cuda = [name for name in base if CUDA.match(name)]
    write("torch", [base["torch"][0]])
    write("torch-cpu", [cpu_build_of_torch()])
    write("cuda", [base[name][0] for name in cuda])
    write("base", [entry[0] for name, entry in base.items() if name not in {"torch", *cuda}])
    for extra, entries in by_extra.items():
        write(extra, [entry[0] for name, entry in entries.items() if name not in base])
    every = {**base, **{name: each for found in by_extra.values() for name, each in found.items()}}
    lines = [f"{name}=={every[name]['version']}\n" for name in sorted(every) if name not in cuda]
    CONSTRAINTS.write_text(CONSTRAINTS_HEADER + "".join(lines))


main()
