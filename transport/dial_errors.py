"""What the system refused about an address, as its user reads it: the cause and a remedy."""

import errno
import socket
from typing import Final

from transport.address import Endpoint, TcpEndpoint, UnixEndpoint
from transport.errors import EndpointError


def vsock_family(endpoint: Endpoint) -> int:
    """The number of AF_VSOCK. Raises: EndpointError where this system has none."""
    family = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise EndpointError(f"cannot use {endpoint}: this system has no vsock; use TCP or UNIX")
    return int(family)


def unresolvable(endpoint: TcpEndpoint, error: Exception) -> EndpointError:
    """For a host name that names no address."""
    cause = getattr(error, "strerror", None) or str(error)
    return EndpointError(
        f"cannot resolve host {endpoint.host!r} of {endpoint}: {cause}; check the name"
    )


_REMEDIES: Final = {
    errno.ECONNREFUSED: "start the listener first, or correct the address",
    errno.ENOENT: "start the listener first, or correct the path",
    errno.EADDRINUSE: "stop what listens there, or choose another address",
    errno.EADDRNOTAVAIL: "choose an address of this machine",
    errno.EACCES: "choose another port or path, or ask for the permission",
    errno.EAGAIN: "its queue of connections is full; try again",
    errno.ETIMEDOUT: "check that the machine is up and no firewall is in between",
    errno.EHOSTUNREACH: "check the address and the route to it",
    errno.ENETUNREACH: "check the address and the route to it",
    errno.ENODEV: "check that the enclave of this CID is running",
    errno.ECONNRESET: "check that the enclave is up and listens on this port",
    errno.EAFNOSUPPORT: "this kernel lacks the address family; load its module or use TCP",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def failed(action: str, endpoint: Endpoint, error: OSError) -> EndpointError:
    """For a system call; `action` is what it was for, such as `dial`."""
    cause = error.strerror or str(error)
    if isinstance(endpoint, UnixEndpoint) and endpoint.port is not None:  # a bridge has two files
        cause = f"{endpoint.path if action == 'dial' else endpoint.listen_path}: {cause}"
    remedy = _REMEDIES.get(error.errno or 0, "check the address")
    return EndpointError(f"cannot {action} {endpoint}: {cause}; {remedy}")
