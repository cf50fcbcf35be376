"""Stages before which a scheduler runs in simulated time."""

from collections import deque
from itertools import pairwise

from pipeline.engine.limits import Limits
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StageTiming


class Stages:
    """Stages that take `fixed` seconds for a step and `per_token` more for each of its tokens.

    Or, where they are `overlapping`, whichever takes longer: reading all weights, or computing.
    From one to the next, and back, it takes `apart` seconds.
    """

    def __init__(
        self, *speeds, apart=0.0, overlapping=False, chunk_tokens=128, max_gap=0.25, num_slots=16
    ):
        self.speeds, self.apart, self.now = speeds, apart, 0.0
        self._both = max if overlapping else sum
        limits = Limits(num_slots, 100_000, chunk_tokens, len(speeds), max_gap=max_gap)
        self.scheduler = Scheduler(limits, clock=lambda: self.now)
        self.free_at = [0.0] * len(speeds)
        self.under_way = deque()
        self.sizes, self.heard = [], {}

    def submit(self, request_id, prompt_tokens, max_tokens, **fields):
        self.scheduler.submit(Request(request_id, (1,) * prompt_tokens, max_tokens, **fields))

    def advance(self):
        while (step := self.scheduler.next_step()) is not None:
            at, timings, count = self.now, [], step.header.num_tokens
            for idx, (fixed, per_token) in enumerate(self.speeds):
                took = self._both((fixed, per_token * count)) if count else 0.0
                at = self.free_at[idx] = max(at + self.apart, self.free_at[idx]) + took
                timings.append(StageTiming(round(took * 1e9), 0, 0))
            self.under_way.append((at + self.apart, step, tuple(timings)))
            self.sizes.append(step.num_read)
        self.now, step, timings = self.under_way.popleft()
        header = step.header._replace(timings=timings)
        num_results = sum(want is not Want.NOTHING for want in step.header.wants)
        for event in self.scheduler.complete(header, [1] * num_results):
            self.heard.setdefault(event.request_id, []).append(self.now)

    def until(self, condition):
        for _ in range(100_000):
            if condition():
                return
            self.advance()
        raise AssertionError("it hangs")

    def run(self):
        self.until(lambda: not self.scheduler.has_work)

    def gaps(self, request_id, since=0.0):
        times = [at for at in self.heard[request_id] if at >= since]
        return [later - at for at, later in pairwise(times)]
