"""The secret rotation: orthogonal, the same of every row, and another for every secret."""

import numpy as np
import pytest

from pipeline.codecs.rotation import Rotation
from pipeline.codecs.secret_rotation import MIN_SECRET_BYTES, SecretRotation

WIDTHS = (8, 9, 24, 576, 768, 896)
SECRET = bytes(range(MIN_SECRET_BYTES))


def matrix(secret: bytes, width: int) -> np.ndarray:
    return SecretRotation(secret, width).apply(np.eye(width)).T


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_to_the_last_bits_of_double_precision(width):
    found = matrix(SECRET, width)
    np.testing.assert_allclose(found @ found.T, np.eye(width), atol=1e-14)


@pytest.mark.parametrize("width", WIDTHS)
def test_undoing_it_gives_the_rows_back(width):
    rows = np.random.default_rng(0).standard_normal((5, width))
    rotation = SecretRotation(SECRET, width)
    np.testing.assert_allclose(rotation.undo(rotation.apply(rows)), rows, atol=1e-13)


def test_a_row_is_rotated_the_same_bit_for_bit_in_any_company():
    rows = np.random.default_rng(0).standard_normal((17, 576))
    rotation = SecretRotation(SECRET, 576)
    together = rotation.apply(rows)
    for index in (0, 7, 16):
        np.testing.assert_array_equal(rotation.apply(rows[index : index + 1])[0], together[index])


def test_every_element_mixes_into_all_of_the_row_and_no_public_rotation_undoes_that():
    found = matrix(SECRET, 576)
    for each in (found, found @ Rotation(576).apply(np.eye(576, dtype=np.float32))):
        assert abs(each).max() < 8 / 576**0.5
        assert (each**4).mean() * 576**2 == pytest.approx(3, abs=0.2)  # as of normal numbers


def test_the_same_secret_gives_the_same_matrix_and_another_secret_another():
    other = bytes([SECRET[0] ^ 1]) + SECRET[1:]
    np.testing.assert_array_equal(matrix(SECRET, 64), matrix(SECRET, 64))
    assert abs(matrix(SECRET, 64) @ matrix(other, 64).T).max() < 0.9
    assert SecretRotation(SECRET, 64).fingerprint == SecretRotation(SECRET, 64).fingerprint
    assert SecretRotation(SECRET, 64).fingerprint != SecretRotation(other, 64).fingerprint
    assert SecretRotation(SECRET, 64).fingerprint != SecretRotation(SECRET, 128).fingerprint


def test_the_matrix_of_a_secret_is_the_one_it_always_was():
    """Shards that are written stay those of their secret."""
    found = matrix(SECRET, 24)
    assert SecretRotation(SECRET, 24).fingerprint.startswith("79050e665cc22e77")
    np.testing.assert_allclose(
        found[0, :4], [0.126118333832, 0.146386300337, 0.307373938052, -0.063052967004], atol=1e-11
    )


def test_a_secret_too_short_to_be_one_is_refused():
    with pytest.raises(ValueError, match="has 31 bytes; it needs at least 32"):
        SecretRotation(SECRET[:-1], 64)


def test_a_width_whose_matrix_would_be_huge_has_no_rotation():
    with pytest.raises(ValueError, match="odd factor is 2047"):
        SecretRotation(SECRET, 4094)
