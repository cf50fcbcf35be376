import math
import random

import pytest

from pipeline.engine.idle_prefixes import (
    IdlePrefix,
    IdlePrefixes,
    PrefixOptions,
    common_length,
)
from pipeline.errors import InputError


def prefix(slot, token_ids, salt=b"a"):
    return IdlePrefix(slot, salt, tuple(token_ids), ())


def test_the_length_that_texts_share_is_found_wherever_they_part():
    rng = random.Random(0)
    for _ in range(300):
        text = [rng.randrange(3) for _ in range(rng.randint(0, 200))]
        other = text[: rng.randint(0, len(text))] + [9] * rng.randint(0, 3)
        expected = next(
            (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b),
            min(len(text), len(other)),
        )
        assert common_length(text, other) == common_length(other, text) == expected


def test_the_longest_is_found_and_of_equal_ones_the_latest():
    idle = IdlePrefixes(100, 60, lambda: 0.0)
    for slot, token_ids in enumerate([(1, 2), (1, 2, 3, 4), (1, 2, 3, 5), (7,)]):
        assert idle.keep(prefix(slot, token_ids)) == []
    assert (idle.longest(b"a", (1, 2, 3))[0].slot, idle.longest(b"a", (1, 2, 3))[1]) == (2, 3)
    assert idle.longest(b"a", (1, 2, 3, 4, 5))[0].slot == 1
    assert idle.longest(b"a", (8, 1, 2)) == (None, 0)


def test_nothing_of_another_salt_is_found():
    idle = IdlePrefixes(100, 60, lambda: 0.0)
    idle.keep(prefix(0, range(50), b"a"))
    idle.keep(prefix(1, range(3), b"b"))
    assert idle.longest(b"b", tuple(range(50)))[1] == 3
    assert idle.longest(b"c", tuple(range(50))) == (None, 0)


@pytest.mark.parametrize("seed", range(10))
def test_share_and_expiry_are_kept_whatever_comes_and_goes(seed):
    rng, now = random.Random(seed), 0.0
    idle = IdlePrefixes(40, 10.0, lambda: now)
    model = {}  # slot: (tokens, expiry), the oldest first
    for _ in range(300):
        now += rng.random()
        expired = idle.expire()
        assert expired == [slot for slot, (_, expiry) in model.items() if expiry <= now]
        for slot in expired:
            del model[slot]
        free = [slot for slot in range(8) if slot not in model]
        action = rng.random()
        if action < 0.6 and free:
            length = rng.randint(1, 40)
            evicted = idle.keep(prefix(free[0], range(length)))
            assert evicted == list(model)[: len(evicted)]
            for slot in evicted:
                del model[slot]
            model[free[0]] = length, now + 10.0
        elif action < 0.8 and model:
            slot = rng.choice(list(model))
            assert len(idle.take(slot).token_ids) == model.pop(slot)[0]
        elif len(model) > 1:
            spared = next(iter(model))
            assert idle.evict(but=spared) == list(model)[1]
            del model[list(model)[1]]
        assert idle.num_tokens == sum(length for length, _ in model.values()) <= 40
        assert idle.next_expiry == min((expiry for _, expiry in model.values()), default=math.inf)
        assert len(idle) == len(model)


@pytest.mark.parametrize(
    ("share", "ttl"), [(-0.1, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, 0.0), (0.5, math.inf)]
)
def test_what_is_no_share_or_no_time_is_refused(share, ttl):
    with pytest.raises(InputError):
        PrefixOptions(share, ttl)
