"""A machine's visits: parts come whole or go on where they were cut, stages serve their home."""

import hashlib
import json
import weakref
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import trio
from safetensors.numpy import load_file

from pipeline.agreement.identity import (
    MACHINE_KEY,
    ORCHESTRATOR_KEY,
    own_identity,
    public_hex,
)
from pipeline.agreement.manifest import build_manifest, dump_manifest, parse_manifest
from pipeline.agreement.trust_policy import UserTrust
from pipeline.cli.shard_directories import stage_dir
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.errors import SessionError
from pipeline.kernels import base
from pipeline.machines import visitor
from pipeline.machines.delivery import deliver, deliveries
from pipeline.machines.machine import Machine
from pipeline.machines.served_stage import load_served
from pipeline.machines.visitor import visiting
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams

PROMPT = tuple(range(100, 132))


def tcp(endpoint):
    return {"type": "tcp", "addr": str(endpoint).removeprefix("tcp:")}


def written(rig, tiny_model, machines, name="cluster", **changes):
    """The manifest of a model over machines, cut and written as `join` does it."""
    options = PlanOptions(
        len(machines), orchestrator_keys=(public_hex(rig.home),), precision="float32"
    )
    fields = json.loads(dump_manifest(plan(tiny_model, options)))
    for stage, machine, after in zip(
        fields["stages"], machines, [*machines[1:], None], strict=True
    ):
        stage["machine_keys"] = [machine.address.key.hex()]
        stage["kernels"] = machine.kernels(16).name
        stage["endpoint"] = {
            "control": tcp(machine.address.endpoint),
            "data_in": tcp(machine.data_in.endpoint),
        }
        if after is not None:
            stage["endpoint"]["data_out"] = tcp(after.data_in.endpoint)
    fields |= changes
    parts = rig.directory / f"{name}.parts"
    manifest = cut_model(build_manifest(fields, "test"), tiny_model, parts, "float32")
    path = rig.directory / f"{name}.json"
    path.write_text(dump_manifest(manifest))
    everything = deliveries(manifest, path, partial(stage_dir, parts))
    return SimpleNamespace(manifest=manifest, path=path, parts=parts, deliveries=everything)


async def generate(rig, cluster, own=None):
    identity = rig.directory / "home" / ORCHESTRATOR_KEY
    trust = UserTrust.create(cluster.manifest, identity)
    limits = Limits(1, 256, chunk_tokens=16, num_stages=len(cluster.manifest.stages))
    options = PipelineOptions(limits, times=TimeLimits(connect_seconds=10))
    engine, tokens = PipelineEngine(limits), []
    generation = Generation(PROMPT, 12, frozenset(), SamplingParams())
    engine.submit(generation, lambda output: tokens.append(output.token_id))
    async with open_pipeline(cluster.manifest, trust, options, lambda line: None) as pipeline:
        await engine.drain(pipeline)
    return tokens


def reference(tiny_model, prompt=PROMPT):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@asynccontextmanager
async def machines(rig, *names, **options):
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(rig.machine(name, **options)) for name in names]


def quietly(_):
    return None


async def test_machines_get_their_own_parts_and_serve_them_now_and_after_a_restart(rig, tiny_model):
    async with machines(rig, "a", "b") as both:
        cluster = written(rig, tiny_model, both)
        told = []
        await deliver(rig.home, cluster.deliveries, quietly, told.append)
        assert len(told) == 2
        assert await generate(rig, cluster) == reference(tiny_model)
        await deliver(rig.home, cluster.deliveries, quietly, told.append)
        assert all("0.0 MB sent" in line for line in told[2:])
        digests = [{part.digest for part in machine.store.parts()} for machine in both]
    for idx, stored in enumerate(digests):
        config, (weights,) = (
            cluster.manifest.config_hash,
            cluster.manifest.stages[idx].weight_hashes,
        )
        whole = hashlib.sha256(cluster.path.read_bytes()).hexdigest()
        assert stored == {config, weights, whole}
    tensors = [load_file(rig.directory / name / "stage" / "model.safetensors") for name in "ab"]
    assert not {name for name in tensors[0] if ".layers.2" in name or ".layers.3" in name}
    assert not {name for name in tensors[1] if ".layers.0" in name or ".layers.1" in name}
    # Elsewhere, by its key: what is served is remembered, and where it listens is not.
    async with machines(rig, "a", "b") as again:
        with trio.fail_after(120):
            await until(lambda: all(machine.served for machine in again))
        assert [machine.served.order.stage_idx for machine in again] == [0, 1]


async def until(condition):
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


class Cut(Exception):
    """The link that a test cuts."""


