"""What is counted and logged of each request: sizes and times, never content."""

import json
import logging
import uuid
from dataclasses import dataclass, field

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

logger = logging.getLogger(__name__)

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class GatewayMetrics:
    """The gateway's Prometheus metrics, in a registry of the caller's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "veilpipe_http_requests",
            "Requests; status 499: the client left before its answer, 0: the server did.",
            ("route", "status"),
            registry=registry,
        )
        self.active = Gauge(
            "veilpipe_http_active_requests", "Requests being answered.", registry=registry
        )
        self.connections = Gauge(
            "veilpipe_http_connections", "Open connections.", registry=registry
        )
        self.refused = Counter(
            "veilpipe_http_refused_connections",
            "Connections refused because too many were open.",
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "veilpipe_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.generated_tokens = Counter(
            "veilpipe_generated_tokens", "Tokens generated.", registry=registry
        )
        self.ttft = Histogram(
            "veilpipe_ttft_seconds",
            "From a request's arrival to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "veilpipe_inter_token_seconds",
            "From one token of a continuation to its next.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )


@dataclass(slots=True)
class RequestRecord:
    """One request: what its log line says. Times are trio's, in seconds."""

    metrics: GatewayMetrics
    route: str
    log_level: int = logging.INFO
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=trio.current_time)
    status: int = 0
    is_disconnected: bool = False
    num_prompt: int = 0
    num_generated: int = 0
    ttft: float | None = None
    _last: dict[int, float] = field(default_factory=dict)

    def add_prompt(self, num_tokens: int) -> None:
        """A prompt goes to the pipeline."""
        self.num_prompt += num_tokens
        self.metrics.prompt_tokens.inc(num_tokens)

    def add_token(self, choice: int) -> None:
        """The pipeline gave the next token of a continuation."""
        now = trio.current_time()
        if self.ttft is None:
            self.ttft = now - self.started
            self.metrics.ttft.observe(self.ttft)
        if choice in self._last:
            self.metrics.inter_token.observe(now - self._last[choice])
        self._last[choice] = now
        self.num_generated += 1
        self.metrics.generated_tokens.inc()

    def close(self) -> None:
        """Count the request and write its line."""
        status = 499 if self.is_disconnected else self.status
        self.metrics.requests.labels(self.route, str(status)).inc()
        line = {
            "event": "request",
            "request_id": self.request_id,
            "route": self.route,
            "status": status,
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "ttft_ms": None if self.ttft is None else round(self.ttft * 1e3, 3),
            "total_ms": round((trio.current_time() - self.started) * 1e3, 3),
        }
        logger.log(self.log_level, "%s", json.dumps(line))
