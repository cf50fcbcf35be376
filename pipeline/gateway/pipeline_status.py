"""What pipelines look like to whoever watches it: sizes and times, never content."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Literal, Protocol

import trio
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field

from pipeline.agreement.manifest import Manifest, StageSpec
from pipeline.engine.engine_stats import EngineStats, together
from pipeline.engine.limits import Limits
from pipeline.gateway.metrics import LatencyView
from pipeline.gateway.readiness import Phase
from pipeline.orchestrator.stage_watch import RemoteStage
from pipeline.protocol.messages import StageFigures
from transport.frozen import frozen

NS = 1e-9


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class StageRates(_View):
    """What a stage did between its last two answers; the times are means of its steps."""

    # Share of the time in which it computed.
    load: float
    steps_per_second: float
    tokens_per_second: float
    bytes_per_second: float
    compute_ms: float | None
    crypto_ms: float | None
    wire_ms: float | None


class StageView(_View):
    """One stage. What it has not told, for want of a session, is None."""

    stage_idx: int
    # Which pipeline's, of those with stages of the same manifest.
    replica: int = 0
    layer_start: int
    layer_end: int
    precision: str
    kernels: str | None = None
    state: Literal["down", "connecting", "ready"]
    # Where its control channel was dialed: what runs stages may move them.
    address: str | None = None
    # What the handshake proved: "nitro", "dev" or "key_only", and the image's measurement (PCR 0).
    evidence: str | None = None
    # Whether the manifest pins measurements of it and nothing compares them: in development only.
    ignores_measurements: bool = False
    measurement: str | None = None
    handshake_age_seconds: float | None = None
    figures: StageFigures | None = None
    rates: StageRates | None = None


@frozen(kw_only=True)
class EngineView(EngineStats):
    """The engine in front of the stages, and what it has room for."""

    max_batch: int
    max_seq_len: int
    # Tokens whose keys and values a stage keeps of each request; 0: all.
    window: int = 0


class ReplicaView(_View):
    """One of the pipelines behind a server."""

    replica: int
    state: Phase
    num_running: int
    num_waiting: int
    num_tokens: int


class PipelineView(_View):
    """Everything `pipeline-orch top` shows: the answer of /pipeline. `engine`: all together."""

    model: str
    is_ready: bool
    engine: EngineView
    latency: LatencyView
    replicas: tuple[ReplicaView, ...] = Field((), max_length=64)
    stages: tuple[StageView, ...] = Field(max_length=64 * 256)


class Watched(Protocol):
    """One pipeline, and the engine before it."""

    @property
    def idx(self) -> int:
        """Which of them."""
        ...

    @property
    def phase(self) -> Phase:
        """How far it is from computing a token."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Its engine's counters."""
        ...

    @property
    def max_seq_len(self) -> int:
        """What a request may have, the stages' memory allowing."""
        ...

    @property
    def stages(self) -> Sequence[RemoteStage]:
        """Those of the session that stands, or nothing."""
        ...


class Overview(Collector):
    """Looks at running pipelines when asked; costs nothing otherwise."""

    def __init__(
        self,
        manifest: Manifest,
        limits: Limits,
        replicas: Sequence[Watched],
        *,
        ignores_measurements: bool = False,
    ) -> None:
        # Of the manifest that is served now: with `--replan` another one comes after a loss.
        self.specs = manifest.stages
        self._limits = limits
        self._replicas = replicas
        self._ignores_measurements = ignores_measurements

    def engine(self) -> EngineView:
        """What all engines together do now, and have done."""
        return EngineView(
            max_batch=self._limits.num_slots * len(self._replicas),
            max_seq_len=min(replica.max_seq_len for replica in self._replicas),
            window=0 if self._limits.window is None else self._limits.window.size,
            **asdict(together([replica.stats for replica in self._replicas])),
        )

    def replicas(self) -> tuple[ReplicaView, ...]:
        """Every pipeline."""
        return tuple(
            ReplicaView(
                replica=replica.idx,
                state=replica.phase,
                num_running=replica.stats.num_running,
                num_waiting=replica.stats.num_waiting,
                num_tokens=replica.stats.num_tokens,
            )
            for replica in self._replicas
        )

    def stages(self) -> tuple[StageView, ...]:
        """Every stage of the manifest, of every pipeline."""
        return tuple(
            view.model_copy(update={"replica": replica.idx})
            for replica in self._replicas
            for view in self._stages_of(replica)
        )

    def _stages_of(self, replica: Watched) -> Iterator[StageView]:
        connected = {stage.idx: stage for stage in replica.stages}
        for spec in self.specs:
            stage = connected.get(spec.stage_idx)
            yield _stage_view(spec, stage, ignores=self._ignores_measurements)

    def collect(self) -> Iterator[Metric]:
        """The same for Prometheus; called at every scrape."""
        yield from _engine_metrics(self.engine())
        yield from _replica_metrics(self.replicas())
        yield from _stage_metrics(self.stages())


