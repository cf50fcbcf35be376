"""What home finds out of its machines, and of the ways between them."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from pipeline.agreement.identity import ORCHESTRATOR_KEY, own_identity
from pipeline.cli.cluster_plan import ClusterPlan
from pipeline.cli.shard_directories import parts_dir, stage_dir
from pipeline.errors import InputError, SessionError
from pipeline.machines.delivery import deliver, deliveries
from pipeline.machines.measure import measure
from pipeline.machines.survey import HOME, survey
from pipeline.machines.visitor import Address
from tests.pipeline.conftest import Tap, reserve
from tests.pipeline.machines.conftest import SOFTWARE, two_ports
from tests.pipeline.machines.test_machine import (
    generate,
    machines,
    quietly,
    reference,
    written,
)


async def test_a_survey_tells_what_machines_have_and_how_far_they_are(rig, monkeypatch):
    monkeypatch.setattr("pipeline.machines.visits.measure", partial(measure, seconds=0.05))
    async with machines(rig, "a", "b") as both:
        addresses = [machine.address for machine in both]
        home = reserve()
        found = await survey(addresses, rig.home, 16, SOFTWARE, home, quietly)
        with pytest.raises(InputError, match=r"runs veilpipe 1\.2\.3, this one 2\.0"):
            await survey(addresses, rig.home, 16, "2.0", home, quietly)
        fetched = await survey(addresses, rig.home, 16, SOFTWARE, None, quietly)
        assert fetched.ways.keys() == found.ways.keys()
        stranger = own_identity(rig.directory / "stranger", ORCHESTRATOR_KEY)
        with pytest.raises(SessionError, match="does not know this home"):
            await survey(addresses, stranger, 16, SOFTWARE, home, quietly)
    assert set(found.ways) == {(0, 1), (1, 0), (0, HOME), (1, HOME), (HOME, 0), (HOME, 1)}
    for way in found.ways.values():
        assert 0 < way.round_trip_seconds < 60
        assert way.bytes_per_second > 1e3
    for machine in found.machines:
        assert machine.measured.bytes_per_second > 1e6
        assert machine.measured.flops > 1e6
        assert machine.description.memory_bytes > 1 << 20
        assert machine.home == home


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
async def test_machines_at_ipv6_addresses_are_joined_like_others(rig, tiny_model, monkeypatch):
    monkeypatch.setattr("pipeline.machines.visits.measure", partial(measure, seconds=0.05))
    async with machines(rig, "a", "b", host="::1") as both:
        addresses = [machine.address for machine in both]
        found = await survey(addresses, rig.home, 16, SOFTWARE, None, quietly)
        assert len(found.ways) == 6
        assert {machine.home for machine in found.machines} == {None}
        cluster = written(rig, tiny_model, both)
        assert "[::1]:" in cluster.path.read_text()
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        assert await generate(rig, cluster) == reference(tiny_model)


async def test_a_machine_is_reached_by_other_ports_that_are_carried_to_its_own(
    rig, tiny_model, monkeypatch
):
    monkeypatch.setattr("pipeline.machines.visits.measure", partial(measure, seconds=0.05))
    with ExitStack() as stack:
        fronts = two_ports(stack, "127.0.0.1")
        async with machines(rig, "a") as (machine,), trio.open_nursery() as nursery:
            for front, behind in zip(fronts, (machine.control, machine.data_in), strict=True):
                nursery.start_soon(Tap().serve, "carried", front, behind.endpoint)
            place = Address(fronts[0].endpoint, machine.address.key)
            cluster = ClusterPlan(tiny_model, rig.directory / "c.json", "float32", rig.home)
            found = await survey([place], rig.home, 16, SOFTWARE, None, quietly)
            manifest = cluster.write(found, cluster.split(found))
            assert manifest.stages[0].endpoint.data_in.to_endpoint() == fronts[1].endpoint
            directory = partial(stage_dir, parts_dir(cluster.output))
            await deliver(
                rig.home, deliveries(manifest, cluster.output, directory), quietly, quietly
            )
            assert await generate(rig, SimpleNamespace(manifest=manifest)) == reference(tiny_model)
            nursery.cancel_scope.cancel()


async def test_machines_that_do_not_reach_each_other_are_found_out(rig, monkeypatch):
    monkeypatch.setattr("pipeline.machines.visits.measure", partial(measure, seconds=0.05))
    async with machines(rig, "a", "b") as (first, second):
        first.data_in.close()
        found = await survey(
            [first.address, second.address], rig.home, 16, SOFTWARE, reserve(), quietly
        )
        fetched = await survey([first.address], rig.home, 16, SOFTWARE, None, quietly)
    assert "cannot dial" in fetched.problems[HOME, 0]
    assert not fetched.ways
    assert (1, 0) not in found.ways
    assert (0, 1) in found.ways
    assert "cannot dial" in found.problems[1, 0]
