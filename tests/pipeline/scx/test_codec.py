"""What a holder of encoded rows computes is read as plain attention, and nothing else is."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline.dtypes import BFLOAT16
from pipeline.scx.codec import LayerCodec
from pipeline.scx.errors import AnswerRefused, CacheRefused, ScxError
from pipeline.scx.keys import KeyGenerator
from pipeline.scx.rows import Answer, EncodedRows, attend

SEED = bytes(range(32))
HEADS, GROUP, DIM = 2, 3, 16
PLAIN = {"permute": False, "dense": False}
MODES = {
    "nothing": PLAIN,
    "permutation": {**PLAIN, "permute": True},
    "dense keys": {**PLAIN, "dense": True},
    "decoys": {**PLAIN, "redundant_num": 5},
    "noise": {**PLAIN, "alp": 1.0},
    "one-time keys": {**PLAIN, "dense": True, "one_time": True},
    "all": {"redundant_num": 5, "alp": 1.0, "one_time": True},
    "all but one-time keys": {"redundant_num": 5, "alp": 1.0},
}


def keys_of(**changed):
    return KeyGenerator(
        **{"seq_len": 3, "hidden_dim": 64, "qk_hidden_dim": DIM, "seed": SEED, **changed}
    )


def rows_of(num_rows, kind=0, dtype=np.float32):
    rng = np.random.default_rng(kind * 1000 + num_rows)
    return tuple(rng.normal(size=(HEADS, num_rows, DIM)).astype(dtype) for _ in range(2))


def codec_of(mode="all", layer=4, dtype=np.float32, model=b"m", **changed):
    keys = keys_of(**{**MODES[mode], **changed})
    decoys = rows_of(5, kind=1) if keys.redundant_num else None
    return LayerCodec(keys, layer, HEADS, decoys=decoys, dtype=dtype, model=model)


def filled(codec, num_rows=40, num_later=7, dtype=np.float32):
    keys, values = rows_of(num_rows + num_later, dtype=dtype)
    held = codec.encode(keys[:, :num_rows], values[:, :num_rows])
    receipt = codec.seal(held)
    for at in (num_rows, num_rows + 1, num_rows + 3):  # one, two and then all others at a time
        until = {num_rows: at + 1, num_rows + 1: at + 2}.get(at, num_rows + num_later)
        if at < until:
            more = codec.append(keys[:, at:until], values[:, at:until], receipt)
            held, receipt = held.followed_by(more), codec.extend(receipt, more)
    return held, receipt, keys, values


def plain_attention(queries, keys, values):
    scores = queries @ keys.mT
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


def queries_of():
    return np.random.default_rng(9).normal(size=(HEADS, GROUP, DIM))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 1e-5)], ids=str)
def test_attention_over_encoded_rows_is_plain_attention(mode, dtype, error):
    codec = codec_of(mode, dtype=dtype)
    held, receipt, keys, values = filled(codec, dtype=dtype)
    asked = codec.ask(queries_of().astype(dtype), receipt)
    read = codec.read(attend(asked, held, codec.segments(receipt)), asked, receipt)
    expected = plain_attention(queries_of(), keys.astype(float), values.astype(float))
    assert np.abs(read - expected).max() < error


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_is_decoded_by_another_object(mode):
    held, receipt, keys, values = filled(codec_of(mode))
    found = codec_of(mode).decode(held, receipt)
    assert np.abs(found[0] - keys).max() < 1e-5
    assert np.abs(found[1] - values).max() < 1e-5


def test_another_process_decodes_a_cache(tmp_path):
    held, receipt, keys, _ = filled(codec_of("all but one-time keys"))
    np.savez(tmp_path / "cache.npz", keys=held.keys, values=held.values, plain=keys,
             decoys=np.stack(rows_of(5, kind=1)))  # fmt: skip
    program = f"""
import numpy as np
from pipeline.scx.codec import LayerCodec
from pipeline.scx.rows import EncodedRows, Receipt
from pipeline.scx.keys import KeyGenerator
file = np.load({str(tmp_path / "cache.npz")!r})
keys = KeyGenerator(99, 64, {DIM}, 5, 1.0, seed={SEED!r})
codec = LayerCodec(keys, 4, {HEADS}, decoys=tuple(file["decoys"]), model=b"m")
found, _ = codec.decode(EncodedRows(file["keys"], file["values"]), {receipt!r})
assert np.abs(found - file["plain"]).max() < 1e-5
print("same")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.stdout == b"same\n", done.stderr