def _stage_view(spec: StageSpec, stage: RemoteStage | None, *, ignores: bool) -> StageView:
    view = StageView(
        stage_idx=spec.stage_idx,
        layer_start=spec.layer_start,
        layer_end=spec.layer_end,
        precision=spec.precision or "unpinned",
        state="down",
        ignores_measurements=ignores and bool(spec.expected_measurements),
    )
    if stage is None:
        return view
    attested = stage.peer.attested
    measurement = attested.measurements.get(0)
    return view.model_copy(
        update={
            "precision": stage.precision or view.precision,
            "kernels": stage.kernels,
            "state": "ready" if stage.is_ready else "connecting",
            "address": stage.address,
            "evidence": attested.kind.name.lower(),
            "measurement": None if measurement is None else measurement.hex(),
            "handshake_age_seconds": trio.current_time() - stage.connected_at,
            "figures": stage.figures,
            "rates": _rates(stage.past_figures, stage.figures),
        }
    )


def _rates(past: StageFigures | None, now: StageFigures | None) -> StageRates | None:
    if past is None or now is None or now.uptime_ns <= past.uptime_ns:
        return None
    elapsed = (now.uptime_ns - past.uptime_ns) * NS
    num_steps = now.num_steps - past.num_steps

    def per_step_ms(ns: int) -> float | None:
        return ns / 1e6 / num_steps if num_steps > 0 else None

    num_bytes = now.bytes_sent + now.bytes_received - past.bytes_sent - past.bytes_received
    return StageRates(
        load=(now.compute_ns - past.compute_ns) * NS / elapsed,
        steps_per_second=num_steps / elapsed,
        tokens_per_second=(now.num_tokens - past.num_tokens) / elapsed,
        bytes_per_second=num_bytes / elapsed,
        compute_ms=per_step_ms(now.compute_ns - past.compute_ns),
        crypto_ms=per_step_ms(now.crypto_ns - past.crypto_ns),
        wire_ms=per_step_ms(now.wire_ns - past.wire_ns),
    )


