"""`stage-worker offer`, `serve` and `service`: a machine of one's own."""

import fcntl
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import trio

from pipeline.agreement.identity import (
    MACHINE_KEY,
    fingerprint,
    own_identity,
    state_directory,
)
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.logs import configure_logging, printable, tell
from pipeline.cli.machine_flags import DEFAULT_LISTEN, MachineFlags, OfferFlags
from pipeline.cli.own_address import own_address
from pipeline.cli.service_manager import ServiceManager
from pipeline.cli.settings import takes_flags
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.software import software_version
from pipeline.errors import InputError, SessionError
from pipeline.kernels.kernel_selection import check_choice
from pipeline.kernels.runtime import set_num_threads
from pipeline.machines.machine import Machine
from pipeline.machines.offer import Offer, OfferState
from pipeline.machines.offer_line import OfferLine, is_place
from pipeline.machines.part_store import PartStore
from pipeline.machines.reception import receive_all
from pipeline.machines.served_stage import Compute
from pipeline.machines.visitor import address_of
from pipeline.tasks import open_tasks
from pipeline.units import GIB
from transport.dial_and_listen import Listener, TcpEndpoint, listen

logger = logging.getLogger(__name__)

PARTS_DIRECTORY = "parts"
LOCK_FILE = "machine.lock"
YES = {"y", "yes"}

app = new_app()


@app.callback()
def machine() -> None:
    """A machine of one's own: offer it, have it serve stages, run it as a service."""


@app.command("offer")
@takes_flags(flags=OfferFlags)
def offer_command(flags: OfferFlags) -> None:
    """Print one line for `pipeline-orch join` at home, wait for it, and serve from then on.

    The line is worth something once, for ten minutes, and holds a secret: carry it as you would a
    password. Before home is let in, its fingerprint is shown here and asked about.
    """
    if not flags.yes and not sys.stdin.isatty():
        raise InputError(
            "offer asks before it lets a home in; here nobody can be asked: give --yes"
        )
    address = flags.address
    if address is not None and not is_place(address):
        raise InputError(f"--address {address}: write HOST:PORT; stages connect at the next port")
    _run(flags.machine, flags, address)


@app.command("serve")
@takes_flags(flags=MachineFlags)
def serve_command(flags: MachineFlags) -> None:
    """Serve whichever stage a home that has joined names, from parts that are kept here."""
    _run(flags, None, None)


@app.command("service")
@takes_flags(flags=MachineFlags)
def service_command(flags: MachineFlags) -> None:
    """Print a systemd user unit that runs `stage-worker serve` with these flags."""
    print(_unit(flags), end="")


def _run(flags: MachineFlags, offering: OfferFlags | None, address: TcpEndpoint | None) -> None:
    configure_logging(verbose=flags.verbose, quiet=flags.quiet, log_format=flags.log_format)
    endpoint = flags.listen or DEFAULT_LISTEN
    if not isinstance(endpoint, TcpEndpoint):
        raise InputError(f"--listen {endpoint}: a machine of one's own is reached at HOST:PORT")
    directory = state_directory(os.environ)
    own = own_identity(directory, MACHINE_KEY)
    compute = _compute(flags)
    manager = ServiceManager()
    with _alone(directory), listen(endpoint) as listener:
        reached = replace(endpoint, port=_port(listener))
        with listen(replace(endpoint, port=_next_port(reached.port))) as data_in:
            quota = None if flags.disk is None else int(flags.disk * GIB)
            store = PartStore(directory / PARTS_DIRECTORY, quota)
            machine = Machine(own, directory, store, compute, software_version(), data_in)
            if offering is None and not machine.homes:
                raise InputError(
                    "no home has joined this machine yet; `stage-worker offer` lets one in"
                )

            async def main() -> None:
                offer = None
                if offering is not None:
                    offer = _open_offer(machine, offering, address or own_address(reached))
                logger.info(
                    "event=listening control=%s data_in=%s key=%s",
                    reached,
                    data_in.endpoint,
                    fingerprint(own.public_key().public_bytes_raw()),
                )
                async with open_tasks() as tasks:
                    tasks.start_soon(manager.keep_informed, lambda: True)
                    if offer is not None:
                        tasks.start_soon(_follow, offer, machine)
                    await receive_all(machine, listener, offer)

            async def leave() -> None:
                manager.stopping()
                await machine.leave()

            run_until_signalled(main, leave)


