from collections import Counter
from random import Random

import numpy as np
import pytest

from pipeline.stego.errors import StegoError
from pipeline.stego.fimec import FimecCodec
from tests.pipeline.stego.distributions import KEY, random_weights, weighted

# Of all bytes under a key that everybody knows, each is as likely as the others.
EVERY_BYTE = [bytes([value]) for value in range(256)]


def texts(weights, steps, random, payloads):
    """What is written of each payload in so many steps, and how often."""
    codec = FimecCodec(random)
    found = Counter()
    for payload in payloads:
        writer = codec.writer(payload, KEY)
        found[tuple(writer.choose(weights) for _ in range(steps))] += 1
    return found


def test_tokens_of_uniform_bytes_fall_by_their_weights_whatever_came_before():
    weights, random = weighted(1, 2, 4, 1), Random(2)
    found = texts(weights, 3, random, EVERY_BYTE * 20)
    shares = np.array([1, 2, 4, 1]) / 8
    count = 20 * 256
    expected = {index: count * shares[list(index)].prod() for index in np.ndindex(4, 4, 4)}
    chi_squared = sum((found[each] - mean) ** 2 / mean for each, mean in expected.items())
    assert chi_squared < 110  # 63 degrees of freedom: p > 0.0002


def test_under_a_secret_key_any_bytes_give_tokens_by_their_weights():
    random = Random(3)
    weights = weighted(1, 1, 2)
    codec = FimecCodec(random)
    counts = np.zeros(3)
    for _ in range(2000):
        counts[codec.writer(b"\0", random.randbytes(32)).choose(weights)] += 1
    expected = 2000 * np.array([1, 1, 2]) / 4
    assert ((counts - expected) ** 2 / expected).sum() < 18


def test_a_likely_token_tells_little_and_an_unlikely_one_much():
    reader = FimecCodec().reader(1, KEY)
    reader.observe(weighted(7, 1), 0)
    likely = reader.num_bits
    assert likely < 0.5
    reader = FimecCodec().reader(1, KEY)
    reader.observe(weighted(7, 1), 1)
    assert reader.num_bits == 3


def test_a_token_that_has_one_value_alone_decides_a_block():
    reader = FimecCodec().reader(1, KEY)
    even = weighted(*[1] * 256)
    reader.observe(even, 17)
    assert reader.is_certain
    assert reader.num_bits == 8


@pytest.mark.parametrize("block_bits", [1, 5, 8, 11, 12])
def test_bytes_come_back_from_blocks_of_any_size(block_bits):
    random = np.random.default_rng(4)
    codec = FimecCodec(block_bits=block_bits)
    payload = b"\x01\xfe\x80"
    writer, reader = codec.writer(payload, KEY), codec.reader(3, KEY)
    while not reader.is_certain:
        weights = random_weights(random)
        reader.observe(weights, writer.choose(weights))
    assert reader.payload() == payload


def test_larger_blocks_carry_more_of_the_tokens_entropy():
    def steps(block_bits):
        codec = FimecCodec(Random(5), block_bits=block_bits)
        distributions = np.random.default_rng(6)
        count = 0
        for _ in range(5):
            writer = codec.writer(bytes(24), KEY)
            while not writer.is_certain:
                writer.choose(random_weights(distributions))
                count += 1
        return count

    assert steps(10) < 0.97 * steps(4)


@pytest.mark.parametrize("block_bits", [0, 13])
def test_blocks_of_no_sensible_size_are_refused(block_bits):
    with pytest.raises(StegoError, match="give 1 to 12"):
        FimecCodec(block_bits=block_bits)
