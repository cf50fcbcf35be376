"""The maps a parent instance's relay needs, read from the manifest of the stages it hosts.

Stage I runs in the enclave of CID 16 + I. It listens for control and data on ports of its own, and
sends what it computes to a port of its parent. In such a manifest the control addresses and the
first stage's data_in are TCP addresses of the parent, all others are vsock.
"""

import json
from pathlib import Path
from typing import Any, Final

from transport.dial_and_listen import Endpoint, TcpEndpoint, VsockEndpoint, parse_endpoint
from transport.errors import EndpointError
from transport.relay import RelayMap

FIRST_CID: Final = 16  # 0 to 2 are reserved, 3 is the parent; some stay free for other enclaves
PARENT_CID: Final = 3
CONTROL_PORT: Final = 5000
DATA_PORT: Final = 5001
MAX_MANIFEST_BYTES: Final = 4 << 20  # a thousand stages take one


def manifest_maps(
    path: Path, listen_host: str, results: Endpoint | None, max_connections: int
) -> tuple[RelayMap, ...]:
    """The maps for every stage of the manifest; what the last one sends goes to `results`, if any.

    Raises: EndpointError naming the file, the field and what was expected there.
    """
    stages = _read_stages(path)
    maps: list[tuple[Endpoint, Endpoint]] = []
    for idx, stage in enumerate(stages):
        where = f"{path}: stage {idx}"
        control = _tcp(_address(stage, "control", where), f"{where}'s control")
        maps.append((_on(listen_host, control), VsockEndpoint(FIRST_CID + idx, CONTROL_PORT)))
        data_in = _address(stage, "data_in", where)
        own = VsockEndpoint(FIRST_CID + idx, DATA_PORT)
        if idx == 0:
            maps.append((_on(listen_host, _tcp(data_in, f"{where}'s data_in")), own))
        elif data_in != own:
            raise _unexpected(f"{where}'s data_in", data_in, str(own))
        data_out = _address(stage, "data_out", where)
        if not isinstance(data_out, VsockEndpoint) or data_out.cid != PARENT_CID:
            raise _unexpected(f"{where}'s data_out", data_out, f"vsock:{PARENT_CID}:PORT")
        following = VsockEndpoint(FIRST_CID + idx + 1, DATA_PORT)
        target: Endpoint | None = following if idx + 1 < len(stages) else results
        if target is not None:
            maps.append((data_out, target))
    return tuple(RelayMap(listen, target, max_connections) for listen, target in maps)


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


def _tcp(address: Endpoint, where: str) -> TcpEndpoint:
    if not isinstance(address, TcpEndpoint):
        raise _unexpected(where, address, "a TCP address of this machine")
    return address


def _on(host: str, address: TcpEndpoint) -> TcpEndpoint:
    """The address as this machine listens on it: how others name the machine is not its concern."""
    return TcpEndpoint(host, address.port)


def _unexpected(where: str, found: Endpoint, expected: str) -> EndpointError:
    return EndpointError(
        f"{where} is {found}, expected {expected}; `pipeline-orch plan --vsock` writes such a "
        "manifest, and --map takes any addresses"
    )
