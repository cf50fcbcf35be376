"""What home is told of machines that it does not reach."""

import pytest
import trio

from pipeline.errors import SessionError
from pipeline.machines import visitor
from pipeline.machines.visitor import Address, visiting
from transport.dial_and_listen import TcpEndpoint


async def test_who_does_not_let_itself_be_dialed_may_be_behind_a_nat_and_is_offered_the_relay(
    rig, monkeypatch, autojump_clock
):
    async def silent(_):
        await trio.sleep_forever()

    address = Address(TcpEndpoint("192.0.2.1", 9000), bytes(32))
    monkeypatch.setattr(visitor, "dial", silent)
    offered = r"192\.0\.2\.1:9000: the peer was silent .* NAT .* `pipeline-relay` that reaches it"
    with pytest.raises(SessionError, match=offered):
        async with visiting(address, rig.home):
            pass