@pytest.mark.parametrize(("dtype", "error"), [(np.float16, 3e-3), (BFLOAT16, 3e-2)], ids=str)
def test_halves_are_as_near_as_halves_are(dtype, error):
    codec = codec_of("all", dtype=dtype)
    held, receipt, keys, values = filled(codec)
    assert held.keys.dtype == dtype
    real = EncodedRows(codec._numbers(held.keys), codec._numbers(held.values))
    asked = codec.ask(queries_of().astype(np.float32), receipt)
    read = codec.read(attend(asked, real, codec.segments(receipt)), asked, receipt)
    assert np.abs(read - plain_attention(queries_of(), keys, values)).max() < 10 * error
    assert np.abs(codec.decode(held, receipt)[0] - keys).max() < 10 * error


def test_noise_is_on_every_element_that_is_held_or_asked():
    quiet, noisy = codec_of("dense keys"), codec_of("noise")
    keys, values = (np.zeros((HEADS, 50, DIM), np.float32) for _ in range(2))
    assert not quiet.encode(keys, values).keys.any()
    held = noisy.encode(keys, values)
    for rows in (held.keys, held.values):
        assert (np.abs(rows).mean(1) > 1e-2).all()
    receipt = noisy.seal(held)
    one = noisy.ask(np.zeros((HEADS, GROUP, DIM), np.float32), receipt)
    assert (np.abs(one).mean((1, 2)) > 1e-3).all()
    more = noisy.append(keys[:, :1], values[:, :1], receipt)
    other = noisy.ask(np.zeros((HEADS, GROUP, DIM), np.float32), noisy.extend(receipt, more))
    assert not np.allclose(one, other)


def test_a_permutation_moves_rows_and_keeps_them():
    codec = codec_of("permutation")
    keys, values = rows_of(64)
    held = codec.encode(keys, values)
    for head in range(HEADS):
        assert (held.keys[head] != keys[head]).any(1).sum() > 50
        order = np.lexsort(held.keys[head].T), np.lexsort(keys[head].T)
        assert (held.keys[head][order[0]] == keys[head][order[1]]).all()
        assert (held.values[head][order[0]] == values[head][order[1]]).all()


def test_decoys_are_held_among_the_rows():
    codec = codec_of("decoys", permute=True)
    keys, values = rows_of(20)
    held = codec.encode(keys, values)
    assert held.num_rows == 25
    for decoy in rows_of(5, kind=1)[0][0]:
        assert (held.keys[0] == decoy).all(1).any()
    places = [np.flatnonzero((held.keys[0] == d).all(1))[0] for d in rows_of(5, kind=1)[0][0]]
    assert sorted(places) != list(range(5))


def test_with_one_time_keys_no_two_steps_share_a_key():
    codec = codec_of("one-time keys")
    keys, values = (np.repeat(rows[:, :1], 8, 1) for rows in rows_of(1))
    receipt = codec.seal(codec.encode(keys[:, :1], values[:, :1]))
    seen = set()
    for at in range(8):
        more = codec.append(keys[:, at : at + 1], values[:, at : at + 1], receipt)
        receipt = codec.extend(receipt, more)
        seen.add(more.keys[0].tobytes())
    assert len(seen) == 8


def test_rows_that_come_later_but_together_are_permuted_too():
    codec = codec_of("permutation")
    keys, values = rows_of(64)
    receipt = codec.seal(codec.encode(keys[:, :8], values[:, :8]))
    more = codec.append(keys[:, 8:], values[:, 8:], receipt)
    for head in range(HEADS):
        assert (more.keys[head] != keys[head, 8:]).any(1).sum() > 45
        order = np.lexsort(more.keys[head].T), np.lexsort(keys[head, 8:].T)
        assert (more.keys[head][order[0]] == keys[head, 8:][order[1]]).all()
        assert (more.values[head][order[0]] == values[head, 8:][order[1]]).all()
    assert (more.keys[0] != more.keys[1]).any()


@pytest.mark.parametrize(
    "chunks",
    [(), ((40, 7),), ((41, 2), (43, 5)), ((43, 4), (41, 2)), ((41, -2), (43, 4)), ((41, 2),)],
    ids=str,
)
def test_a_receipt_that_says_other_chunks_is_refused(chunks):
    codec = codec_of()
    held, receipt, _, _ = filled(codec)
    assert receipt.chunks == ((41, 2), (43, 4))
    with pytest.raises(CacheRefused):
        codec.check(held, replace(receipt, chunks=chunks))


def turned(rows, change):
    return EncodedRows(*(change(array) for array in (rows.keys, rows.values)))


def swapped(array):
    array = array.copy()
    array[:, [3, 9]] = array[:, [9, 3]]
    return array


