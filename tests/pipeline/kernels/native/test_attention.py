from functools import partial

import pytest
import torch

SHAPES = [(1, 1, 16), (12, 12, 64), (9, 3, 64), (4, 4, 32), (6, 2, 80), (8, 1, 128), (60, 1, 16)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[torch.float32, torch.float16], ids=["floats", "halves"])
def make(request, native):
    return partial(Attention, native, request.param)


def held(x, dtype):
    """What a cache of that dtype gives back, in float64."""
    most = torch.finfo(dtype).max
    return x if dtype == torch.float32 else x.float().clamp(-most, most).to(dtype).double()


class Attention:
    """A cache of `num_slots` and the calls on it; its memory starts as NaN."""

    def __init__(
        self,
        native,
        dtype,
        heads,
        kv_heads,
        head_dim,
        max_seq=128,
        num_slots=2,
        window=0,
        sinks=None,
    ):
        self.native, self.window, self.max_seq = native, window, max_seq
        self.shape, self.sinks = (heads, kv_heads, head_dim), sinks
        self.width = (heads + 2 * kv_heads) * head_dim
        size = num_slots, kv_heads, max_seq, head_dim
        self.keys, self.values = (torch.full(size, torch.nan, dtype=dtype) for _ in range(2))

    def __call__(self, qkv, *spans):
        table = torch.tensor(spans, dtype=torch.int64)
        heads, kv_heads, head_dim = self.shape
        out = torch.full((qkv.shape[0], heads * head_dim), torch.nan)
        self.native.attend(
            qkv.data_ptr(), qkv.stride(0), out.data_ptr(), self.keys.data_ptr(),
            self.values.data_ptr(), table.data_ptr(), len(spans), heads, kv_heads, head_dim,
            self.max_seq, self.window, self.keys.itemsize,
            0 if self.sinks is None else self.sinks.data_ptr(),
        )  # fmt: skip
        return out

    def expected(self, qkv):
        """The same of one whole sequence in float64."""
        heads, kv_heads, head_dim = self.shape
        rows = qkv.shape[0]
        each = qkv.double().view(rows, -1, head_dim).transpose(0, 1)
        q, k, v = each.split([heads, kv_heads, kv_heads])
        k, v = (held(x, self.keys.dtype).repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / head_dim**0.5
        distance = torch.arange(rows)[:, None] - torch.arange(rows)[None]
        hidden = (distance < 0) | ((distance >= self.window) if self.window else False)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            ends = self.sinks.double()[:, None, None].expand(heads, rows, 1)
            scores = torch.cat([scores, ends], -1)
        weights = scores.softmax(-1)[..., :rows]
        return (weights @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 1, 20])
def test_a_whole_prompt_matches_float64(make, shape, window):
    attention = make(*shape, window=window)
    qkv = normal(100, attention.width)
    found = attention(qkv, (1, 0, 100, 0))
    assert (found - attention.expected(qkv)).abs().max() <= 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_company_and_threads_change_no_bit(native, make, shape, window, threads):
    native.set_num_threads(1)
    whole = make(*shape, window=window)
    qkv = normal(100, whole.width)
    expected = whole(qkv, (0, 0, 100, 0))
    native.set_num_threads(threads)
    single = make(*shape, window=window)
    by_token = [single(qkv[i : i + 1], (1, 0, 1, i)) for i in range(100)]
    assert torch.cat(by_token).equal(expected)
    mixed = make(*shape, window=window)
    mixed(qkv[:37], (1, 0, 37, 0))
    # the rest of it and the beginning of another, then single rows of both
    both = mixed(torch.cat([qkv[:50], qkv[37:99]]), (0, 0, 50, 0), (1, 50, 62, 37))
    assert both.equal(torch.cat([expected[:50], expected[37:99]]))
    last = mixed(torch.cat([qkv[99:], qkv[50:51]]), (1, 0, 1, 99), (0, 1, 1, 50))
    assert last.equal(torch.cat([expected[99:], expected[50:51]]))


@pytest.mark.parametrize("shape", [(4, 2, 32), (6, 6, 16), (16, 2, 16)])
@pytest.mark.parametrize("window", [0, 20])
def test_sinks_take_their_share_of_every_row_however_it_comes(make, shape, window):
    """More heads share keys in the last shape than a single row's own way takes."""
    sinks = 3 * normal(shape[0], seed=1)
    attention = make(*shape, window=window, sinks=sinks)
    qkv = normal(100, attention.width)
    found = attention(qkv, (1, 0, 100, 0))
    assert (found - attention.expected(qkv)).abs().max() <= 2e-6
    by_token = [attention(qkv[i : i + 1], (0, 0, 1, i)) for i in range(100)]
    assert torch.cat(by_token).equal(found)


