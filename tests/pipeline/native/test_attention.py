import pytest
import torch

SHAPES = [(1, 1, 16), (12, 12, 64), (9, 3, 64), (4, 4, 32), (6, 2, 80), (8, 1, 128), (60, 1, 16)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention:
    """A cache of `num_slots` and the calls on it; its memory starts as NaN."""

    def __init__(self, native, heads, kv_heads, head_dim, max_seq=128, num_slots=2, window=0):
        self.native, self.window, self.max_seq = native, window, max_seq
        self.shape = (heads, kv_heads, head_dim)
        self.width = (heads + 2 * kv_heads) * head_dim
        size = num_slots, kv_heads, max_seq, head_dim
        self.keys, self.values = torch.full(size, torch.nan), torch.full(size, torch.nan)

    def __call__(self, qkv, *spans):
        table = torch.tensor(spans, dtype=torch.int64)
        heads, kv_heads, head_dim = self.shape
        out = torch.full((qkv.shape[0], heads * head_dim), torch.nan)
        self.native.attend(
            qkv.data_ptr(), qkv.stride(0), out.data_ptr(), self.keys.data_ptr(),
            self.values.data_ptr(), table.data_ptr(), len(spans), heads, kv_heads, head_dim,
            self.max_seq, self.window,
        )  # fmt: skip
        return out

    def expected(self, qkv):
        """The same of one whole sequence in float64."""
        heads, kv_heads, head_dim = self.shape
        rows = qkv.shape[0]
        each = qkv.double().view(rows, -1, head_dim).transpose(0, 1)
        q, k, v = each.split([heads, kv_heads, kv_heads])
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / head_dim**0.5
        distance = torch.arange(rows)[:, None] - torch.arange(rows)[None]
        hidden = (distance < 0) | ((distance >= self.window) if self.window else False)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 1, 20])
def test_a_whole_prompt_matches_float64(native, shape, window):
    attention = Attention(native, *shape, window=window)
    qkv = normal(100, attention.width)
    found = attention(qkv, (1, 0, 100, 0))
    assert (found - attention.expected(qkv)).abs().max() <= 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_company_and_threads_change_no_bit(native, shape, window, threads):
    native.set_num_threads(1)
    whole = Attention(native, *shape, window=window)
    qkv = normal(100, whole.width)
    expected = whole(qkv, (0, 0, 100, 0))
    native.set_num_threads(threads)
    single = Attention(native, *shape, window=window)
    by_token = [single(qkv[i : i + 1], (1, 0, 1, i)) for i in range(100)]
    assert torch.cat(by_token).equal(expected)
    mixed = Attention(native, *shape, window=window)
    mixed(qkv[:37], (1, 0, 37, 0))
    # the rest of it and the beginning of another, then single rows of both
    both = mixed(torch.cat([qkv[:50], qkv[37:99]]), (0, 0, 50, 0), (1, 50, 62, 37))
    assert both.equal(torch.cat([expected[:50], expected[37:99]]))
    last = mixed(torch.cat([qkv[99:], qkv[50:51]]), (1, 0, 1, 99), (0, 1, 1, 50))
    assert last.equal(torch.cat([expected[99:], expected[50:51]]))


def test_a_long_context_matches_float64_and_its_chunks(native):
    attention = Attention(native, 3, 1, 64, max_seq=4096)
    qkv = normal(3000, attention.width)
    found = attention(qkv, (0, 0, 3000, 0))
    assert (found - attention.expected(qkv)).abs().max() <= 2e-6
    attention(qkv[:2999], (1, 0, 2999, 0))
    assert attention(qkv[2999:], (1, 0, 1, 2999)).equal(found[2999:])


def test_extreme_scores_neither_overflow_nor_vanish(native):
    attention = Attention(native, 1, 1, 16)
    qkv = normal(40, attention.width) * 40
    assert (attention(qkv, (0, 0, 40, 0)) - attention.expected(qkv)).abs().max() <= 1e-2
    assert attention(qkv * 1e3, (0, 0, 40, 0)).isfinite().all()


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("shape", [(1, 1, 16), (9, 3, 64)])
def test_infinite_values_stay_out_of_rows_that_do_not_see_them(native, shape, window):
    clean, spoilt = (Attention(native, *shape, window=window) for _ in range(2))
    qkv = normal(40, clean.width)
    expected = clean(qkv, (0, 0, 40, 0))
    qkv[21, -1] = torch.inf  # a value
    found = spoilt(qkv, (0, 0, 40, 0))
    seen = range(21, 21 + window if window else 40)
    for row in range(40):
        assert found[row].isfinite().all() == (row not in seen), row
        assert row in seen or found[row].equal(expected[row])


def test_rows_may_be_padded_and_other_slots_are_left_alone(native):
    attention = Attention(native, 2, 1, 16)
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
    attention = Attention(native, *shape)
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(1, attention.width), span)