def one_bit(array):
    array = array.copy()
    array.view(np.uint8)[0, 5, 0] ^= 1
    return array


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, :-1], lambda a: a[:, 1:], lambda a: np.concatenate((a, a[:, :1]), 1),
        lambda a: a[:1], lambda a: a[..., :-1], lambda a: a.astype(np.float64), swapped, one_bit,
        lambda a: a[::-1], np.zeros_like, lambda a: a[:, :, ::-1],
    ],
    ids=["truncated", "beheaded", "longer", "a head missing", "narrower", "other numbers",
         "rows swapped", "a bit turned", "heads swapped", "zeros", "columns swapped"],
)  # fmt: skip
def test_altered_rows_are_refused(change):
    codec = codec_of()
    held, receipt, _, _ = filled(codec)
    codec.check(held, receipt)
    with pytest.raises(CacheRefused, match="layer 4"):
        codec.decode(turned(held, change), receipt)


def test_an_older_cache_is_refused_with_the_newer_receipt():
    codec = codec_of()
    older, _, _, _ = filled(codec, num_later=6)
    _, receipt, _, _ = filled(codec, num_later=7)
    with pytest.raises(CacheRefused):
        codec.check(older, receipt)


def test_keys_and_values_swapped_are_refused():
    codec = codec_of()
    held, receipt, _, _ = filled(codec)
    with pytest.raises(CacheRefused):
        codec.check(EncodedRows(held.values, held.keys), receipt)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": b"other"}, {"session": b"other"}, {"epoch": 3}, {"layer": 5}, {"model": b"other"},
        {"mode": "noise"}, {"permute": False}, {"alp": 0.5}, {"one_time": False},
        {"dtype": np.float64},
    ],
    ids=str,
)  # fmt: skip
def test_what_others_encoded_is_refused(changed):
    held, receipt, _, _ = filled(codec_of())
    with pytest.raises(CacheRefused) as caught:
        codec_of(**changed).decode(held, receipt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_first", [-1, 0, 39, 41, 1000])
def test_a_receipt_that_says_other_numbers_is_refused(num_first):
    codec = codec_of()
    held, receipt, _, _ = filled(codec)
    with pytest.raises(CacheRefused):
        codec.check(held, replace(receipt, num_first=num_first))


def test_an_answer_that_no_honest_holder_gives_is_refused():
    codec = codec_of("all but one-time keys")
    held, receipt, _, _ = filled(codec)
    asked = codec.ask(queries_of().astype(np.float32), receipt)
    answer = attend(asked, held, codec.segments(receipt))
    bad = [
        Answer(answer.outputs[:1], answer.log_sums),
        Answer(answer.outputs, answer.log_sums[..., None]),
        Answer(answer.outputs * np.nan, answer.log_sums),
        Answer(answer.outputs, np.full_like(answer.log_sums, np.inf)),
        Answer(answer.outputs, answer.log_sums - 20),  # less than the decoys' own share
    ]
    for each in bad:
        with pytest.raises(AnswerRefused):
            codec.read(each, asked, receipt)


def test_decoys_that_hide_all_rows_are_an_error_and_not_a_wrong_answer():
    keys = keys_of(redundant_num=5)
    decoys = tuple(1000 * rows for rows in rows_of(5, kind=1))
    codec = LayerCodec(keys, 0, HEADS, decoys=decoys)
    held = codec.encode(*rows_of(10))
    receipt = codec.seal(held)
    asked = codec.ask(queries_of().astype(np.float32), receipt)
    with pytest.raises(ScxError, match="decoy"):
        codec.read(attend(asked, held, codec.segments(receipt)), asked, receipt)


def test_other_shapes_and_missing_decoys_are_one_clear_error():
    codec = codec_of("dense keys")
    keys, values = rows_of(3)
    for bad in [(keys[0], values), (keys, values[:, :2]), (keys[:, :0], values[:, :0]),
                (keys[..., :4], values[..., :4])]:  # fmt: skip
        with pytest.raises(ScxError):
            codec.encode(*bad)
    with pytest.raises(ScxError, match="redundant_num"):
        LayerCodec(keys_of(redundant_num=2), 0, HEADS)
    with pytest.raises(ScxError):
        LayerCodec(keys_of(redundant_num=2), 0, HEADS, decoys=rows_of(5))
    with pytest.raises(ScxError):
        LayerCodec(keys_of(), 0, HEADS, dtype=np.int8)
    with pytest.raises(ScxError):
        LayerCodec(keys_of(), 0, HEADS, sequence=1)
