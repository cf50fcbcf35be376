"""What a store ought to hold, and operations at random."""

import copy
import random
from dataclasses import dataclass, field

from pipeline.sessions.kv_store import MissingChunk, StoreLimits, TooLarge

NAMES = [bytes([number]) * 32 for number in range(6)]


@dataclass
class Model:
    """Sessions in dictionaries."""

    limits: StoreLimits
    used_at: dict = field(default_factory=dict)
    chunks: dict = field(default_factory=dict)

    def copy(self):
        return copy.deepcopy(self)

    def state(self):
        return {name: (self.size(name), len(chunks)) for name, chunks in self.chunks.items()}

    def size(self, name):
        return sum(len(blob) for chunk in self.chunks[name] for blob in chunk)

    def forget(self, name):
        self.used_at.pop(name, None)
        self.chunks.pop(name, None)

    def expire(self, now):
        for name, used_at in list(self.used_at.items()):
            if used_at < now - self.limits.ttl_seconds:
                self.forget(name)

    def write(self, name, index, chunk, now):
        before = self.chunks.get(name, [])
        if index > len(before):
            return MissingChunk
        after = [*before[:index], chunk]
        if sum(len(blob) for each in after for blob in each) > self.limits.max_bytes:
            return TooLarge
        self.chunks[name], self.used_at[name] = after, now
        for _, each in sorted((at, each) for each, at in self.used_at.items() if each != name):
            total = sum(map(self.size, self.chunks))
            if total > self.limits.max_bytes or len(self.chunks) > self.limits.max_sessions:
                self.forget(each)
        return None

    def read(self, name, index, now):
        found = self.chunks.get(name, [])[index : index + 1]
        if not found:
            return None
        self.used_at[name] = now
        return found[0]


@dataclass
class Operation:
    """One of what can be done to a store, so long after the one before."""

    pause: float
    kind: str
    name: bytes
    index: int
    chunk: list

    def on_model(self, model, now):
        model.expire(now)
        match self.kind:
            case "write":
                return model.write(self.name, self.index, self.chunk, now)
            case "read":
                return model.read(self.name, self.index, now)
            case _:
                return model.forget(self.name)

    async def on_store(self, store):
        match self.kind:
            case "write":
                return await store.write(self.name, self.index, self.chunk)
            case "read":
                found = await store.read(self.name, self.index)
                return None if found is None else list(found)
            case _:
                return await store.forget(self.name)


def operations(seed, count):
    source = random.Random(seed)
    for _ in range(count):
        sizes = [source.choice([0, 1, 300, 3000]) for _ in range(source.randrange(1, 4))]
        yield Operation(
            source.choice([0.25, 1.0, 10.0, 40.0]),
            source.choices(["write", "read", "forget"], [10, 8, 1])[0],
            source.choice(NAMES),
            source.choice([0, 0, 1, 1, 2, 3]),
            [source.randbytes(size) for size in sizes],
        )


def outcomes(limits, start, seed, count, num_acknowledged):
    """What may be left by a writer that died, without the operation under way or with it; when."""
    model, now = Model(limits), start
    for index, operation in enumerate(operations(seed, count)):
        now += operation.pause
        if index == num_acknowledged:
            before = model.copy()
            operation.on_model(model, now)
            before.expire(now)
            return [before.chunks, model.chunks], now
        operation.on_model(model, now)
    return [model.chunks], now


async def content(store):
    return {
        each.name: [list(await store.read(each.name, at)) for at in range(each.num_chunks)]
        for each in await store.sessions()
    }
