"""Per-token latency: what the user waited for, and where the time went."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.engine.home_times import PARTS, Times
from pipeline.files import write_atomically
from pipeline.protocol.step_header import StageTiming


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear-interpolated percentile; 0.5 is the median. NaN for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(slots=True)
class LatencyLog:
    """One request's record. `prompt_ms` is the time to the first token, `latencies_ms` the rest's.

    `finish_reason` is OpenAI's.
    """

    prompt_ms: float = 0.0
    finish_reason: str | None = None
    latencies_ms: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    timings: list[tuple[StageTiming, ...]] = field(default_factory=list)
    home_times: list[Times] = field(default_factory=list)

    def add(
        self,
        token_id: int,
        elapsed_ns: int,
        timings: tuple[StageTiming, ...],
        home_times: Times | None = None,
    ) -> None:
        """Record one token, `elapsed_ns` after the one before (the first: after the start)."""
        if self.token_ids:
            self.latencies_ms.append(elapsed_ns / 1e6)
        else:
            self.prompt_ms = elapsed_ns / 1e6
        self.token_ids.append(token_id)
        self.timings.append(timings)
        if home_times is not None:
            self.home_times.append(home_times)

    def summary(self) -> str:
        """One line for people."""
        head = f"{len(self.token_ids)} tokens, TTFT {self.prompt_ms:.1f} ms"
        if not self.latencies_ms:
            return head
        mean = statistics.fmean(self.latencies_ms)
        return (
            f"{head}, avg {mean:.1f} ms/token, p50 {percentile(self.latencies_ms, 0.5):.1f}, "
            f"p95 {percentile(self.latencies_ms, 0.95):.1f}, {1e3 / mean:.1f} tokens/s"
        )

    def to_json(self) -> dict[str, Any]:
        """The record as JSON; times in milliseconds.

        `latencies_ms` has one for each token, the first one's from the start.
        """
        home = [
            {f"{part}_ms": times.get(part, 0) / 1e6 for part in PARTS} for times in self.home_times
        ]
        return {
            "prompt_ms": self.prompt_ms,
            "latencies_ms": [self.prompt_ms, *self.latencies_ms] if self.token_ids else [],
            "generation_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
            "token_ids": self.token_ids,
            "stages": [
                [
                    {
                        "compute_ms": timing.compute_ns / 1e6,
                        "crypto_ms": timing.crypto_ns / 1e6,
                        "wire_ms": timing.wire_ns / 1e6,
                    }
                    for timing in timings
                ]
                for timings in self.timings
            ],
            **({"orchestrator": home} if home else {}),
        }

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all, for its owner alone. Raises InputError.

        Its token ids are the answer.
        """
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n", is_private=True)
