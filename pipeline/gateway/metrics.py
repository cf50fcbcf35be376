"""What is counted and logged of each request: sizes and times, never content."""

import logging
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio
from prometheus_client import CollectorRegistry, Counter, Histogram
from pydantic import BaseModel, ConfigDict

from pipeline.engine.latency import percentile

logger = logging.getLogger(__name__)

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# What percentiles are taken from: the last so many requests and tokens.
_RECENT_REQUESTS = 256
_RECENT_TOKENS = 4096
# What the rate of tokens is taken from.
_RATE_SECONDS = 5


class GatewayMetrics:
    """What the desk counts, whatever the door; Prometheus metrics in a registry of the caller's."""

    def __init__(self, registry: CollectorRegistry) -> None:
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
        self.recent = RecentTokens()

    def add_token(self, now: float, ttft: float | None, inter_token: float | None) -> None:
        """Count a token at the moment it came; the first of a request has a `ttft`."""
        self.generated_tokens.inc()
        if ttft is not None:
            self.ttft.observe(ttft)
        if inter_token is not None:
            self.inter_token.observe(inter_token)
        self.recent.add(now, ttft, inter_token)


class LatencyView(BaseModel):
    """How long tokens took lately; None before there were any."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    tokens_per_second: float
    ttft_p50_seconds: float | None
    ttft_p95_seconds: float | None
    inter_token_p50_seconds: float | None
    inter_token_p95_seconds: float | None


class RecentTokens:
    """The last tokens' latencies and rate, for whoever looks now rather than over months."""

    def __init__(self) -> None:
        self._ttft: deque[float] = deque(maxlen=_RECENT_REQUESTS)
        self._inter_token: deque[float] = deque(maxlen=_RECENT_TOKENS)
        # Tokens by whole second, the newest last.
        self._seconds: deque[tuple[int, int]] = deque(maxlen=_RATE_SECONDS + 1)

    def add(self, now: float, ttft: float | None, inter_token: float | None) -> None:
        """Take a token in."""
        if ttft is not None:
            self._ttft.append(ttft)
        if inter_token is not None:
            self._inter_token.append(inter_token)
        second, count = self._seconds.pop() if self._seconds else (int(now), 0)
        if second != int(now):
            self._seconds.append((second, count))
            count = 0
        self._seconds.append((int(now), count + 1))

    def view(self, now: float) -> LatencyView:
        """What they amount to."""
        first = int(now) - _RATE_SECONDS
        num_tokens = sum(count for second, count in self._seconds if first <= second < int(now))
        return LatencyView(
            tokens_per_second=num_tokens / _RATE_SECONDS,
            ttft_p50_seconds=_percentile(self._ttft, 0.5),
            ttft_p95_seconds=_percentile(self._ttft, 0.95),
            inter_token_p50_seconds=_percentile(self._inter_token, 0.5),
            inter_token_p95_seconds=_percentile(self._inter_token, 0.95),
        )


def _percentile(values: Iterable[float], fraction: float) -> float | None:
    found = tuple(values)
    return percentile(found, fraction) if found else None


@dataclass(slots=True)
class RequestRecord:
    """One request: what its log line says. Times are trio's, in seconds."""

    metrics: GatewayMetrics
    route: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=trio.current_time)
    # How it ended, in the words of the door it came by.
    status: int | str = 0
    num_prompt: int = 0
    num_generated: int = 0
    ttft: float | None = None
    # Of each continuation's prompt, the tokens that did not have to be computed.
    num_cached: dict[int, int] = field(default_factory=dict)
    _last: dict[int, float] = field(default_factory=dict)

    def add_prompt(self, num_tokens: int) -> None:
        """A prompt goes to the pipeline."""
        self.num_prompt += num_tokens
        self.metrics.prompt_tokens.inc(num_tokens)

    def add_token(self, choice: int, num_cached: int = 0) -> None:
        """The pipeline gave a continuation's next token, and had `num_cached` of its prompt."""
        self.num_cached[choice] = num_cached
        now = trio.current_time()
        last = self._last.get(choice)
        is_first = self.ttft is None
        if self.ttft is None:
            self.ttft = now - self.started
        self.metrics.add_token(
            now, self.ttft if is_first else None, None if last is None else now - last
        )
        self._last[choice] = now
        self.num_generated += 1

    def log(self, level: int) -> None:
        """Write its line, when it has ended."""
        logger.log(
            level,
            "event=request request_id=%s route=%s status=%s prompt_tokens=%d "
            "completion_tokens=%d ttft_ms=%s total_ms=%.3f",
            self.request_id,
            self.route,
            self.status,
            self.num_prompt,
            self.num_generated,
            None if self.ttft is None else round(self.ttft * 1e3, 3),
            (trio.current_time() - self.started) * 1e3,
        )
