"""The flags of a machine of one's own."""

from typing import Annotated

from pydantic import Field

from pipeline.cli.compute_options import DeviceFlag, KernelsFlag, KvMemoryFlag
from pipeline.cli.logs import LogFormat
from pipeline.cli.settings import Address, Finite, Flag, Settings
from pipeline.cli.shared_options import LogFormatFlag, QuietFlag, VerboseFlag
from transport.dial_and_listen import TcpEndpoint

DEFAULT_LISTEN = TcpEndpoint("0.0.0.0", 9000)  # noqa: S104 (a machine is there to be reached)


class MachineFlags(Settings):
    """Where a machine is reached, how it computes, and how much it keeps."""

    listen: Annotated[
        Address | None,
        Flag("ADDR", "HOST:PORT to listen at; stages connect at the next [0.0.0.0:9000]."),
    ] = None
    disk: Annotated[
        Annotated[Finite, Field(ge=0.001, le=1 << 20)] | None,
        Flag("GIB", "For parts of models [what is free]."),
    ] = None
    kernels: KernelsFlag = None
    threads: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None, Flag("N", "Threads [every CPU's].")
    ] = None
    device: DeviceFlag = None
    kv_memory: KvMemoryFlag = None
    verbose: VerboseFlag = False
    quiet: QuietFlag = False
    log_format: LogFormatFlag = LogFormat.TEXT


class OfferFlags(Settings):
    """How to offer it."""

    machine: MachineFlags
    address: Annotated[
        Address | None, Flag("ADDR", "HOST:PORT by which others reach it [found out].")
    ] = None
    yes: Annotated[
        bool, Flag(None, "Let the first in that has the line, unasked.", is_by_hand=True)
    ] = False
    qr: Annotated[bool, Flag(None, "Show the line as a QR code, too.")] = False
