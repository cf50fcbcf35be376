"""Flags that several commands have, and what reads them."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from pipeline.agreement.addresses import FETCHES
from pipeline.agreement.manifest import Manifest
from pipeline.cli.logs import LogFormat
from pipeline.cli.settings import Flag, Port
from pipeline.errors import InputError
from transport.dial_and_listen import (
    PARENT_CID,
    VSOCK_UNDECIDED,
    Endpoint,
    UnixEndpoint,
    VsockEndpoint,
    parse_cids,
)
from transport.errors import EndpointError

MANIFEST_HELP = "Manifest all parties share (JSON)."
ManifestOption = Annotated[Path, typer.Option("--manifest", metavar="FILE", help=MANIFEST_HELP)]
ManifestFlag = Annotated[Path, Flag("FILE", MANIFEST_HELP)]
DataOutPortFlag = Annotated[
    Port | None, Flag("PORT", "Port of results instead of the manifest's, on the same host.")
]
VerboseFlag = Annotated[
    bool, Flag(None, "Log every step to stderr; never any content.", ("--verbose", "-v"))
]
QuietFlag = Annotated[bool, Flag(None, "Log warnings and errors only.", ("--quiet", "-q"))]
LogFormatFlag = Annotated[LogFormat, Flag("FORMAT", "Log lines: key=value text, or json objects.")]
MAX_CONTEXT_VARIABLE = "INFEMERAL_SERVER_MAX_CONTEXT_LENGTH"
Context = Annotated[int, Field(ge=2)]
ContextFlag = Annotated[
    Context | None,
    Flag("N", "Room for prompt and text [as needed].", older=(MAX_CONTEXT_VARIABLE,)),
]


def finite(value: float | None) -> float | None:
    """Callback of an option that takes a number: `nan` and `inf` pass every bound of typer's.

    Raises typer.BadParameter.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number of that kind")
    return value


def read_cids(texts: Iterable[str]) -> dict[int, int]:
    """The CIDs of started enclaves, by stage. Raises InputError."""
    try:
        return parse_cids(texts)
    except EndpointError as error:
        raise InputError(str(error)) from error


def results_address(
    manifest: Manifest, stage_idx: int, address: Endpoint | None, port: int | None
) -> Endpoint | None:
    """Where a stage's results go by the flags for that, `port` on the manifest's host.

    None where no flag says so. Raises InputError.
    """
    endpoint = manifest.stage(stage_idx).endpoint
    if (address or port) and endpoint is not None and endpoint.data_out is None:
        raise InputError(FETCHES)
    if port is None:
        return address
    if address is not None:
        raise InputError("--data-out-port: the other flag for results names a port already")
    data_out = manifest.endpoint(stage_idx).data_out
    named = None if data_out is None else data_out.to_endpoint()
    if named is None or isinstance(named, UnixEndpoint):
        raise InputError(f"--data-out-port {port}: results go to {named}, which has no such port")
    if named == VsockEndpoint(VSOCK_UNDECIDED, named.port):
        named = replace(named, cid=PARENT_CID)
    return replace(named, port=port)
