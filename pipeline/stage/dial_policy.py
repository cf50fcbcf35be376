"""What a stage dials: what it was started for, whoever asks.

An orchestrator names the address of a stage's neighbour. Without a bound, one that is allowed to
connect could have the stage's machine open connections to whatever that reaches and others do not.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from pipeline.agreement.manifest import StageSpec
from pipeline.errors import InputError, SessionRefused
from transport.dial_and_listen import (
    VSOCK_UNDECIDED,
    Endpoint,
    Permit,
    TcpEndpoint,
    VsockEndpoint,
    parse_endpoint,
)
from transport.errors import EndpointError
from transport.frozen import frozen

Network = IPv4Network | IPv6Network

# Who listens for an enclave's dials: a Nitro parent, the host of any other virtual machine.
PARENT_CIDS = frozenset({2, 3})


@frozen
class Target:
    """An address that may be dialed, if `permit` lets pass what it stands for."""

    endpoint: Endpoint
    permit: Permit | None


@frozen
class DialPolicy:
    """What its manifest names for a stage, and what whoever started it has allowed."""

    spec: StageSpec
    networks: Sequence[Network] = ()

    def target(self, text: str) -> Target:
        """The address an orchestrator names. Raises SessionRefused where it may not be dialed."""
        try:
            endpoint = parse_endpoint(text)
        except EndpointError as error:
            raise SessionRefused(f"stage {self.spec.stage_idx} cannot dial: {error}") from error
        if self._is_named(endpoint):
            return Target(endpoint, None)
        if not isinstance(endpoint, TcpEndpoint) or not self.networks:
            raise self.refusal(endpoint)
        return Target(endpoint, self._permits)

    def refusal(self, endpoint: Endpoint) -> SessionRefused:
        """What to answer for an address that may not be dialed."""
        remedy = "allow it with --allow-dial"
        if not isinstance(endpoint, TcpEndpoint):
            remedy = "name it in the stage's own manifest"
        return SessionRefused(f"stage {self.spec.stage_idx} may not dial {endpoint}; {remedy}")

    def _is_named(self, endpoint: Endpoint) -> bool:
        addresses = self.spec.endpoint
        if addresses is not None:
            data_out = addresses.data_out
            named = None if data_out is None else data_out.to_endpoint()
            if not isinstance(named, VsockEndpoint) or named.cid != VSOCK_UNDECIDED:
                return endpoint == named
            # A template's, by which the parent is meant.
            return endpoint in {VsockEndpoint(cid, named.port) for cid in PARENT_CIDS}
        # Only the core of a manifest, in an enclave, which can reach nothing but its parent.
        return isinstance(endpoint, VsockEndpoint) and endpoint.cid in PARENT_CIDS

    def _permits(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self.networks)


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Networks like 10.0.0.0/8, or single addresses. Raises InputError naming --allow-dial."""
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise InputError(f"--allow-dial: {error}; write a network like 10.0.0.0/8") from error