async def test_a_push_that_is_cut_goes_on_where_it_was(rig, monkeypatch):
    data = bytes(range(256)) * 4096 * 5
    path = rig.directory / "part"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(visitor, "WINDOW_BYTES", 1 << 20)
    from pipeline.machines import visits

    monkeypatch.setattr(visits, "WINDOW_BYTES", 1 << 20)

    def cut_after_two(done, total):
        if done == 2 << 20:
            raise Cut

    async with rig.machine("a") as machine:
        with pytest.raises(Cut):
            async with visiting(machine.address, rig.home) as visit:
                await visit.put(digest, path, cut_after_two)
        assert machine.store.parts() == []
        with trio.fail_after(120):
            await until(lambda: not machine.store._coming)
        async with visiting(machine.address, rig.home) as visit:
            assert await visit.put(digest, path) == 3 << 20
            assert await visit.put(digest, path) == 0
            assert [part.digest for part in await visit.parts()] == [digest]
            await visit.remove([digest])
            assert await visit.parts() == []


async def test_a_part_that_is_not_what_it_is_called_is_refused_and_the_visit_goes_on(rig):
    path = rig.directory / "part"
    path.write_bytes(b"x" * 3_000_000)
    async with (
        rig.machine("a", quota=4_000_000) as machine,
        visiting(machine.address, rig.home) as visit,
    ):
        with pytest.raises(SessionError, match="another hash"):
            await visit.put("ab" * 32, path)
        path.write_bytes(b"x" * 5_000_000)
        with pytest.raises(SessionError, match=r"do not fit.*--disk"):
            await visit.put("ab" * 32, path)
        assert await visit.parts() == []


async def test_a_machine_tells_what_its_group_leaves_of_memory_and_its_quota_of_disk(
    rig, tiny_model, monkeypatch
):
    monkeypatch.setattr(base, "available_bytes", lambda: 1 << 30)
    async with machines(rig, "a", quota=10_000_000) as (machine,):
        async with visiting(machine.address, rig.home) as visit:
            found = await visit.describe(16)
            assert (found.memory_bytes, found.disk_bytes) == ((1 << 30) * 9 // 10, 10_000_000)
        cluster = written(rig, tiny_model, [machine])
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        async with visiting(machine.address, rig.home) as visit:
            found = await visit.describe(16)
            stored = sum(part.num_bytes for part in await visit.parts())
        # What is loaded makes way for what comes; what lies on the disk does not.
        assert found.memory_bytes == (1 << 30) * 9 // 10 + machine.served.num_bytes
        assert found.disk_bytes == 10_000_000 - stored


async def test_what_serves_is_not_removed_and_what_is_missing_does_not_serve(rig, tiny_model):
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        (delivery,) = cluster.deliveries
        async with visiting(machine.address, rig.home) as visit:
            with pytest.raises(SessionError, match="push it first"):
                await visit.serve(delivery.manifest_digest, 0)
            await visit.put(delivery.manifest_digest, cluster.path)
            with pytest.raises(SessionError, match="2 of this stage's parts are not there"):
                await visit.serve(delivery.manifest_digest, 0)
            with pytest.raises(SessionError, match="out of range"):
                await visit.serve(delivery.manifest_digest, 7)
            await deliver(rig.home, cluster.deliveries, quietly, quietly)
            with pytest.raises(SessionError, match="in use"):
                await visit.remove([cluster.manifest.config_hash])
            await visit.retire()
            await visit.remove([cluster.manifest.config_hash])
            assert machine.served is None
        with pytest.raises(SessionError, match="`pipeline-orch push` has it serve"):
            await generate(rig, cluster)


async def test_nobody_is_let_in_by_a_manifest(rig, tiny_model):
    """An orchestrator that joined may not name others, nor machines that are not this one."""
    stranger = own_identity(rig.directory / "stranger", ORCHESTRATOR_KEY)
    keys = [public_hex(rig.home), public_hex(stranger)]
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine], orchestrator_keys=keys)
        with pytest.raises(SessionError, match="has not joined this machine"):
            await deliver(rig.home, cluster.deliveries, quietly, quietly)
        cluster = written(rig, tiny_model, [machine], "other")
        other = own_identity(rig.directory / "b", MACHINE_KEY)
        raw = json.loads(cluster.path.read_text())
        raw["stages"][0]["machine_keys"] = [public_hex(other)]
        cluster.path.write_text(json.dumps(raw))
        (delivery,) = deliveries(
            parse_manifest(cluster.path.read_text()),
            cluster.path,
            partial(stage_dir, cluster.parts),
        )
        async with visiting(machine.address, rig.home) as visit:
            for digest, path in delivery.files:
                await visit.put(digest, path)
            with pytest.raises(SessionError, match="other machines than this one"):
                await visit.serve(delivery.manifest_digest, 0)


async def test_kernels_that_round_differently_than_the_manifest_says_do_not_serve(rig, tiny_model):
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        raw = json.loads(cluster.path.read_text())
        raw["stages"][0]["kernels"] = "abacus"
        cluster.path.write_text(json.dumps(raw))
        manifest = parse_manifest(cluster.path.read_text())
        everything = deliveries(manifest, cluster.path, partial(stage_dir, cluster.parts))
        with pytest.raises(SessionError, match="abacus, which round differently"):
            await deliver(rig.home, everything, quietly, quietly)