@pytest.mark.parametrize("score", [-1e30, -200.0, 200.0, 1e30])
def test_a_sink_far_from_all_scores_is_all_or_nothing(make, score):
    sinks = torch.full((2,), score)
    attention, plain = make(2, 1, 16, sinks=sinks), make(2, 1, 16)
    qkv = normal(40, attention.width)
    found, expected = (each(qkv, (0, 0, 40, 0)) for each in (attention, plain))
    assert found.equal(expected) if score < 0 else found.abs().max() <= 1e-30


def test_a_long_context_matches_float64_and_its_chunks(make):
    attention = make(3, 1, 64, max_seq=4096)
    qkv = normal(3000, attention.width)
    found = attention(qkv, (0, 0, 3000, 0))
    assert (found - attention.expected(qkv)).abs().max() <= 2e-6
    attention(qkv[:2999], (1, 0, 2999, 0))
    assert attention(qkv[2999:], (1, 0, 1, 2999)).equal(found[2999:])


def test_extreme_scores_neither_overflow_nor_vanish(make):
    attention = make(1, 1, 16)
    qkv = normal(40, attention.width) * 40
    assert (attention(qkv, (0, 0, 40, 0)) - attention.expected(qkv)).abs().max() <= 1e-2
    assert attention(qkv * 1e3, (0, 0, 40, 0)).isfinite().all()


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("shape", [(1, 1, 16), (9, 3, 64)])
@pytest.mark.parametrize("spoiler", [torch.inf, torch.nan])
def test_infinite_values_stay_out_of_rows_that_do_not_see_them(make, shape, window, spoiler):
    clean, spoilt = (make(*shape, window=window) for _ in range(2))
    qkv = normal(40, clean.width)
    expected = clean(qkv, (0, 0, 40, 0))
    qkv[21, -1] = spoiler  # a value
    found = spoilt(qkv, (0, 0, 40, 0))
    seen = range(21, 21 + window if window else 40)
    for row in range(40):
        assert found[row].equal(expected[row]) == (row not in seen), row


def test_halves_are_rounded_to_nearest_and_never_become_infinite(native):
    attention = Attention(native, torch.float16, 2, 1, 16)
    qkv = normal(40, attention.width)
    qkv[:, 32:] *= torch.logspace(-9, 9, 32)
    qkv[3, 32], qkv[4, 50] = torch.inf, -torch.inf
    qkv[20, 40], qkv[30, 60] = torch.nan, torch.nan
    attention(qkv, (0, 0, 40, 0))
    blocks = attention.keys[0].view(8, 16, 16).transpose(1, 2), attention.values[0].view(8, 16, 16)
    for found, new in zip(blocks, (qkv[:, 32:48], qkv[:, 48:]), strict=True):
        written = found.reshape(128, 16)[:40].double()
        assert torch.equal(written.nan_to_num(0.25), held(new, torch.float16).nan_to_num(0.25))
        assert written.isnan().sum() == 1
        assert (written.abs() == 65504).any()


def test_rows_may_be_padded_and_other_slots_are_left_alone(make):
    attention = make(2, 1, 16)
    wide = normal(30, attention.width + 5)
    found = attention(wide[:, : attention.width], (1, 0, 30, 0))
    assert (found - attention.expected(wide[:, : attention.width].contiguous())).abs().max() <= 2e-6
    assert attention.keys[0].isnan().all()
    assert attention.values[0].isnan().all()


@pytest.mark.parametrize(
    ("shape", "span", "message"),
    [
        ((2, 1, 16), (0, 0, 1, 128), "leaves the context"),
        ((2, 1, 16), (0, 0, 129, 0), "leaves the context"),
        ((2, 1, 16), (-1, 0, 1, 0), "leaves the context"),
        ((2, 1, 16), (0, 0, 0, 0), "leaves the context"),
        ((3, 2, 16), (0, 0, 1, 0), "multiple of kv_heads"),
        ((2, 1, 24), (0, 0, 1, 0), "head_dim"),
    ],
)
def test_impossible_shapes_and_spans_are_refused(native, shape, span, message):
    attention = Attention(native, torch.float32, *shape)
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(1, attention.width), span)
