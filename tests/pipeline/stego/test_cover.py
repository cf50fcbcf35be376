"""A text carries its message, ends where it has to, and nobody can change it unseen."""

import numpy as np
import pytest

from pipeline.stego.cover import MIN_TAIL_TOKENS, TAIL_TOKENS, CoverReader, CoverWriter
from pipeline.stego.errors import StegoError
from pipeline.stego.keys import Secret
from pipeline.stego.message import seal
from pipeline.stego.range_coding import RangeCodec
from pipeline.stego.token_weights import token_weights

SECRET = Secret(bytes(range(32)))
CODEC = RangeCodec()


def random_weights(rng, num_tokens=50, vocab_size=1000):
    """A distribution as a model might give it."""
    logits = np.full(vocab_size, -np.inf, np.float32)
    logits[rng.choice(vocab_size, num_tokens, replace=False)] = rng.normal(size=num_tokens)
    return token_weights(logits)


def written(message, rng, secret=SECRET, context=b""):
    """A whole text: the distribution and the choice of each step, and the writer."""
    writer = CoverWriter(seal(message, secret, context), CODEC)
    steps = []
    while not writer.is_done:
        weights = random_weights(rng)
        steps.append((weights, writer.choose(weights)))
    return steps, writer


def reader(secret=SECRET, context=b""):
    return CoverReader(secret, CODEC, context)


@pytest.mark.parametrize("num_bytes", [1, 5, 33])
def test_a_reader_gets_the_message(num_bytes):
    rng = np.random.default_rng(num_bytes)
    for _ in range(10):
        message = rng.bytes(num_bytes)
        steps, _ = written(message, rng)
        following = reader()
        for weights, index in steps:
            assert not following.is_done
            following.observe(weights, index)
        assert following.is_done
        assert following.message == message


def test_a_text_ends_at_a_multiple_some_tokens_after_certainty():
    rng = np.random.default_rng(0)
    for _ in range(20):
        writer = CoverWriter(seal(b"abc", SECRET, b""), CODEC)
        num_certain = None
        num_tokens = 0
        while not writer.is_done:
            writer.choose(random_weights(rng))
            num_tokens += 1
            if writer.is_certain and num_certain is None:
                num_certain = num_tokens
        assert num_tokens % TAIL_TOKENS == 0
        assert MIN_TAIL_TOKENS <= num_tokens - num_certain < MIN_TAIL_TOKENS + TAIL_TOKENS
        with pytest.raises(ValueError, match="whole"):
            writer.choose(random_weights(rng))


def test_progress_rises_to_all_bits_needed():
    rng = np.random.default_rng(1)
    steps, writer = written(b"12345", rng)
    assert writer.progress == (8 * 41, 8 * 41)
    following = reader()
    assert following.progress == (0, 0)
    seen = []
    for weights, index in steps:
        following.observe(weights, index)
        seen.append(following.progress.carried)
    assert seen == sorted(seen)
    assert following.progress == (8 * 41, 8 * 41)


def read_all(steps):
    """The message of a text of these steps."""
    following = reader()
    for each in steps:
        following.observe(*each)
    return following.message


def with_another(steps, place):
    """The text with the next token of the distribution at one place."""
    weights, index = steps[place]
    return [*steps[:place], (weights, (index + 1) % len(weights.ids)), *steps[place + 1 :]]


def test_one_changed_token_is_refused_wherever_it_stands():
    rng = np.random.default_rng(2)
    steps, _ = written(b"hello", rng)
    for place in range(len(steps)):
        with pytest.raises(StegoError, match="altered text"):
            read_all(with_another(steps, place))


def test_another_last_token_of_the_message_is_refused_though_it_carries_the_same():
    rng = np.random.default_rng(7)
    for _ in range(100):
        steps, _ = written(b"hello", rng)
        following = reader()
        num_carrying = 0
        while not following.is_certain:
            following.observe(*steps[num_carrying])
            num_carrying += 1
        with pytest.raises(StegoError, match="altered text"):
            read_all(with_another(steps, num_carrying - 1))


def test_a_tail_is_what_both_ends_draw_and_follows_from_all_before():
    rng = np.random.default_rng(3)
    steps, _ = written(b"hello", rng)
    following = reader()
    for weights, index in steps:
        if following.is_certain:
            assert following.expected(weights) == index
        else:
            with pytest.raises(ValueError, match="certain"):
                following.expected(weights)
        following.observe(weights, index)
    with pytest.raises(StegoError):
        following.observe(*steps[-1])


def test_a_text_that_is_cut_has_no_message():
    rng = np.random.default_rng(4)
    steps, _ = written(b"hello", rng)
    following = reader()
    for weights, index in steps[: len(steps) // 2]:
        following.observe(weights, index)
    with pytest.raises(StegoError, match="altered text"):
        _ = following.message


@pytest.mark.parametrize("other", [
    reader(Secret(bytes(32))), reader(context=b"other"),
])  # fmt: skip
def test_another_secret_or_context_reads_nothing(other):
    steps, _ = written(b"hello", np.random.default_rng(5))
    with pytest.raises(StegoError, match="wrong secret"):  # noqa: PT012
        for weights, index in steps:
            other.observe(weights, index)
        _ = other.message


def test_the_tails_tokens_fall_as_their_weights():
    rng = np.random.default_rng(6)
    weights = random_weights(rng, 8)
    counts = np.zeros(8)
    for _ in range(100):
        writer = CoverWriter(seal(b"a", SECRET, b""), CODEC)
        while not writer.is_certain:
            writer.choose(random_weights(rng))
        while not writer.is_done:
            counts[writer.choose(weights)] += 1
    expected = weights.weights / weights.total * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 30
