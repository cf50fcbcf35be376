import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stego.codecs import CODECS, parse_codec
from pipeline.stego.errors import StegoError
from tests.pipeline.stego.distributions import KEY, any_weights, random_weights, weighted

MAX_STEPS = 3000
payloads = st.binary(min_size=1, max_size=64)
every_codec = pytest.mark.parametrize("codec", [make() for make in CODECS.values()], ids=CODECS)


def carry(writer, reader, distributions):
    """Choose until certain; both ends agree at each step. How many choices it took."""
    for steps, weights in enumerate(distributions):
        assert writer.is_certain == reader.is_certain
        assert writer.num_bits == reader.num_bits
        if writer.is_certain:
            return steps
        with pytest.raises(StegoError, match="before the bytes are certain"):
            reader.payload()
        reader.observe(weights, writer.choose(weights))
    return None


def steady(seed=0, **kwargs):
    random = np.random.default_rng(seed)
    return (random_weights(random, **kwargs) for _ in itertools.count())


@every_codec
@given(payload=payloads, key=st.binary(min_size=32, max_size=32), data=st.data())
@settings(max_examples=30)
def test_any_bytes_come_back_whatever_the_distributions(codec, payload, key, data):
    # any distributions first, then such as let every message end
    first = data.draw(st.lists(any_weights, max_size=20))
    writer, reader = codec.writer(payload, key), codec.reader(len(payload), key)
    assert carry(writer, reader, itertools.chain(first, steady())) is not None
    assert reader.payload() == writer.payload() == payload
    assert reader.num_bits == 8 * len(payload)


@every_codec
@pytest.mark.parametrize("weights", [(1, 1), (1, 99), (1, 1, 1), (5, 3, 1)])
def test_distributions_of_few_tokens_carry_bytes_if_slowly(codec, weights):
    payload = b"\x00\xff\x80"
    writer, reader = codec.writer(payload, KEY), codec.reader(3, KEY)
    assert carry(writer, reader, itertools.repeat(weighted(*weights), MAX_STEPS)) is not None
    assert reader.payload() == payload


@every_codec
def test_bytes_are_never_certain_where_tokens_tell_next_to_nothing(codec):
    writer, reader = codec.writer(b"x", KEY), codec.reader(1, KEY)
    assert carry(writer, reader, itertools.repeat(weighted(1, 2**60), 200)) is None
    assert reader.num_bits < 0.01


@every_codec
def test_a_token_that_is_certain_tells_nothing(codec):
    writer, reader = codec.writer(b"x", KEY), codec.reader(1, KEY)
    for _ in range(300):
        assert writer.choose(weighted(7)) == 0
        reader.observe(weighted(7), 0)
    assert writer.num_bits == reader.num_bits == 0


@every_codec
@pytest.mark.parametrize("index", [-1, 3])
def test_a_token_that_was_not_possible_is_refused(codec, index):
    reader = codec.reader(4, KEY)
    with pytest.raises(StegoError, match="of 3 possible"):
        reader.observe(weighted(1, 2, 3), index)


@every_codec
def test_once_certain_a_reader_learns_no_more_and_refuses_nothing(codec):
    payload = b"four"
    writer, reader = codec.writer(payload, KEY), codec.reader(4, KEY)
    carry(writer, reader, steady())
    for index in (0, 2, 77):
        reader.observe(weighted(1, 2, 3), index)
    assert reader.payload() == payload


@every_codec
def test_once_certain_a_writer_still_chooses_by_the_weights(codec):
    writer = codec.writer(b"x", KEY)
    carry(writer, codec.reader(1, KEY), steady())
    weights = weighted(1, 0x7F, 0x80)
    counts = np.bincount([writer.choose(weights) for _ in range(4000)], minlength=3)
    assert counts[0] < 60
    assert abs(counts[2] - 2000) < 200
    assert writer.payload() == b"x"


@every_codec
def test_no_bytes_are_certain_from_the_start(codec):
    assert codec.reader(0, KEY).payload() == codec.writer(b"", KEY).payload() == b""


@every_codec
def test_most_of_the_tokens_entropy_carries_bytes(codec):
    random, distributions = Random(1), steady(1)
    entropies = []

    def counted():
        for weights in distributions:
            shares = weights.weights / weights.total
            entropies.append(-(shares * np.log2(shares)).sum())
            yield weights

    num_messages = 40  # a message's luck is a few per cent
    for _ in range(num_messages):
        payload = random.randbytes(48)
        carry(codec.writer(payload, KEY), codec.reader(48, KEY), counted())
        entropies.pop()  # of the distribution that came after the end
    rate = num_messages * 48 * 8 / sum(entropies)
    assert {"range": 0.96, "fimec": 0.8}[codec.name] < rate < 1.02


def test_a_codec_is_made_by_name_and_options():
    assert parse_codec("range").name == "range"
    one, all_at_once = parse_codec("fimec:block_bits=1"), parse_codec("fimec:block_bits=12")
    for codec, num_bits in ((one, 1), (all_at_once, 12)):
        reader = codec.reader(2, KEY)
        reader.observe(weighted(*[1] * 2**16), 3)
        assert reader.num_bits == num_bits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("arithmetic", "there is no codec 'arithmetic', but fimec, range"),
        ("", "there is no codec"),
        ("range:block_bits=8", "options: none"),
        ("fimec:bits=8", "options: block_bits=NUMBER"),
        ("fimec:block_bits=8,block_bits=8", "options: block_bits"),
        ("fimec:block_bits=eight", "'block_bits=eight' is not"),
        ("fimec:block_bits=0", "give 1 to 12"),
    ],
)
def test_an_unknown_codec_or_option_is_refused_by_name(text, reason):
    with pytest.raises(StegoError, match=reason):
        parse_codec(text)
