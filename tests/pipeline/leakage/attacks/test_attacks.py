"""Each attack on random rows: it succeeds where it must, and fails where it must."""

import numpy as np
import pytest

from pipeline.leakage import views
from pipeline.leakage.attacks.gram_matching import gram_matching, match_gram
from pipeline.leakage.attacks.known_prefix import known_prefix
from pipeline.leakage.attacks.known_weights import known_weights
from pipeline.leakage.attacks.least_squares import aligned_bases
from pipeline.leakage.attacks.many_sessions import averaged_noise, shared_secret
from pipeline.leakage.attacks.nearest_vocabulary import nearest_vocabulary
from pipeline.leakage.attacks.sorted_matching import sorted_matching
from pipeline.leakage.evidence import Evidence, Pairs, RowByRow
from pipeline.leakage.matching import nearest

VOCAB, WIDTH, TOKENS, KNOWN = 500, 32, 24, 8


def random_orthogonal(size, rng):
    """Uniform over all orthogonal matrices of that size."""
    matrix, upper = np.linalg.qr(rng.standard_normal((size, size)))
    return (matrix * np.sign(np.diag(upper))).astype(np.float32)


def rotated(size, rng):
    matrix = random_orthogonal(size, rng)
    plain = views.plain(size, rng)
    rotate = lambda rows: rows @ matrix.T  # noqa: E731
    return views.View(rotate, lambda rows: rows @ matrix, rotate, plain.disturb)


def rotated_int8(size, rng):
    """The same, rounded to what a byte an element can hold."""
    view = rotated(size, rng)

    def observe(rows):
        found = view.observe(rows)
        scales = np.abs(found).max(axis=1, keepdims=True) / 127
        return np.rint(found / scales) * scales

    return views.View(observe, view.restore, view.readers, view.disturb)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def vocabulary(rng):
    return rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)


@pytest.fixture
def ids(rng):
    return rng.integers(0, VOCAB, TOKENS)


@pytest.fixture
def evidence_of(rng, vocabulary, ids):
    """What an attacker holds of rows that `view` was applied to."""

    def make(view):
        sent = [view.observe(view.disturb(vocabulary[ids])) for _ in range(16)]
        readers = rng.standard_normal((2 * WIDTH, WIDTH)).astype(np.float32)
        others = vocabulary[rng.integers(0, VOCAB, 4 * WIDTH)]
        return Evidence(
            observed=sent[0],
            known=vocabulary[ids[:KNOWN]],
            readers=Pairs(readers, view.readers(readers)),
            other_sessions=Pairs(others, view.observe(view.disturb(others))),
            repeated=np.stack(sent),
        )

    return make


@pytest.fixture
def recovery(evidence_of, vocabulary, ids):
    """The share of tokens that an attack on a view gives back at layer 0."""

    def of(attack, view):
        comparison = attack(evidence_of(view))
        if isinstance(comparison, RowByRow):
            found = nearest(comparison.observed, comparison.features(vocabulary))
        else:
            found = match_gram(comparison.observed, lambda position: vocabulary)
        return float((found == ids).mean())

    return of


def fresh_rotations(rng):
    """A rotation of its own for each row: nothing is left but lengths."""

    def observe(rows):
        return np.stack([row @ random_orthogonal(WIDTH, rng).T for row in rows])

    plain = views.plain(WIDTH, rng)
    return views.View(observe, plain.restore, plain.readers, plain.disturb)


def strong_noise(rng):
    return views.noisy(4.0, 100.0)(WIDTH, rng)


def turned_lengths(rng):
    """Rows of random lengths, each rotated by itself: nothing is left at all."""
    view = fresh_rotations(rng)

    def observe(rows):
        return view.observe(rows) * rng.uniform(0.2, 5, (len(rows), 1)).astype(np.float32)

    return views.View(observe, view.restore, view.readers, view.disturb)


@pytest.mark.parametrize(
    ("attack", "view"),
    [
        (nearest_vocabulary, views.plain),
        (sorted_matching, views.permuted),
        (gram_matching, views.permuted),
        (gram_matching, rotated),
        (gram_matching, rotated_int8),
        (known_prefix, views.permuted),
        (known_prefix, rotated),
        (known_weights, views.permuted),
        (known_weights, rotated),
        (known_weights, rotated_int8),
        (shared_secret, rotated),
        (shared_secret, rotated_int8),
        (averaged_noise, views.noisy(1.0, 100.0)),
    ],
)
def test_what_a_mode_leaves_is_enough(recovery, rng, attack, view):
    assert recovery(attack, view(WIDTH, rng)) >= 0.9


@pytest.mark.parametrize(
    ("attack", "view"),
    [
        (nearest_vocabulary, lambda rng: views.permuted(WIDTH, rng)),
        (nearest_vocabulary, lambda rng: rotated(WIDTH, rng)),
        (nearest_vocabulary, strong_noise),
        (sorted_matching, lambda rng: rotated(WIDTH, rng)),
        (gram_matching, turned_lengths),
        (gram_matching, strong_noise),
        (known_prefix, turned_lengths),
        (shared_secret, fresh_rotations),
        (averaged_noise, lambda rng: views.noisy(40.0, 100.0)(WIDTH, rng)),
    ],
)
def test_what_is_not_left_cannot_be_used(recovery, rng, attack, view):
    assert recovery(attack, view(rng)) < 0.3


def test_sessions_together_tell_what_one_does_not(recovery, rng):
    view = views.noisy(2.0, 100.0)(WIDTH, rng)
    assert recovery(averaged_noise, view) > recovery(nearest_vocabulary, view) + 0.3


def test_enough_rows_give_the_secret_matrix(rng):
    matrix = random_orthogonal(WIDTH, rng)
    rows = rng.standard_normal((3 * WIDTH, WIDTH)).astype(np.float32)
    rows[3] *= 1e4  # as a few rows of trained models are
    seen, meant = aligned_bases(Pairs(rows, rows @ matrix.T))
    assert np.abs(seen @ meant.T - matrix).max() < 1e-3


def test_a_few_rows_give_it_on_what_they_span(rng):
    matrix = random_orthogonal(WIDTH, rng)
    rows = rng.standard_normal((5, WIDTH)).astype(np.float32)
    seen, meant = aligned_bases(Pairs(rows, rows @ matrix.T))
    assert seen.shape == meant.shape == (WIDTH, 5)
    other = rng.standard_normal((9, WIDTH)).astype(np.float32)
    assert np.abs(other @ matrix.T @ seen - other @ meant).max() < 1e-4


def test_a_single_observation_is_matched_by_its_length(vocabulary, rng):
    row = vocabulary[7:8] @ random_orthogonal(WIDTH, rng).T
    assert match_gram(row, lambda position: vocabulary).tolist() == [7]
