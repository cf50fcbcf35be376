"""What /pipeline and /metrics say of the stages."""

import dataclasses
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter, ValidationError

from pipeline.engine.engine_stats import EngineStats
from pipeline.engine.limits import Limits
from pipeline.gateway.metrics import RecentTokens
from pipeline.gateway.pipeline_status import EngineView, Overview, PipelineView
from pipeline.gateway.readiness import Phase
from pipeline.protocol.messages import StageFigures
from transport.attestation.evidence_binding import Attested, EvidenceKind

SECOND = 10**9
ZERO = StageFigures(**dict.fromkeys(StageFigures.model_fields, 0))
BEFORE = ZERO.model_copy(update={"uptime_ns": 10 * SECOND, "num_steps": 5, "bytes_sent": 1000})
AFTER = BEFORE.model_copy(
    update={
        "uptime_ns": 12 * SECOND,
        "num_steps": 45,
        "num_tokens": 80,
        "num_slots": 8,
        "slots_in_use": 3,
        "kv_tokens": 77,
        "compute_ns": SECOND,
        "crypto_ns": SECOND // 10,
        "wire_ns": SECOND // 5,
        "bytes_sent": 3000,
        "bytes_received": 2000,
        "num_handshakes": 4,
    }
)
STATS = EngineStats(
    3, 2, 40, 80, 1, 3, 9, 0.75, {"embed": SECOND, "head": 5 * SECOND // 2}, 2, 5, 99, 1000, 400, 6
)
GET = b"GET %s HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer sk-test-0123456789\r\n\r\n"


def stage(idx, past=BEFORE, now=AFTER, is_ready=True):
    attested = Attested(EvidenceKind.DEV, {0: bytes([idx + 1]) * 48})
    return SimpleNamespace(
        idx=idx, peer=SimpleNamespace(attested=attested), connected_at=0.0, is_ready=is_ready,
        past_figures=past, figures=now, precision="int8" if is_ready else None,
        kernels="torch" if is_ready else None, address=f"tcp:10.0.0.{idx}:9000",
    )  # fmt: skip


def stage_at(idx, **more):
    """The labels of one."""
    return {"replica": "0", "stage": str(idx), **more}


def replica(idx=0, stages=(), stats=STATS, phase=Phase.READY):
    return SimpleNamespace(idx=idx, phase=phase, stats=stats, max_seq_len=100 + idx, stages=stages)


@pytest.fixture
def overview(manifest_of_two):
    stages = []
    overview = Overview(manifest_of_two, Limits(8, 128), [replica(stages=stages)])
    return SimpleNamespace(overview=overview, stages=stages)


@pytest.fixture(scope="module")
def manifest_of_two(tiny_model):
    from pipeline.planning.plan import PlanOptions, plan

    return plan(tiny_model, PlanOptions(2))


async def test_a_stage_without_a_session_is_down_and_says_nothing(overview):
    overview.stages.append(stage(1, None, None, is_ready=False))
    first, second = overview.overview.stages()
    assert (first.state, first.figures, first.evidence) == ("down", None, None)
    assert (second.state, second.rates, second.evidence) == ("connecting", None, "dev")
    assert (first.precision, second.precision) == ("unpinned", "unpinned")
    assert (first.kernels, second.kernels) == (None, None)


async def test_a_stage_whose_pins_nothing_compares_says_so_whatever_its_state(manifest_of_two):
    pinned = manifest_of_two.stage(1).model_copy(update={"expected_measurements": {0: "ab" * 48}})
    manifest = manifest_of_two.model_copy(update={"stages": (manifest_of_two.stage(0), pinned)})
    for ignores in (False, True):
        overview = Overview(manifest, Limits(8, 128), [replica()], ignores_measurements=ignores)
        first, second = overview.stages()
        assert (first.ignores_measurements, second.ignores_measurements) == (False, ignores)


async def test_the_engines_figures_are_shown_as_they_are(overview):
    view = overview.overview.engine()
    assert asdict(view) == asdict(STATS) | {"max_batch": 8, "max_seq_len": 100, "window": 0}
    adapter = TypeAdapter(EngineView)
    assert adapter.validate_json(adapter.dump_json(view)) == view
    with pytest.raises(ValidationError):
        adapter.validate_python(asdict(view) | {"num_running": "many"})


async def test_rates_are_what_changed_between_two_answers(overview):
    overview.stages += [stage(0), stage(1, AFTER, AFTER)]
    first, second = overview.overview.stages()
    assert (first.state, first.precision, first.kernels) == ("ready", "int8", "torch")
    assert first.measurement == "01" * 48
    assert (first.address, second.address) == ("tcp:10.0.0.0:9000", "tcp:10.0.0.1:9000")
    assert first.rates.load == 0.5
    assert first.rates.steps_per_second == 20
    assert first.rates.tokens_per_second == 40
    assert first.rates.bytes_per_second == 2000
    assert first.rates.compute_ms == 25
    assert first.rates.crypto_ms == 2.5
    assert first.rates.wire_ms == 5
    assert second.rates is None  # no time has passed


async def test_an_idle_stage_has_no_time_per_step(overview):
    idle = AFTER.model_copy(update={"uptime_ns": 13 * SECOND})
    overview.stages.append(stage(0, AFTER, idle))
    rates = overview.overview.stages()[0].rates
    assert (rates.load, rates.compute_ms) == (0, None)


async def test_prometheus_gets_the_same_figures(overview):
    overview.stages += [stage(0), stage(1)]
    registry = CollectorRegistry()
    registry.register(overview.overview)
    text = generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    value = registry.get_sample_value
    assert value("veilpipe_stage_busy_seconds_total", stage_at(1, part="compute")) == 1.0
    assert value("veilpipe_stage_busy_seconds_total", stage_at(0, part="wire")) == 0.2
    assert value("veilpipe_stage_sent_bytes_total", stage_at(0)) == 3000
    assert value("veilpipe_stage_kv_tokens", stage_at(0)) == 77
    assert value("veilpipe_stage_handshakes_total", stage_at(1)) == 4
    assert value("veilpipe_stage_info", stage_at(1, address="tcp:10.0.0.1:9000")) == 1
    assert value("veilpipe_waiting_requests") == 2
    assert value("veilpipe_failovers_total") == 1
    assert value("veilpipe_last_recovery_seconds") == 0.75
    assert value("veilpipe_idle_prefixes") == 2
    assert value("veilpipe_prefix_hits_total") == 5
    assert value("veilpipe_cached_tokens_total") == 99
    assert value("veilpipe_pool_tokens") == 1000
    assert value("veilpipe_held_tokens") == 400
    assert value("veilpipe_requests_given_way_total") == 6
    overview.stages.pop()
    assert value("veilpipe_stage_up", stage_at(0)) == 1
    assert value("veilpipe_stage_up", stage_at(1)) == 0
    assert value("veilpipe_stage_steps_total", stage_at(1)) is None
    labels = {label for family in families.values() for s in family.samples for label in s.labels}
    assert labels == {"replica", "stage", "part", "address"}


async def test_each_pipelines_stages_are_told_apart_and_engines_are_shown_as_one(manifest_of_two):
    second = dataclasses.replace(STATS, num_running=5, num_tokens=7, recovery_seconds=2.0)
    replicas = [
        replica(0, [stage(0), stage(1)]),
        replica(1, [stage(1)], second, Phase.DRAINING),
    ]
    overview = Overview(manifest_of_two, Limits(8, 128), replicas)
    assert [(each.replica, each.stage_idx, each.state) for each in overview.stages()] == [
        (0, 0, "ready"), (0, 1, "ready"), (1, 0, "down"), (1, 1, "ready"),
    ]  # fmt: skip
    engine = overview.engine()
    assert (engine.max_batch, engine.max_seq_len) == (16, 100)
    assert (engine.num_running, engine.num_waiting, engine.num_tokens) == (8, 4, 87)
    assert (engine.recovery_seconds, engine.home_times["embed"]) == (2.0, 2 * SECOND)
    assert [(each.state, each.num_running, each.num_tokens) for each in overview.replicas()] == [
        ("ready", 3, 80), ("draining", 5, 7),
    ]  # fmt: skip
    registry = CollectorRegistry()
    registry.register(overview)
    value = registry.get_sample_value
    at = {"replica": "1", "stage": "1"}
    assert value("veilpipe_stage_info", {**at, "address": "tcp:10.0.0.1:9000"}) == 1
    assert value("veilpipe_stage_up", {"replica": "1", "stage": "0"}) == 0
    assert value("veilpipe_stage_kv_tokens", at) == 77
    assert [value("veilpipe_replica_up", {"replica": idx}) for idx in "01"] == [1, 0]
    assert value("veilpipe_replica_running_requests", {"replica": "1"}) == 5
    assert value("veilpipe_replica_waiting_requests", {"replica": "0"}) == 2
    assert value("veilpipe_replica_tokens_total", {"replica": "1"}) == 7


async def test_the_server_shows_it_beside_its_own_latencies(start_gateway, connect, overview):
    overview.stages.append(stage(0))
    async with (
        start_gateway(overview=overview.overview, requests_per_minute=1) as gateway,
        connect(gateway) as client,
    ):
        await client.post("/v1/completions", b'{"model": "tiny/model", "prompt": "Hi"}')
        assert (await client.read_response())[0] == 200
        for _ in range(3):  # beyond the limit on requests: watching is free
            await client.stream.send_all(GET % b"/pipeline")
            status, _, body = await client.read_response()
            assert status == 200
        await client.stream.send_all(GET % b"/metrics")
        _, _, metrics = await client.read_response()
    view = PipelineView.model_validate_json(body)
    assert view.model == "tiny/model"
    assert [each.state for each in view.stages] == ["ready", "down"]
    assert view.engine.num_waiting == 2
    assert view.latency.ttft_p50_seconds > 0
    assert b'veilpipe_stage_up{replica="0",stage="0"} 1.0' in metrics
    assert b"veilpipe_ttft_seconds_bucket" in metrics
    # Nothing of the request, nothing of the user.
    assert "Hi" not in json.dumps(json.loads(body))


def test_recent_rates_forget_what_is_long_ago():
    recent = RecentTokens()
    assert recent.view(0.0).ttft_p50_seconds is None
    for tick in range(100):
        recent.add(10 + tick / 10, 0.5 if tick == 0 else None, 0.1)
    view = recent.view(20.0)
    assert view.tokens_per_second == 10
    assert view.ttft_p95_seconds == 0.5
    assert view.inter_token_p50_seconds == 0.1
    assert recent.view(100.0).tokens_per_second == 0


async def test_prometheus_gets_the_parts_of_ends_that_are_held_here(overview):
    registry = CollectorRegistry()
    registry.register(overview.overview)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    (family,) = [each for each in families if each.name == "veilpipe_orchestrator_seconds"]
    parts = {sample.labels["part"]: sample.value for sample in family.samples}
    assert parts == {"embed": 1.0, "head": 2.5}