def _open_offer(machine: Machine, flags: OfferFlags, address: TcpEndpoint) -> Offer:
    line = OfferLine.new(address, machine.own.public_key().public_bytes_raw())

    async def ask(home: bytes) -> bool:
        tell("stage-worker", f"a home with the key {fingerprint(home)} has the line")
        if flags.yes:
            return True
        tell("stage-worker", "let it in, if `pipeline-orch join` shows the same there? [y/N]")
        answer = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        return answer.strip().lower() in YES

    offer = Offer(machine.own, line, machine.software, ask, machine.let_in)
    tell(
        "stage-worker",
        f"home will dial {address_of(line).host_port} and the next port; where a NAT or a firewall "
        "is before this machine, forward both, or run a `pipeline-relay` that reaches it, and give "
        "that address as --address",
    )
    tell("stage-worker", "within ten minutes, at home: pipeline-orch join LINE --model-dir DIR")
    print(line, flush=True)  # and nowhere else: what goes to stderr may be kept in a log
    if flags.qr:
        _show_qr(str(line))
    return offer


async def _follow(offer: Offer, machine: Machine) -> None:
    """Say how the offer ends. Raises SessionError where nobody can come in any more."""
    state = await offer.wait()
    if state is OfferState.USED:
        return
    if not machine.homes:
        raise SessionError(f"the offer is over: {state.value}; run `stage-worker offer` again")
    tell("stage-worker", f"the offer is over: {state.value}; serving those that joined before")


def _show_qr(line: str) -> None:
    try:
        import segno
    except ImportError as error:
        raise InputError("--qr needs a library: pip install segno") from error
    segno.make(line, error="l").terminal(compact=True)
    sys.stdout.flush()


def _compute(flags: MachineFlags) -> Compute:
    kernels = flags.kernels or "auto"
    check_choice(kernels)
    num_threads = flags.threads or len(os.sched_getaffinity(0))
    set_num_threads(num_threads)
    kv_bytes = None if flags.kv_memory is None else int(flags.kv_memory * GIB)
    return Compute(kernels, flags.device or "cpu", num_threads, kv_bytes)


def _port(listener: Listener) -> int:
    assert isinstance(listener.endpoint, TcpEndpoint)  # as it was asked for
    return listener.endpoint.port


def _next_port(port: int) -> int:
    if port == 65535:
        raise InputError("--listen: stages connect at the next port, and 65535 has none")
    return port + 1


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raises InputError where another process is this machine already."""
    try:
        with (directory / LOCK_FILE).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise InputError(
            f"another `stage-worker` is this machine already, by {directory}; stop it first"
        ) from error


UNIT = """\
# stage-worker service > ~/.config/systemd/user/veilpipe-machine.service
# systemctl --user enable --now veilpipe-machine; loginctl enable-linger
[Unit]
Description=veilpipe machine
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={command}
{environment}Restart=always
RestartSec=1
SuccessExitStatus=143
RestartPreventExitStatus=2
TimeoutStartSec=infinity
WatchdogSec=120
LimitNOFILE=4096

[Install]
WantedBy=default.target
"""


def _unit(flags: MachineFlags) -> str:
    words = [str(Path(sys.argv[0]).resolve()), "serve"]
    given = {
        "--listen": flags.listen,
        "--disk": flags.disk,
        "--kernels": flags.kernels,
        "--threads": flags.threads,
        "--device": flags.device,
        "--kv-memory": flags.kv_memory,
    }
    for name, value in given.items():
        if value is not None:
            words += [name, str(value)]
    state = os.environ.get("VEILPIPE_STATE_DIR")
    environment = f"Environment={_quoted(f'VEILPIPE_STATE_DIR={state}')}\n" if state else ""
    return UNIT.format(command=" ".join(map(_quoted, words)), environment=environment)


def _quoted(word: str) -> str:
    """A word of a unit, where % and quotes mean something."""
    if printable(word) != word:
        raise InputError(f"{word!r} cannot be written into a unit")
    return shlex.quote(word).replace("%", "%%")


def main() -> None:
    """Console entry point."""
    run_app(app, "stage-worker")
