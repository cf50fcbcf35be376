from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from enclave import init, nsm
from enclave.errors import EnclaveError, NsmError


def test_run_file_names_the_command_and_its_environment() -> None:
    command = init.read_command(b'{"argv": ["/bin/a", "b"], "env": {"X": "1"}}')
    assert command == init.Command(("/bin/a", "b"), {"X": "1"})
    assert init.read_command(b'{"argv": ["/bin/a"]}').env == {}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"argv": []}',
        b'{"argv": "a"}',
        b'{"argv": [1]}',
        b'{"argv": ["a"], "env": []}',
        b'{"argv": ["a"], "env": {"X": 1}}',
        b'{"argv": ["a"], "cwd": "/"}',
    ],
)
def test_any_other_run_file_is_refused(text: bytes) -> None:
    with pytest.raises(EnclaveError, match=r"run\.json"):
        init.read_command(text)


@pytest.mark.parametrize(("argv", "status"), [("true", 0), ("false", 1), ("missing", 127)])
def test_status_of_the_command_comes_back_and_orphans_are_collected(argv: str, status: int) -> None:
    # In a process of its own: it forks, and waits for every child there is.
    program = {
        "true": [sys.executable, "-c", "import os; os.fork()"],
        "false": [sys.executable, "-c", "raise SystemExit(1)"],
        "missing": ["/nonexistent"],
    }[argv]
    command = f"init.Command({tuple(program)!r}, {{}})"
    script = f"import sys; from enclave import init; sys.exit(init._run({command}))"
    root = Path(init.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, timeout=300, check=False, capture_output=True
    )
    assert done.returncode == status, done.stderr


def test_init_needs_the_standard_library_alone() -> None:
    root = Path(init.__file__).parent.parent
    script = f"import sys; sys.path.insert(0, {str(root)!r}); import enclave.init"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True, timeout=300)


@pytest.mark.skipif(nsm.DEVICE.exists(), reason="this machine has a security module")
def test_absent_security_module_is_named() -> None:
    with pytest.raises(NsmError, match="cannot open /dev/nsm"):
        nsm.random_bytes()


def test_overlong_request_is_refused_before_the_device_is_opened() -> None:
    with pytest.raises(NsmError, match="over 4096"):
        nsm.attestation_document(os.urandom(5000), b"", b"")
