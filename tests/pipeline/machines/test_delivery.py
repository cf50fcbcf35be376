"""Parts go to the machines that a manifest names, as they were cut, and where there is room."""

import re

import pytest

from pipeline.errors import InputError, SessionError
from pipeline.machines.delivery import deliver, machines_of
from pipeline.planning.plan import PlanOptions, plan
from tests.pipeline.machines.test_machine import machines, quietly, written


async def test_nothing_is_sent_to_a_disk_on_which_the_part_does_not_fit(rig, tiny_model):
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        sizes = {path: path.stat().st_size for _, path in cluster.deliveries[0].files}
        largest = max(sizes, key=sizes.get)
        machine.store._quota_bytes = sum(sizes.values()) - 1
        need, free = sizes[largest] / 1e6, (sizes[largest] - 1) / 1e6
        said = (
            f"{machine.address.host_port} refuses: {need:.1f} MB do not fit, {free:.1f} MB are free"
        )
        with pytest.raises(SessionError, match=re.escape(said)):
            await deliver(rig.home, cluster.deliveries, quietly, quietly)
        stored = sum(part.num_bytes for part in machine.store.parts())
        assert machine.store.free_bytes() == machine.store._quota_bytes - stored
        assert stored == sum(sizes.values()) - sizes[largest]
        machine.store._quota_bytes += 1
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        assert machine.served is not None


async def test_a_part_that_has_changed_at_home_is_named_with_what_to_do(rig, tiny_model):
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        path = cluster.parts / "stage0" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"model\.safetensors has changed .*--model-dir"):
            await deliver(rig.home, cluster.deliveries, quietly, quietly)


def test_manifests_that_name_no_machines_are_refused(tiny_model):
    with pytest.raises(InputError, match="names no machine of your own"):
        machines_of(plan(tiny_model, PlanOptions(2)))
