"""Stages whose next token is a checksum of what a slot has seen."""

from pipeline.engine.limits import Limits
from pipeline.engine.scheduler import Scheduler
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepKind


def run(scheduler, token_of, order=None):
    """Drive a scheduler to its end against a model that is a function of what a slot has seen."""
    slots, events, in_flight, certain = {}, [], [], None
    while scheduler.has_work:
        while (step := scheduler.next_step()) is not None:
            in_flight.append(step)
            assert certain in {None, (step.header, step.token_ids)}
            certain = None
        assert certain is None
        follow_up = scheduler.follow_up()
        step = in_flight.pop(0)
        header, token_ids, offset = step.header, [], 0
        for segment, want in zip(header.segments, header.wants, strict=True):
            seen = slots.setdefault(segment.slot, [])
            if header.kind is StepKind.TRUNCATE:
                del seen[segment.position :]
                continue
            assert segment.position == len(seen), "a slot's tokens must arrive in order"
            seen += step.token_ids[offset : offset + segment.num_tokens]
            offset += segment.num_tokens
            if want is Want.TOKEN:
                token_ids.append(token_of(seen))
        assert header.num_tokens == len(step.token_ids) <= scheduler.limits.max_step_tokens
        if follow_up is not None:
            assert follow_up.due == header
            if follow_up.ends.isdisjoint(token_ids):
                certain = (follow_up.header, tuple(token_ids))
        events += scheduler.complete(header, token_ids)
    assert all(not seen for seen in slots.values()), "every slot ends cleared"
    return events


def solo(request, token_of, max_seq_len=10_000):
    scheduler = Scheduler(Limits(1, max_seq_len))
    scheduler.submit(request)
    return [event.token_id for event in run(scheduler, token_of)]


def checksum(seen):
    return (sum(seen) * 31 + len(seen)) % 1000


class Stage:
    """What a stage's slots have seen; stands for its KV state."""

    def __init__(self):
        self.slots = {}

    def take(self, step):
        """The tokens a last stage would return."""
        results, offset = [], 0
        if step.header.kind is StepKind.COPY:
            pairs = zip(step.header.segments[::2], step.header.segments[1::2], strict=True)
            for source, target in pairs:
                assert not self.slots.get(target.slot), "a copy goes to an empty slot"
                assert len(self.slots[source.slot]) >= source.num_tokens, "there is so much"
                self.slots[target.slot] = self.slots[source.slot][: source.num_tokens]
            return results
        for segment, want in zip(step.header.segments, step.header.wants, strict=True):
            seen = self.slots.setdefault(segment.slot, [])
            if step.header.kind is StepKind.TRUNCATE:
                del seen[segment.position :]
                continue
            assert segment.position == len(seen), "a slot's tokens must arrive in order"
            seen += step.token_ids[offset : offset + segment.num_tokens]
            offset += segment.num_tokens
            if want is Want.TOKEN:
                results.append(checksum(seen))
        assert step.header.num_tokens == len(step.token_ids)
        return results

    def rewind(self, lengths):
        for slot, length in enumerate(lengths):
            seen = self.slots.setdefault(slot, [])
            assert len(seen) >= length, "what is certain has been seen"
            del seen[length:]
