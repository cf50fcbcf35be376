"""Options that several commands have, and what reads them."""

import math
from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from transport.dial_and_listen import Endpoint, TcpEndpoint, parse_endpoint
from transport.errors import EndpointError

ManifestOption = Annotated[
    Path, typer.Option("--manifest", metavar="FILE", help="Manifest all parties share (JSON).")
]
DevOption = Annotated[
    bool,
    typer.Option(
        "--dev",
        help="Development: evidence from a local CA instead of attestation. No privacy from hosts.",
    ),
]
DataOutPortOption = Annotated[
    int | None,
    typer.Option(
        "--data-out-port",
        min=1,
        max=65535,
        metavar="PORT",
        help="Port of results instead of the manifest's, on the same host.",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log every step to stderr; never any content.")
]


def finite(value: float | None) -> float | None:
    """Callback of an option that takes a number: `nan` and `inf` pass every bound of typer's.

    Raises typer.BadParameter.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number of that kind")
    return value


def to_endpoint(text: str | None, option: str) -> Endpoint | None:
    """Parse an address flag. Raises InputError naming the flag."""
    if text is None:
        return None
    try:
        return parse_endpoint(text)
    except EndpointError as error:
        raise InputError(f"{option}: {error}") from error


def results_address(
    manifest: Manifest, stage_idx: int, address: Endpoint | None, port: int | None
) -> Endpoint | None:
    """Where a stage's results go by the flags for that, `port` on the manifest's host.

    None where no flag says so. Raises InputError.
    """
    if port is None:
        return address
    if address is not None:
        raise InputError("--data-out-port: the other flag for results names a port already")
    named = manifest.endpoint(stage_idx).data_out.to_endpoint()
    if not isinstance(named, TcpEndpoint):
        raise InputError(f"--data-out-port {port}: results go to {named}, which is no TCP address")
    return TcpEndpoint(named.host, port)
