"""The maps a parent instance's relay needs, read from the manifest of the stages it hosts.

Stage I runs in the enclave of CID 16 + I, unless whoever has started it says another. It listens
for control and data on ports of its own, and sends what it computes to a port of its parent. What
is dialed from elsewhere, control and the first stage's data_in, has a TCP address of the parent, or
a vsock address that is dialed on the parent itself. CID 0 is one that launching decides.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from transport.dial_and_listen import (
    PARENT_CID,
    VSOCK_UNDECIDED,
    Endpoint,
    TcpEndpoint,
    VsockEndpoint,
    parse_endpoint,
)
from transport.errors import EndpointError
from transport.relay import RelayMap

FIRST_CID: Final = 16  # 0 to 2 are reserved, 3 is the parent; some stay free for other enclaves
CONTROL_PORT: Final = 5000
DATA_PORT: Final = 5001
_PARENT_CIDS: Final = (PARENT_CID, VSOCK_UNDECIDED)
MAX_MANIFEST_BYTES: Final = 4 << 20  # a thousand stages take one


def manifest_maps(
    path: Path,
    listen_host: str,
    results: Endpoint | None,
    max_connections: int,
    cids: Mapping[int, int] = MappingProxyType({}),
) -> tuple[RelayMap, ...]:
    """The maps for every stage of the manifest; what the last one sends goes to `results`, if any.

    `cids` are those of the started enclaves by stage, where they are not 16 + I.

    Raises: EndpointError naming the file, the field and what was expected there.
    """
    stages = _read_stages(path)
    for idx in cids:
        if idx >= len(stages):
            raise EndpointError(f"--cid {idx}: {path} has {len(stages)} stages")

    def inside(idx: int, port: int) -> VsockEndpoint:
        return VsockEndpoint(cids.get(idx, FIRST_CID + idx), port)

    maps: list[tuple[Endpoint, Endpoint]] = []
    for idx, stage in enumerate(stages):
        where = f"{path}: stage {idx}"
        for name, port in (("control", CONTROL_PORT), ("data_in", DATA_PORT)):
            address = _address(stage, name, where)
            is_dialed_from_outside = name == "control" or idx == 0
            if is_dialed_from_outside and isinstance(address, TcpEndpoint):
                # How others name this machine is not its concern.
                maps.append((TcpEndpoint(listen_host, address.port), inside(idx, port)))
            elif address not in _own(idx, inside(idx, port)):
                expected = f"{inside(idx, port)}{' or TCP' if is_dialed_from_outside else ''}"
                raise _unexpected(f"{where}'s {name}", address, expected)
        data_out = _address(stage, "data_out", where)
        if not isinstance(data_out, VsockEndpoint) or data_out.cid not in _PARENT_CIDS:
            raise _unexpected(f"{where}'s data_out", data_out, f"vsock:{PARENT_CID}:PORT")
        target = inside(idx + 1, DATA_PORT) if idx + 1 < len(stages) else results
        if target is not None:
            maps.append((VsockEndpoint(PARENT_CID, data_out.port), target))
    return tuple(RelayMap(listen, target, max_connections) for listen, target in maps)


def _own(idx: int, inside: VsockEndpoint) -> tuple[Endpoint, ...]:
    """How a manifest may name a port of that stage's enclave."""
    return (
        inside,
        *(VsockEndpoint(cid, inside.port) for cid in (VSOCK_UNDECIDED, FIRST_CID + idx)),
    )


def _read_stages(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise EndpointError(f"cannot read manifest {path}: {error.strerror}") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise EndpointError(f"manifest {path} is over {MAX_MANIFEST_BYTES} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EndpointError(f"manifest {path} is not JSON: {error}") from error
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, list) or not stages:
        raise EndpointError(f"manifest {path} has no list of stages")
    for idx, stage in enumerate(stages):
        if not isinstance(stage, dict) or stage.get("stage_idx") != idx:
            raise EndpointError(f"manifest {path}: stages[{idx}] is not the stage of that index")
    return stages


def _address(stage: dict[str, Any], name: str, where: str) -> Endpoint:
    endpoint = stage.get("endpoint")
    match endpoint.get(name) if isinstance(endpoint, dict) else None:
        case {"type": "tcp", "addr": str() as text}:
            address = parse_endpoint(text)
            if isinstance(address, TcpEndpoint):
                return address
        case {"type": "vsock", "cid": int() as cid, "port": int() as port}:
            return VsockEndpoint(cid, port)
    raise EndpointError(f"{where} has no TCP or vsock address for {name}")


def _unexpected(where: str, found: Endpoint, expected: str) -> EndpointError:
    return EndpointError(
        f"{where} is {found}, expected {expected}; `pipeline-orch plan --vsock` writes such a "
        "manifest, and --map takes any addresses"
    )
