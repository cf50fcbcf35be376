from random import Random

import numpy as np

from pipeline.stego.range_coding import RangeCodec
from tests.pipeline.stego.distributions import KEY, random_weights, weighted

EVEN = weighted(*[1] * 256)


def first_choices(payload, key, random):
    writer = RangeCodec(random).writer(payload, key)
    return [writer.choose(EVEN) for _ in payload]


def test_messages_under_two_keys_are_rotated_differently():
    payload = bytes(16)
    one, other = (first_choices(payload, key, Random(1)) for key in (KEY, KEY[::-1]))
    assert one != other
    assert len(set(one)) > 8  # of 16: zeros do not show


def test_fresh_digits_make_the_end_of_a_message_random():
    """A known key and known bytes decide tokens only as far as the bytes reach."""
    wide = weighted(*[1] * 4096)
    ends = set()
    for _ in range(20):
        writer = RangeCodec().writer(b"x", KEY)
        ends.add(writer.choose(wide))
    assert len({each >> 4 for each in ends}) == 1
    assert len(ends) > 4


def test_uniform_bytes_under_a_known_key_leave_every_step_its_distribution():
    """Also where the range is narrower than one value of the bytes: no rotation shows through."""
    random = Random(5)
    weights = weighted(1, 2, 4)
    codec = RangeCodec(random)
    counts = np.zeros((8, 3))
    num_messages = 3000
    for _ in range(num_messages):
        writer = codec.writer(random.randbytes(1), KEY)
        for step in range(8):
            counts[step, writer.choose(weights)] += 1
    expected = num_messages * np.array([1, 2, 4]) / 7
    chi_squared = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert chi_squared.max() < 20.7  # two degrees of freedom, eight steps: p > 0.00025


def test_a_value_at_the_edge_of_the_range_is_not_certain_too_early():
    """Where the range straddles two values, however narrow it is, more choices are awaited."""
    random = np.random.default_rng(3)
    for seed in range(300):
        draw = Random(seed)
        payload = draw.randbytes(1)
        codec = RangeCodec(draw)
        writer, reader = codec.writer(payload, KEY), codec.reader(1, KEY)
        steps = 0
        while not reader.is_certain:
            weights = random_weights(random, num_tokens=3, spread=0.1)
            reader.observe(weights, writer.choose(weights))
            steps += 1
        assert reader.payload() == payload
        assert steps >= 3
