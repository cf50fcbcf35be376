"""The first process of an enclave: prepares the machine, runs the stage, ends with it.

It needs the standard library alone. What it does, in order: mount the kernel's file systems, bring
the loopback interface up, feed the security module's entropy to the kernel, answer the parent's
boot heartbeat, run the stage's command, collect orphans, and stop the machine when it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enclave import nsm
from enclave.errors import EnclaveError, NsmError

RUN_FILE: Final = Path("/stage/run.json")

# nitro-cli holds an enclave for booted once it connected here, sent this byte and got it back.
_PARENT_CID: Final = 3
_HEARTBEAT_PORT: Final = 9000
_HEARTBEAT: Final = b"\xb7"
_HEARTBEAT_DEADLINE_S: Final = 30.0
_HEARTBEAT_TRY_S: Final = 2.0

_ENTROPY_ROUNDS: Final = 4  # of 256 bytes each
_RNDADDENTROPY: Final = 0x40085203
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_RB_AUTOBOOT: Final = 0x01234567

# type, target, mount flags, options
_MOUNTS: Final = (
    ("devtmpfs", "/dev", 2, "mode=0755"),
    ("proc", "/proc", _MS_NOSUID_NODEV_NOEXEC, ""),
    ("sysfs", "/sys", _MS_NOSUID_NODEV_NOEXEC, ""),
    ("tmpfs", "/tmp", 2 | 4, "mode=1777"),  # noqa: S108 - the mount point itself
    ("tmpfs", "/run", 2 | 4, "mode=0755"),
    ("devpts", "/dev/pts", _MS_NOSUID_NODEV_NOEXEC, ""),
    ("tmpfs", "/dev/shm", 2 | 4, "mode=1777"),  # noqa: S108 - torch shares memory through it
)


@dataclass(frozen=True, slots=True)
class Command:
    """What the stage's ramdisk asks init to run."""

    argv: tuple[str, ...]
    env: dict[str, str]


def main() -> None:
    """Run as process 1. Never returns: the machine stops."""
    status = 1
    try:
        _mount_all()
        _bring_up_loopback()
        _add_entropy()
        _start_heartbeat()
        status = _run(read_command(RUN_FILE.read_bytes()))
    except (EnclaveError, OSError) as error:
        _log(f"failed: {error}")
    _log(f"stage ended with status {status}, stopping")
    os.sync()
    ctypes.CDLL(None).reboot(_RB_AUTOBOOT)
    while True:  # a machine without reset line ignores the reboot; process 1 must not return
        time.sleep(3600)


def become_stage() -> None:
    """Replace this process by the stage's command, where another init has prepared the machine.

    Raises: EnclaveError when the stage's files name no command, OSError when they cannot be read.
    """
    _become(read_command(RUN_FILE.read_bytes()))


def read_command(text: bytes) -> Command:
    """Return the command a run file names: {"argv": [text, …], "env": {name: text}}.

    Raises: EnclaveError when it is anything else.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise EnclaveError(f"{RUN_FILE} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not {"argv"} <= set(fields) <= {"argv", "env"}:
        raise EnclaveError(f"{RUN_FILE} does not hold argv and, if any, env")
    argv, env = fields["argv"], fields.get("env", {})
    if not isinstance(argv, list) or not argv or not isinstance(env, dict):
        raise EnclaveError(f"{RUN_FILE}: argv is no filled list, or env no object")
    if not all(isinstance(word, str) for word in (*argv, *env.values())):
        raise EnclaveError(f"{RUN_FILE}: argv and env hold something other than text")
    return Command(tuple(argv), env)


def _log(message: str) -> None:
    """Write a line to the console, which a parent sees in debug mode only."""
    os.write(2, f"init: {message}\n".encode())


def _mount_all() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, target, flags, options in _MOUNTS:
        Path(target).mkdir(parents=True, exist_ok=True)
        if libc.mount(kind.encode(), target.encode(), kind.encode(), flags, options.encode()):
            raise EnclaveError(f"cannot mount {target}: {os.strerror(ctypes.get_errno())}")


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _add_entropy() -> None:
    """Credit the kernel's pool with the module's entropy: keys are made before anything else."""
    try:
        with Path("/dev/urandom").open("wb", buffering=0) as pool:
            for _ in range(_ENTROPY_ROUNDS):
                fresh = nsm.random_bytes()
                head = struct.pack("ii", 8 * len(fresh), len(fresh))
                fcntl.ioctl(pool, _RNDADDENTROPY, head + fresh)
    except NsmError as error:
        # Outside an enclave there is none; attestation will fail later, and say so.
        _log(f"no entropy from the security module: {error}")


def _start_heartbeat() -> None:
    """Tell the parent from a child process, so that an absent listener delays nothing."""
    if os.fork() != 0:
        return
    deadline = time.monotonic() + _HEARTBEAT_DEADLINE_S
    answered = False
    while not answered and time.monotonic() < deadline:
        answered = _beat()
    _log("heartbeat answered" if answered else "no heartbeat listener on the parent")
    os._exit(0)


def _beat() -> bool:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as parent:
            parent.settimeout(_HEARTBEAT_TRY_S)
            parent.connect((_PARENT_CID, _HEARTBEAT_PORT))
            parent.sendall(_HEARTBEAT)
            return parent.recv(1) == _HEARTBEAT
    except OSError:
        time.sleep(0.2)  # refused at once: leave the parent time to listen
        return False


def _run(command: Command) -> int:
    """Run the command, collect every orphan, and return the command's exit status."""
    child = os.fork()
    if child == 0:
        _become(command)
    for forwarded in (signal.SIGTERM, signal.SIGINT):
        signal.signal(forwarded, lambda number, _frame: os.kill(child, number))
    _log(f"uptime_s={time.monotonic():.2f} started {command.argv[0]}")
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _become(command: Command) -> None:
    try:
        os.setsid()
        os.chdir("/")
        os.execve(command.argv[0], command.argv, {"PATH": "/usr/bin", **command.env})  # noqa: S606
    except OSError as error:
        _log(f"cannot run {command.argv[0]}: {error.strerror}")
    finally:
        os._exit(127)
