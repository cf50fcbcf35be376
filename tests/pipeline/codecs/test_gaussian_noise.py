"""Noise is Gaussian, of the stated strength, and always the same for the same row."""

import numpy as np
import pytest

from pipeline.codecs.gaussian_noise import KEY_BYTES, GaussianNoise

KEY = bytes(range(KEY_BYTES))
WIDTH = 577


def noise(sigma=0.25, clip=3.0, width=WIDTH, key=KEY):
    return GaussianNoise(sigma, clip, width, key)


def rows(count, width=WIDTH, scale=0.01):
    return (scale * np.random.default_rng(count).standard_normal((count, width))).astype(np.float32)


def test_rows_are_clipped_before_they_get_noise():
    clean = rows(4, scale=1.0)
    clean[0] *= 0.01
    quiet = noise(sigma=1e-30).apply(clean, [(0, 0, 4)])
    assert (quiet[0] == clean[0]).all()
    norms = np.linalg.norm(quiet.astype(np.float64), axis=1)
    assert norms[1:] == pytest.approx(3.0, rel=1e-6)
    assert np.allclose(quiet[2] / 3, clean[2] / np.linalg.norm(clean[2]), atol=1e-6)


def test_what_is_added_is_gaussian_of_the_stated_strength():
    clean = rows(3000)
    added = (noise().apply(clean, [(5, 0, 3000)]) - clean).astype(np.float64).ravel() / 0.25
    assert abs(added.mean()) < 4e-3
    assert added.var() == pytest.approx(1, abs=0.01)
    ordered = np.sort(added)
    for quantile, expected in ((0.5, 0.0), (0.158655, -1.0), (0.97725, 2.0), (0.99865, 3.0)):
        assert ordered[int(quantile * len(ordered))] == pytest.approx(expected, abs=0.03)
    by_row = added.reshape(3000, WIDTH)
    assert abs(np.corrcoef(by_row[:-1].ravel(), by_row[1:].ravel())[0, 1]) < 4e-3
    assert abs(np.corrcoef(by_row[:, :288].ravel(), by_row[:, 288:576].ravel())[0, 1]) < 5e-3


def test_the_same_row_is_the_same_bytes_in_whatever_company():
    clean = rows(12)
    whole = noise().apply(clean, [(7, 100, 12)])
    for start in range(12):
        for stop in range(start + 1, 13):
            part = noise().apply(clean[start:stop], [(7, 100 + start, stop - start)])
            assert part.tobytes() == whole[start:stop].tobytes()
    mixed = noise().apply(clean[[3, 0, 1]], [(7, 103, 1), (7, 100, 2)])
    assert mixed.tobytes() == whole[[3, 0, 1]].tobytes()


@pytest.mark.parametrize("width", [1, 2, 3, 64, 577])
def test_no_two_places_share_noise(width):
    zeros = np.zeros((50, width), np.float32)
    places = [noise(width=width).apply(zeros, [(request, 0, 50)]) for request in range(20)]
    places.append(noise(width=width, key=KEY[::-1]).apply(zeros, [(0, 0, 50)]))
    numbers = np.concatenate(places).ravel()
    assert len(np.unique(numbers)) > 0.99 * len(numbers)
