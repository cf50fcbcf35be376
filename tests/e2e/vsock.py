"""vsock between processes that stand for machines: a CID and a port are a UNIX socket's name.

As between a Nitro instance and its enclaves, an enclave reaches its parent and nothing else.
"""

import errno
import os
import socket
from pathlib import Path

from transport import dial_and_listen
from transport.dial_and_listen import PARENT_CID, VSOCK_ANY
from transport.dial_errors import failed

VARIABLE = "TEST_VSOCK"


def machine(directory, cid):
    """What a process's environment has to say for it to be the machine of that CID."""
    return {VARIABLE: f"{cid}@{directory}"}


def install(text):
    """Be that machine from now on."""
    cid, _, directory = text.partition("@")
    own, connect, bind = int(cid), dial_and_listen._connect, dial_and_listen._bind

    def path(cid, port):
        return str(Path(directory) / f"{cid}_{port}")

    async def connect_here(endpoint, family, address):
        if family != socket.AF_VSOCK:
            return await connect(endpoint, family, address)
        if PARENT_CID not in {own, address[0]}:
            raise failed("dial", endpoint, OSError(errno.ENODEV, os.strerror(errno.ENODEV)))
        return await connect(endpoint, socket.AF_UNIX, path(*address))

    def bind_here(endpoint, family, address):
        if family != socket.AF_VSOCK:
            return bind(endpoint, family, address)
        cid, port = address
        if cid not in {own, VSOCK_ANY}:
            text = os.strerror(errno.EADDRNOTAVAIL)
            raise failed("listen on", endpoint, OSError(errno.EADDRNOTAVAIL, text))
        bound = bind(endpoint, socket.AF_UNIX, path(own, port))
        return _Bound((cid, port), bound.detach())

    dial_and_listen._connect, dial_and_listen._bind = connect_here, bind_here


class _Bound(socket.socket):
    def __init__(self, name, descriptor):
        super().__init__(fileno=descriptor)
        self._name = name

    def getsockname(self):
        return self._name
