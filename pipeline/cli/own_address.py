"""By which address others reach this machine, as far as it can know."""

import fcntl
import socket
import struct
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path

from pipeline.errors import InputError
from transport.dial_and_listen import TcpEndpoint

_WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 (what is looked for)
# Of documentation networks: nothing is sent there, but the system says by which way it would be.
_FAR = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24s")
# A line an address: hexadecimal, interface, prefix, scope, flags, name.
_IF_INET6 = Path("/proc/net/if_inet6")
_GLOBAL_SCOPE = "00"


def own_address(listening: TcpEndpoint) -> TcpEndpoint:
    """The address to tell others. Raises InputError where none is found."""
    if listening.host not in _WILDCARDS:
        return listening
    family = socket.AF_INET6 if listening.host == "::" else socket.AF_INET
    for known, far in _FAR:
        if known is family:
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                return TcpEndpoint(probe.getsockname()[0], listening.port)
    found = _of_an_interface if family is socket.AF_INET else _of_an_interface_6
    if (host := found()) is not None:
        return TcpEndpoint(host, listening.port)
    raise InputError("this machine has no address that others reach; give one with --address")


def _of_an_interface() -> str | None:
    """The first IPv4 address that is not loopback's: a network without a way out has no default."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = _IFREQ.pack(name.encode(), b"")
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
                if (host := socket.inet_ntoa(found)) and not host.startswith("127."):
                    return host
    return None


def _of_an_interface_6() -> str | None:
    """The first IPv6 address that others reach, beyond their own link too."""
    with suppress(OSError):
        for line in _IF_INET6.read_text().splitlines():
            address, _, _, scope, *_ = line.split()
            if scope == _GLOBAL_SCOPE:
                return str(IPv6Address(bytes.fromhex(address)))
    return None