async def test_two_homes_take_turns(rig, tiny_model):
    other = own_identity(rig.directory / "other", ORCHESTRATOR_KEY)
    async with machines(rig, "a") as (machine,):
        machine.let_in(other.public_key().public_bytes_raw())
        cluster = written(rig, tiny_model, [machine])
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        identity = rig.directory / "home" / ORCHESTRATOR_KEY
        trust = UserTrust.create(cluster.manifest, identity)
        options = PipelineOptions(Limits(1, 64), times=TimeLimits(connect_seconds=10))
        async with (
            open_pipeline(cluster.manifest, trust, options, quietly),
            visiting(machine.address, other) as visit,
        ):
            with pytest.raises(SessionError, match="another orchestrator is under way"):
                await visit.retire()
            with pytest.raises(SessionError, match="cannot measure meanwhile"):
                await visit.measure()
        async with visiting(machine.address, other) as visit:
            await visit.retire()
        assert machine.served is None


async def test_an_orchestrator_waits_for_a_machine_that_is_loading(rig, tiny_model, monkeypatch):
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        expected = await generate(rig, cluster)
    genuine, is_let = Machine.resume, trio.Event()

    async def resume(machine):
        await is_let.wait()
        await genuine(machine)

    monkeypatch.setattr(Machine, "resume", resume)
    async with machines(rig, "a") as (again,), trio.open_nursery() as nursery:
        raw = json.loads(cluster.path.read_text())
        raw["stages"][0]["endpoint"] |= {
            "control": tcp(again.address.endpoint), "data_in": tcp(again.data_in.endpoint),
        }  # fmt: skip
        cluster.manifest = parse_manifest(json.dumps(raw))
        found = []

        async def ask():
            found.append(await generate(rig, cluster))

        nursery.start_soon(ask)
        await trio.sleep(0.5)
        with pytest.raises(SessionError, match="may be loading"):
            async with visiting(again.address, rig.home):
                pass
        is_let.set()
        with trio.fail_after(120):
            await until(lambda: found)
    assert found == [expected]


async def test_the_home_of_a_session_may_end_it(rig, tiny_model):
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        trust = UserTrust.create(cluster.manifest, rig.directory / "home" / ORCHESTRATOR_KEY)
        options = PipelineOptions(Limits(1, 64), times=TimeLimits(connect_seconds=10))

        async def retire_while_it_runs():
            async with open_pipeline(cluster.manifest, trust, options, quietly):
                assert machine.is_busy()
                async with visiting(machine.address, rig.home) as visit:
                    await visit.retire()
                assert machine.served is None
                await trio.sleep_forever()

        with pytest.raises(SessionError, match="stage 0"), trio.fail_after(120):
            await retire_while_it_runs()
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        assert await generate(rig, cluster) == reference(tiny_model)


async def test_a_stage_is_gone_from_memory_before_the_next_is_loaded(
    rig, tiny_model, monkeypatch, caplog
):
    caplog.set_level("ERROR")  # what is kept of a logged exception keeps the frames it came through
    async with machines(rig, "a") as (machine,):
        cluster = written(rig, tiny_model, [machine])
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        assert await generate(rig, cluster)
        before, seen = weakref.ref(machine.served.worker._setup.shard), []

        def load(*args):
            seen.append(before())
            return load_served(*args)

        monkeypatch.setattr("pipeline.machines.machine.load_served", load)
        await deliver(rig.home, cluster.deliveries, quietly, quietly)
        assert seen == [None]


async def test_a_defect_in_a_visit_costs_no_machine(rig, monkeypatch):
    def fail(_):
        raise RuntimeError("secret detail")

    async with rig.machine("a") as machine:
        monkeypatch.setattr(machine.store, "parts", lambda: fail(0))
        async with visiting(machine.address, rig.home) as visit:
            with pytest.raises(SessionError, match=r"internal error \(RuntimeError\)") as caught:
                await visit.parts()
            assert "secret" not in str(caught.value)
            assert (await visit.describe(16)).cores == 1


async def test_a_machine_that_knows_nobody_answers_nobody(rig):
    async with rig.machine("a", knows_home=False, offers=lambda _: None) as machine:
        with pytest.raises(SessionError, match="SOMEBODY ELSE MAY BE ANSWERING"):
            async with visiting(machine.address, rig.home):
                pass


async def test_a_list_of_more_parts_than_a_message_holds_shows_some(rig):
    async with rig.machine("a") as machine:
        for number in range(500):
            machine.store.path(f"{number:064x}").write_bytes(b"x")
        async with visiting(machine.address, rig.home) as visit:
            parts = await visit.parts()
            assert len(parts) == 400
            await visit.remove([part.digest for part in parts])
            assert len(await visit.parts()) == 100
