"""Keys come from the seed alone, and each is its own."""

import numpy as np
import pytest

from pipeline.scx.errors import ScxError
from pipeline.scx.keys import KeyGenerator, SCXKeyGenerator

SEED = bytes(range(32))


def generator(**changed):
    settings = {"seq_len": 10, "hidden_dim": 64, "qk_hidden_dim": 16, "seed": SEED, "batch_size": 2}
    return KeyGenerator(**{**settings, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": b"x" * 32},
        {"session": b"a"},
        {"epoch": 1},
        {"redundant_num": 1},
        {"permute": False},
    ],
    ids=str,
)
def test_keys_of_another_seed_session_or_epoch_have_nothing_in_common(changed):
    mine, others = generator(), generator(**changed)
    assert not np.allclose(mine.segment(0, 2, 0).keys, others.segment(0, 2, 0).keys)
    assert (mine.permutation(64, 0) != others.permutation(64, 0)).any()


def test_every_layer_head_sequence_and_purpose_has_its_own_key():
    keys = generator(one_time=True)
    matrices = [
        matrix
        for layer in range(2)
        for sequence in range(2)
        for segment in range(2)
        for kind in ("keys", "values")
        for matrix in getattr(keys.segment(layer, 2, sequence, segment), kind)
    ]
    distinct = {matrix.tobytes() for matrix in matrices}
    assert len(distinct) == len(matrices) == 32
    for matrix in matrices:
        assert np.allclose(matrix @ matrix.T, np.eye(16), atol=1e-13)


def test_a_session_and_an_epoch_cannot_be_shifted_into_each_other():
    assert generator(session=b"1|2").stream(b"p", 8) != generator(session=b"1").stream(b"p|2", 8)


def test_the_hint_of_a_length_changes_no_key():
    one, other = generator(seq_len=1), generator(seq_len=10_000)
    assert one.stream(b"p", 64, 1) == other.stream(b"p", 64, 1)


def test_a_permutation_has_every_row_once():
    for num_rows in (0, 1, 7, 1000):
        assert sorted(generator().permutation(num_rows)) == list(range(num_rows))


def test_without_a_seed_no_two_generators_agree():
    assert generator(seed=None).seed != generator(seed=None).seed


def test_neither_text_of_the_object_names_its_seed():
    assert repr(SEED)[2:10] not in repr(generator())
    assert SCXKeyGenerator is KeyGenerator


def test_noise_has_its_scale():
    noise = generator(alp=0.5).laplace(b"n", (20_000,))
    assert abs(np.abs(noise).mean() - 0.5) < 0.02
    assert abs(noise.mean()) < 0.02


@pytest.mark.parametrize(
    "changed",
    [
        {"seq_len": -1}, {"seq_len": 1.5}, {"hidden_dim": 0}, {"qk_hidden_dim": 0},
        {"qk_hidden_dim": 128}, {"redundant_num": -1}, {"alp": -1}, {"alp": float("nan")},
        {"alp": float("inf")}, {"alp": "much"}, {"batch_size": 0}, {"batch_size": True},
        {"decode_start_layers": [-1]}, {"decode_end_layers": 3}, {"decode_end_layers": ["a"]},
        {"seed": b""}, {"seed": -1}, {"seed": "text"}, {"seed": 1 << 256}, {"session": "text"},
        {"epoch": -1}, {"epoch": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_argument_is_one_clear_error(changed):
    with pytest.raises(ScxError) as caught:
        generator(**changed)
    assert next(iter(changed)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sequence_beyond_the_batch_has_no_keys():
    with pytest.raises(ScxError, match="batch_size"):
        generator().segment(0, 2, 2)
