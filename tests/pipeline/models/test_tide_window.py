"""Under a window a row is a function of the tokens alone, and keys stand where they should."""

import numpy as np
import pytest

from pipeline.dtypes import FLOAT32
from pipeline.errors import InputError, MessageError
from pipeline.kernels.kv_storage import Slide, turn_of
from pipeline.models.rope import rope_frequencies
from pipeline.protocol.batch import Segment
from pipeline.protocol.tide_window import TideWindow

FAMILIES = ["llama-untied-gqa", "llama-tied-llama3-rope"]
WINDOW = TideWindow(40, 4)
LENGTH = 150


@pytest.fixture(params=FAMILIES)
def oracle(request, make_oracle, kernels):
    return make_oracle(request.param).computing_with(kernels)


def rows(shards, token_ids, cuts, window=WINDOW, slots=1):
    """What comes out of the last stage for a text that comes in pieces."""
    caches = [shard.new_cache(slots, 1 << 20, window) for shard in shards]
    found, start = [], 0
    for count in cuts:
        hidden = token_ids[start : start + count]
        batch = [Segment(slots - 1, start, len(hidden))]
        for shard, cache in zip(shards, caches, strict=True):
            (hidden,) = shard.kernels.to_host(shard.forward(hidden, batch, cache))
        found.append(hidden.copy())
        start += count
    return np.concatenate(found), caches


def text(config):
    return np.random.default_rng(5).integers(3, config.vocab_size, LENGTH)


def test_any_cutting_gives_the_same_rows_and_so_do_stages(oracle):
    ids = text(oracle.config)
    expected, _ = rows(oracle.split(), ids, [1] * LENGTH)
    for cuts in ([LENGTH], [39, 1, 1, 109], [7] * 22):
        for bounds in ((), (2,)):
            found, _ = rows(oracle.split(*bounds), ids, cuts)
            if oracle.split()[0].is_row_exact:
                assert np.array_equal(found, expected)
            else:
                assert np.abs(found - expected).max() < 1e-3


def test_up_to_its_size_a_window_changes_nothing(oracle):
    ids = text(oracle.config)[: WINDOW.size]
    cuts = [1] * len(ids)
    assert np.array_equal(
        rows(oracle.split(), ids, cuts)[0], rows(oracle.split(), ids, cuts, None)[0]
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("slide", [Slide(1, 4, 2, 40), Slide(1, 0, 16, 37), Slide(1, 17, 5, 33)])
def test_kept_keys_are_turned_as_float64_would_and_values_only_move(oracle, dtype, slide):
    (shard,) = oracle.split(dtype=dtype)
    cache = shard.new_cache(3, 40)
    ids = text(oracle.config)[: slide.held]
    shard.forward(
        np.concatenate([ids, ids[::-1]]),
        [Segment(1, 0, slide.held), Segment(2, 0, slide.held)],
        cache,
    )
    before, beside = cache.export(1, range(slide.held)), cache.export(2, range(slide.held))
    frequencies = rope_frequencies(oracle.config.shape(0).rope).astype(np.float64)
    angles = map(shard.kernels.to_device, turn_of(slide.num_dropped, frequencies))
    cache.storage.slide(slide, *angles)
    left, end = slide.num_kept + slide.num_dropped, slide.held - slide.num_dropped
    turn = np.exp(-1j * slide.num_dropped * frequencies)
    half = len(frequencies)
    tolerance = 1e-6 if cache.storage.dtype == FLOAT32 else 1e-3
    for old, new in zip(before, cache.export(1, range(slide.held)), strict=True):
        keys = old.keys[:, left:].astype(np.float64)
        turned = (keys[..., :half] + 1j * keys[..., half:]) * turn
        expected = np.concatenate((turned.real, turned.imag), axis=-1)
        error = np.abs(new.keys[:, slide.num_kept : end] - expected).max()
        assert error <= tolerance * np.abs(expected).max()
        assert np.array_equal(new.values[:, slide.num_kept : end], old.values[:, left:])
        for name in ("keys", "values"):
            kept = slice(slide.num_kept)
            assert np.array_equal(getattr(new, name)[:, kept], getattr(old, name)[:, kept])
    for old, new in zip(beside, cache.export(2, range(slide.held)), strict=True):
        assert all(map(np.array_equal, old, new))


def test_a_slot_goes_back_to_a_drop_and_on_as_before_but_not_behind_it(oracle):
    ids = text(oracle.config)
    shards = oracle.split()
    expected, _ = rows(shards, ids[:41], [1] * 41)
    _, (cache,) = rows(shards, ids[:41], [1] * 41)
    with pytest.raises(MessageError, match=r"cannot go back to 39.*back to 40, or to none"):
        cache.truncate(0, 39)
    cache.truncate(0, 40)
    (again,) = shards[0].kernels.to_host(shards[0].forward(ids[40:41], [Segment(0, 40, 1)], cache))
    assert np.array_equal(again[0], expected[40])
    cache.truncate(0, 0)
    assert cache.lengths == (0,)
    assert cache.num_rows == 0
    assert not any(np.asarray(each).any() for each in (*cache.keys, *cache.values))


def test_what_has_dropped_rows_is_not_exported_and_more_than_it_holds_not_restored(oracle):
    ids = text(oracle.config)
    _, (cache,) = rows(oracle.split(), ids[:50], [50])
    with pytest.raises(MessageError, match="dropped"):
        cache.export(0, range(50))
    _, (whole,) = rows(oracle.split(), ids[:50], [50], None)
    cache.truncate(0, 0)
    with pytest.raises(MessageError, match="more than its window of 40"):
        cache.restore(0, 0, whole.export(0, range(50)))
    assert cache.lengths == (0,)
    cache.restore(0, 0, whole.export(0, range(40)))
    assert cache.lengths == (40,)


def test_memory_is_that_of_the_window(oracle):
    (shard,) = oracle.split()
    cache = shard.new_cache(2, 1 << 20, WINDOW)
    assert cache.num_bytes <= shard.kv_bytes(2, 48)


def test_learned_positions_and_more_than_the_model_sees_are_refused(make_oracle, native):
    for name, size, told in (
        ("gpt2", 40, "has no rotary positions"),
        ("llama-untied-gqa", 1 << 20, "more than the model's context"),
        ("mistral-sliding-window", 60, "more than the model's own window"),
    ):
        (shard,) = make_oracle(name).computing_with(native).split()
        with pytest.raises(InputError, match=told):
            shard.check_window(TideWindow(size))
