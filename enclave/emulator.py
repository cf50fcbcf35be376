"""Booting an image without AWS: QEMU's nitro-enclave machine, with vsock through a Unix socket.

A host program reaches a port of the enclave by connecting to the socket and writing CONNECT, port,
newline.
The emulation isolates nothing and its attestation is worth nothing: it is for tests.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enclave.errors import EmulatorError

_PR_SET_PDEATHSIG: Final = 1
_SOCKET_DEADLINE_S: Final = 10.0
# Packets of the default 64 KiB hang in vhost-device-vsock 0.3.
_TX_BUFFER_BYTES: Final = 16384


@dataclass(frozen=True, slots=True)
class Machine:
    """What to boot and how: `vsock` is the socket's path to be, `console` the log's."""

    image: Path
    vsock: Path
    console: Path
    cid: int = 16
    cpus: int = 2
    memory_mib: int = 4096
    signing_dir: Path | None = None  # test key and chain to sign attestation documents with


@contextmanager
def booted(machine: Machine, tools: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the machine for as long as the context lasts; gives QEMU's process.

    Both processes end with the context, or with the caller should it be killed.
    Raises: EmulatorError when a tool is missing or does not start.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="enclave-")))
        control = scratch / "vhost.sock"
        machine.vsock.unlink(missing_ok=True)
        stack.callback(machine.vsock.unlink, missing_ok=True)
        guest = f"guest-cid={machine.cid},uds-path={machine.vsock},socket={control}"
        options = ["--vm", f"{guest},tx-buffer-size={_TX_BUFFER_BYTES}"]
        log = stack.enter_context((scratch / "vhost.log").open("wb"))
        device = stack.enter_context(
            _running([str(tools / "vhost-device-vsock"), *options], log.fileno())
        )
        deadline = time.monotonic() + _SOCKET_DEADLINE_S
        while not control.exists():
            if device.poll() is not None or time.monotonic() > deadline:
                detail = (scratch / "vhost.log").read_text(errors="replace").strip()
                raise EmulatorError(f"vhost-device-vsock did not start: {detail[-300:]}")
            time.sleep(0.05)
        console = stack.enter_context(machine.console.open("wb"))
        yield stack.enter_context(
            _running(_qemu_command(machine, tools, control), console.fileno(), machine.signing_dir)
        )


def run_until_stopped(machine: Machine, tools: Path) -> None:
    """Boot and wait for SIGINT or SIGTERM.

    Raises: EmulatorError when a tool is missing or does not start, or QEMU ends before.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with booted(machine, tools) as process:
            status = process.wait()
    except KeyboardInterrupt:
        return
    last_lines = machine.console.read_text(errors="replace").splitlines()[-1:]
    raise EmulatorError(f"QEMU ended with status {status}: {' '.join(last_lines)}")


def _qemu_command(machine: Machine, tools: Path, control: Path) -> list[str]:
    words = (
        f"-L {tools / 'firmware'} -accel tcg,thread=multi -cpu max -smp {machine.cpus} "
        f"-m {machine.memory_mib}M -nodefaults -display none -serial stdio -no-reboot "
        f"-M nitro-enclave,vsock=vsock,id=i-0-enc{machine.cid}"
    ).split()
    kernel = ["-kernel", str(machine.image), "-append", " ".join(_clock_words())]
    chardev = ["-chardev", f"socket,id=vsock,path={control}"]
    return [str(tools / "qemu-nitro"), *words, *chardev, *kernel]


def _clock_words() -> list[str]:
    """Return what the kernel must be told to keep time; the loader appends it unmeasured.

    On a busy host an emulated kernel fails to calibrate its time stamp counter, which is the
    host's, falls back on timer ticks and loses those: half a minute in a minute was seen.
    """
    about_cpu = Path("/proc/cpuinfo").read_text()
    frequency = re.search(r"(?m)^cpu MHz\s*: ([0-9.]+)$", about_cpu)
    is_virtual = re.search(r"(?m)^flags\s*:.* hypervisor\b", about_cpu)
    # Only a virtual machine's figure is the counter's; elsewhere it is the momentary clock.
    if not frequency or not is_virtual:
        return ["tsc=reliable"]
    return ["tsc=reliable", f"tsc_early_khz={round(float(frequency[1]) * 1000)}"]


@contextmanager
def _running(
    command: list[str], output: int, signing_dir: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {key: value for key, value in os.environ.items() if key != "NSM_SIGNING_DIR"}
    if signing_dir is not None:
        environment["NSM_SIGNING_DIR"] = str(signing_dir)
    try:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - no thread is running yet
        )
    except OSError as error:
        raise EmulatorError(
            f"cannot run {command[0]}: {error.strerror}; scripts/build_enclave_tools.sh makes it"
        ) from error
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
