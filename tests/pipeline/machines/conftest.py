"""Machines in this process, each with a directory and two ports of its own, and a home."""

import random
from contextlib import ExitStack, asynccontextmanager

import pytest
import trio

from pipeline.agreement.identity import MACHINE_KEY, ORCHESTRATOR_KEY, own_identity
from pipeline.machines.machine import Machine
from pipeline.machines.offer import Offer
from pipeline.machines.offer_line import OfferLine
from pipeline.machines.part_store import PartStore
from pipeline.machines.reception import receive_all
from pipeline.machines.served_stage import Compute
from pipeline.machines.visitor import Address
from transport.dial_and_listen import TcpEndpoint, listen
from transport.errors import EndpointError

SOFTWARE = "1.2.3"


def two_ports(stack, host):
    """Listeners on a port and the next one."""
    for port in random.sample(range(10000, 16000, 2), 100):
        try:
            first = listen(TcpEndpoint(host, port))
        except EndpointError:
            continue
        try:
            second = listen(TcpEndpoint(host, port + 1))
        except EndpointError:
            first.close()
            continue
        return stack.enter_context(first), stack.enter_context(second)
    raise AssertionError("no free ports")


class Rig:
    def __init__(self, directory):
        self.directory = directory
        self.home = own_identity(directory / "home", ORCHESTRATOR_KEY)

    @property
    def home_key(self):
        return self.home.public_key().public_bytes_raw()

    @asynccontextmanager
    async def machine(self, name, *, offers=None, knows_home=True, quota=1 << 30, host="127.0.0.1"):
        """A machine; `offers`: what is asked when a home comes with its line."""
        directory = self.directory / name
        own = own_identity(directory, MACHINE_KEY)
        with ExitStack() as stack:
            control, data_in = two_ports(stack, host)
            store = PartStore(directory / "parts", quota)
            compute = Compute("auto", "cpu", 1, 64 << 20)
            machine = Machine(own, directory, store, compute, SOFTWARE, data_in)
            key = own.public_key().public_bytes_raw()
            machine.control = control
            machine.address = Address(control.endpoint, key)
            if knows_home:
                machine.let_in(self.home_key)
            offer = None
            if offers is not None:
                machine.line = OfferLine.new(control.endpoint, key)
                offer = Offer(own, machine.line, SOFTWARE, offers, machine.let_in)
                machine.offer = offer
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive_all, machine, control, offer)
                yield machine
                nursery.cancel_scope.cancel()


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)
