import numpy as np
import pytest

from pipeline.offload.freivalds import ProductCheck, SecretVectors, project_weight

KEY = bytes(range(32))
ROWS, NUM_IN, NUM_OUT = 3, 24, 33
# Of each kind so many: a thousand wrong answers.
NUM_TRIES = 100

rng = np.random.default_rng(7)


def words(*shape):
    return rng.integers(0, 2**64, shape, np.uint64)


def product(x, weight):
    return (x.view(np.int64) @ weight.astype(np.int64)).view(np.uint64)


def somewhere(y, error):
    y.reshape(-1)[rng.integers(y.size, size=1)] += np.array([error], np.uint64)
    return y


def one_element_off(x, y, weight):
    return somewhere(y, words(1)[0] | np.uint64(1))


def off_by_half_the_ring(x, y, weight):
    return somewhere(y, 1 << 63)


def off_by_half_the_ring_in_many_places(x, y, weight):
    places = rng.integers(0, 2, y.shape, np.uint64)
    places[0, 0] = 1
    return y + (places << np.uint64(63))


def off_by_a_power_of_two(x, y, weight):
    return somewhere(y, 1 << int(rng.integers(64)))


def zero(x, y, weight):
    return np.zeros_like(y)


def scaled(x, y, weight):
    return y * np.uint64(rng.integers(2, 1 << 40))


def of_another_request(x, y, weight):
    return product(words(*x.shape), weight)


def of_another_layer(x, y, weight):
    return product(x, rng.integers(-(2**31), 2**31, weight.shape))


def with_two_rows_exchanged(x, y, weight):
    return np.ascontiguousarray(y[[1, 0, 2]])


def with_one_row_of_an_answer_before(x, y, weight):
    y[rng.integers(len(y))] = product(words(1, x.shape[1]), weight)[0]
    return y


KINDS = [
    one_element_off,
    off_by_half_the_ring,
    off_by_half_the_ring_in_many_places,
    off_by_a_power_of_two,
    zero,
    scaled,
    of_another_request,
    of_another_layer,
    with_two_rows_exchanged,
    with_one_row_of_an_answer_before,
]


@pytest.mark.parametrize("wrong", KINDS)
def test_a_hundred_wrong_answers_of_a_kind_are_all_found(wrong):
    vectors = SecretVectors(KEY)
    weight = rng.integers(-(2**31), 2**31, (NUM_IN, NUM_OUT))
    check = ProductCheck(vectors, project_weight(vectors, weight))
    for _ in range(NUM_TRIES):
        x = words(ROWS, NUM_IN)
        y = product(x, weight)
        assert check.is_product(x, y)
        assert not check.is_product(x, wrong(x, y.copy(), weight))


def test_what_passes_one_vector_half_the_time_would_pass_too_few():
    vectors = SecretVectors(KEY)
    passed = 0
    for at in range(200):
        error = np.zeros((1, 200), np.uint64)
        error[0, at] = 1 << 63
        passed += int((vectors.project(error) == 0).sum())
    assert 0.45 < passed / (200 * 40) < 0.55  # so each of the 40 is needed


def test_vectors_of_two_keys_have_nothing_in_common():
    one, other = (SecretVectors(bytes([each]) * 32).project(words(1, 8)) for each in (1, 2))
    assert not (one == other).any()


def test_nothing_is_nothing_wrong():
    vectors = SecretVectors(KEY)
    weight = rng.integers(-9, 9, (NUM_IN, NUM_OUT))
    check = ProductCheck(vectors, project_weight(vectors, weight))
    assert check.is_product(words(0, NUM_IN), words(0, NUM_OUT))
