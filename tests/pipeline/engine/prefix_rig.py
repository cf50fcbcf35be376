"""A scheduler that keeps prefixes, before two stages that take steps at different times."""

from pipeline.engine.idle_prefixes import PrefixOptions
from pipeline.engine.request import Request
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.step_header import StepKind
from tests.pipeline.engine.toy_stages import Stage

KEEPS = PrefixOptions(1.0, 60.0)
A, B = b"a", b"b"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def new_scheduler(limits, options=KEEPS, clock=None, on_give_up=None):
    scheduler = Scheduler(limits, on_give_up, options, clock or Clock())
    scheduler.admission.allow_reuse(is_row_exact=True)
    return scheduler


class Driver:
    """A scheduler before two stages that take steps at different times."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.first, self.last = Stage(), Stage()
        self.to_first, self.to_last, self.steps = [], [], []
        self.events = []

    def finish(self):
        while self.scheduler.has_work:
            assert self.send() or self.answer(), "it hangs"
        return self

    def send(self):
        step = self.scheduler.next_step()
        if step is not None:
            self.steps.append(step)
            self.to_first.append(step)
        return step is not None

    def pass_on(self):
        if self.to_first:
            step = self.to_first.pop(0)
            self.first.take(step)
            self.to_last.append(step)

    def answer(self):
        if not self.to_last:
            self.pass_on()
        if not self.to_last:
            return False
        step = self.to_last.pop(0)
        self.events += self.scheduler.complete(step.header, self.last.take(step))
        return True

    def lose(self, rng):
        lengths = self.scheduler.rewind()
        self.to_first, self.to_last = [], []
        for stage in (self.first, self.last):
            if rng.random() < 0.5:
                stage.slots = {}
                for step in self.scheduler.replay(0):
                    assert step.header.kind is StepKind.REPLAY
                    assert step.header.num_tokens <= self.scheduler.limits.max_step_tokens
                    stage.take(step)
                held = {slot: len(seen) for slot, seen in stage.slots.items()}
                assert [held.get(slot, 0) for slot in range(len(lengths))] == lengths
            stage.rewind(lengths)

    def run(self, *requests):
        """Requests one after another, each to its end; what each of them has heard."""
        heard = []
        for request in requests:
            self.scheduler.submit(request)
            self.finish()
            heard.append(self.tokens(request))
        return heard

    def tokens(self, request):
        mine = [each for each in self.events if each.request_id == request.request_id]
        return [each.token_id for each in mine]

    def cached(self, request):
        return next(e.num_cached for e in self.events if e.request_id == request.request_id)

    def kinds(self):
        return [step.header.kind for step in self.steps]


def chat(request_id, before, more, max_tokens=4, salt=A):
    return Request(request_id, (*before, *more), max_tokens, salt=salt)