def _engine_metrics(view: EngineView) -> Iterator[Metric]:
    gauges = {
        "veilpipe_running_requests": ("Requests that own a slot.", view.num_running),
        "veilpipe_waiting_requests": ("Requests that wait for a slot.", view.num_waiting),
        "veilpipe_batch_size": ("Requests in the last step.", view.last_batch),
        "veilpipe_idle_prefixes": (
            "Slots that hold what an ended request has left.",
            view.num_idle_prefixes,
        ),
        "veilpipe_pool_tokens": (
            "Tokens that all requests may hold together; 0: each as many as its slot has room for.",
            view.pool_tokens,
        ),
        "veilpipe_held_tokens": ("Tokens that slots hold, or are about to.", view.held_tokens),
        "veilpipe_max_batch_size": ("Requests there is room for in a step.", view.max_batch),
        "veilpipe_last_recovery_seconds": (
            "How long the pipeline took to stand again after its last loss of a stage.",
            view.recovery_seconds,
        ),
    }
    counters = {
        "veilpipe_steps": ("Steps that came back from the stages.", view.num_steps),
        "veilpipe_prefix_hits": (
            "Requests whose prompt some slot held the beginning of.",
            view.num_prefix_hits,
        ),
        "veilpipe_cached_tokens": (
            "Tokens of prompts that were held and not computed.",
            view.num_cached_tokens,
        ),
        "veilpipe_requests_given_way": (
            "Times a request was cleared for those before it, to be computed again.",
            view.num_given_way,
        ),
        "veilpipe_failovers": ("Losses of a stage that requests survived.", view.num_failovers),
        "veilpipe_handshakes": ("Handshakes with stages.", view.num_handshakes),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(name, text, value)
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(name, text, value)
    home = CounterMetricFamily(
        "veilpipe_orchestrator_seconds",
        "Time that steps cost outside the stages, where the ends of the model are held here.",
        labels=["part"],
    )
    for part, ns in view.home_times.items():
        home.add_metric([part], ns * NS)
    yield home


def _replica_metrics(views: Sequence[ReplicaView]) -> Iterator[Metric]:
    rows = (
        ("up", "Whether a pipeline takes requests.", lambda view: view.state is Phase.READY),
        ("running_requests", "A pipeline's requests that own a slot.", lambda v: v.num_running),
        ("waiting_requests", "Its requests that wait for one.", lambda view: view.num_waiting),
    )
    for name, text, figure in rows:
        gauge = GaugeMetricFamily(f"veilpipe_replica_{name}", text, labels=["replica"])
        for view in views:
            gauge.add_metric([str(view.replica)], figure(view))
        yield gauge
    tokens = CounterMetricFamily(
        "veilpipe_replica_tokens", "Tokens that a pipeline's requests got.", labels=["replica"]
    )
    for view in views:
        tokens.add_metric([str(view.replica)], view.num_tokens)
    yield tokens


# Metric, its help, and the figure it shows.
_STAGE_GAUGES = (
    ("slots", "Requests a stage has room for.", "num_slots"),
    ("slots_in_use", "Slots that hold keys and values.", "slots_in_use"),
    ("kv_tokens", "Tokens whose keys and values a stage holds.", "kv_tokens"),
    ("kv_bytes", "KV memory that a stage's slots may take together.", "kv_bytes"),
    ("batch_size", "Requests in a stage's last step.", "last_batch"),
)
_STAGE_COUNTERS = (
    ("steps", "Steps a stage computed.", "num_steps"),
    ("tokens", "Tokens a stage computed.", "num_tokens"),
    ("sent_bytes", "Bytes a stage sent on data channels.", "bytes_sent"),
    ("received_bytes", "Bytes a stage received on data channels.", "bytes_received"),
    ("handshakes", "Handshakes a stage completed.", "num_handshakes"),
    ("rekeys", "Keys of data channels a stage has replaced.", "num_rekeys"),
)


def _stage_metrics(views: Sequence[StageView]) -> Iterator[Metric]:
    """Counters restart with their worker, as Prometheus expects."""
    whose = ["replica", "stage"]
    up = GaugeMetricFamily("veilpipe_stage_up", "Whether a stage is ready.", labels=whose)
    info = InfoMetricFamily("veilpipe_stage", "Where a stage was found.", labels=whose)
    uptime = GaugeMetricFamily(
        "veilpipe_stage_uptime_seconds", "Since a stage's worker started.", labels=whose
    )
    busy = CounterMetricFamily(
        "veilpipe_stage_busy_seconds",
        "Time a stage spent: compute, crypto (ChaCha20-Poly1305), wire (socket calls, no waiting).",
        labels=[*whose, "part"],
    )
    named = [([str(view.replica), str(view.stage_idx)], view) for view in views]
    told = [(stage, view.figures) for stage, view in named if view.figures is not None]
    for stage, view in named:
        up.add_metric(stage, view.state == "ready")
        if view.address is not None:
            info.add_metric(stage, {"address": view.address})
    for stage, figures in told:
        uptime.add_metric(stage, figures.uptime_ns * NS)
        for part in ("compute", "crypto", "wire"):
            busy.add_metric([*stage, part], getattr(figures, f"{part}_ns") * NS)
    yield from (up, info, uptime, busy)
    for family, rows in (
        (GaugeMetricFamily, _STAGE_GAUGES),
        (CounterMetricFamily, _STAGE_COUNTERS),
    ):
        for name, text, field in rows:
            metric = family(f"veilpipe_stage_{name}", text, labels=whose)
            for stage, figures in told:
                metric.add_metric(stage, getattr(figures, field))
            yield metric
