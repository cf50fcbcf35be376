"""Where stages are: addresses as a manifest writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from transport.dial_and_listen import (
    Endpoint,
    TcpEndpoint,
    UnixEndpoint,
    VsockEndpoint,
    parse_endpoint,
)
from transport.errors import EndpointError

# What to answer whoever names an address for results that nobody sends.
FETCHES = "the manifest has the last stage dialed for its results; none arrive at an address here"


class Strict(BaseModel):
    """Frozen, and taken from JSON as it stands."""

    # Strict: "30", 30.0 and true are no integers, so two readers cannot disagree about them.
    # Built when first used: a command reads few of its kinds.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), defer_build=True
    )


class TcpAddress(Strict):
    """A TCP address, HOST:PORT."""

    type: Literal["tcp"]
    addr: str

    def to_endpoint(self) -> Endpoint:
        """The address as the transport takes it. Raises EndpointError."""
        endpoint = parse_endpoint(self.addr)
        if not isinstance(endpoint, TcpEndpoint):
            raise EndpointError(f"{self.addr!r} is not a TCP address; write HOST:PORT")
        return endpoint


class VsockAddress(Strict):
    """A vsock address: an enclave's CID and a port."""

    type: Literal["vsock"]
    cid: Annotated[int, Field(ge=0, lt=2**32)]
    port: Annotated[int, Field(ge=0, lt=2**32)]

    def to_endpoint(self) -> Endpoint:
        """The address as the transport takes it."""
        return VsockEndpoint(self.cid, self.port)


class UnixAddress(Strict):
    """A UNIX socket; with `port`, the hybrid vsock that hypervisors offer on the host's side."""

    type: Literal["unix"]
    path: str
    port: Annotated[int, Field(ge=0, lt=2**32)] | None = None

    def to_endpoint(self) -> Endpoint:
        """The address as the transport takes it."""
        return UnixEndpoint(Path(self.path), self.port)


Address = Annotated[TcpAddress | VsockAddress | UnixAddress, Field(discriminator="type")]


class StageEndpoint(Strict):
    """Addresses of a stage, each named from the side of whoever dials it."""

    control: Address
    data_in: Address
    # None, of the last stage alone: the orchestrator dials its `data_in` for the results, too.
    data_out: Address | None = None

    @model_validator(mode="after")
    def _addresses_parse(self) -> Self:
        for name in ("control", "data_in", "data_out"):
            try:
                if (address := getattr(self, name)) is not None:
                    address.to_endpoint()
            except EndpointError as error:
                raise ValueError(f"{name}: {error}") from error
        return self


def check_targets(endpoints: Sequence[StageEndpoint | None]) -> None:
    """Raises ValueError where a stage other than the last names nobody to dial."""
    for position, endpoint in enumerate(endpoints[:-1]):
        if endpoint is not None and endpoint.data_out is None:
            raise ValueError(
                f"stages[{position}] has no data_out; only the last stage may leave that out"
            )
