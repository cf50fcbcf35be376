"""How stages are dialed: where they are at that moment, and what their silence means."""

import pytest
import trio

from pipeline.agreement.addresses import StageEndpoint, TcpAddress
from pipeline.agreement.trust_policy import DevTrust
from pipeline.engine.limits import Limits
from pipeline.errors import StageHung, StageSilent
from pipeline.orchestrator.connector import Connector
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.time_limits import TimeLimits
from transport.dial_and_listen import TcpEndpoint, listen

LOOPBACK = TcpEndpoint("127.0.0.1", 0)


class Somewhere:
    """A placement whose only stage is where it is said to be."""

    def __init__(self, port):
        self.port = port
        self.num_asked = 0

    def where(self, stage_idx):
        self.num_asked += 1
        at = TcpAddress(type="tcp", addr=f"127.0.0.1:{self.port}")
        return StageEndpoint(control=at, data_in=at, data_out=at)


@pytest.fixture
def connector(tiny_model, tmp_path):
    with listen(LOOPBACK) as closed:
        placement = Somewhere(closed.endpoint.port)
    manifest = plan(tiny_model, PlanOptions(1))
    limits = Limits(1, 64).for_session(manifest.activation_spec.codec)
    trust = DevTrust.create(tmp_path / "dev")
    times = TimeLimits(handshake_seconds=0.3)
    return Connector(manifest, trust, limits, placement, lambda line: None, times), placement


async def test_a_stage_is_absent_until_it_takes_a_connection_and_looked_for_where_it_is_now(
    connector,
):
    connector, placement = connector

    async def meet():
        with pytest.raises(StageSilent, match="stage 0's control channel at"):
            await connector.control(0)

    with trio.fail_after(120), listen(LOOPBACK) as elsewhere:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meet)
            while placement.num_asked < 3:  # noqa: ASYNC110 - there is no event for it
                await trio.sleep(0.01)
            assert connector.absent == {0}
            assert str(placement.port) in connector.pending["stage 0's control channel"]
            placement.port = elsewhere.endpoint.port
    assert connector.absent == set()


async def test_silence_in_a_handshake_is_another_thing_than_a_stage_that_hangs(connector):
    """Strangers can cause it; nobody else can be silent on a stage's own control channel."""
    connector, placement = connector
    with listen(LOOPBACK) as full:
        placement.port = full.endpoint.port
        with pytest.raises(StageSilent) as caught:
            await connector.control(0)
    assert not isinstance(caught.value, StageHung)
    assert str(placement.port) in connector.pending["stage 0's control channel"]
