import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

SHAPES = [(1, 1), (1, 768), (3, 37), (16, 576), (200, 1000)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_norm(native, x, weight, bias):
    y = torch.empty_like(x)
    native.layer_norm(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), *x.shape, 1e-5
    )
    return y


def rms_norm(native, x, weight):
    y = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, 1e-6)
    return y


def silu_mul(native, gate_up):
    y = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    native.silu_mul(gate_up.data_ptr(), y.data_ptr(), *y.shape)
    return y


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_match_float64(native, shape):
    x, weight, bias = 3 * normal(*shape) + 2, normal(shape[1], seed=1), normal(shape[1], seed=2)
    wide = x.double()
    expected = F.layer_norm(wide, shape[1:], weight.double(), bias.double(), 1e-5)
    assert (layer_norm(native, x, weight, bias) - expected).abs().max() <= 1e-5
    expected = F.rms_norm(wide, shape[1:], weight.double(), 1e-6)
    assert (rms_norm(native, x, weight) - expected).abs().max() <= 1e-5


def test_a_norm_may_replace_its_input(native):
    x, weight, bias = normal(3, 50), normal(50), normal(50)
    expected = layer_norm(native, x, weight, bias)
    native.layer_norm(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), x.data_ptr(), 3, 50, 1e-5)
    assert x.equal(expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_norms_and_gates(native, threads):
    x, weight, bias = normal(600, 500), normal(500), normal(500)

    def all_of_them():
        return layer_norm(native, x, weight, bias), rms_norm(native, x, weight), silu_mul(native, x)

    native.set_num_threads(1)
    alone = all_of_them()
    native.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(alone, all_of_them(), strict=True))
    assert all(
        a[10:11].equal(b)
        for a, b in zip(
            alone,
            (
                layer_norm(native, x[10:11], weight, bias),
                rms_norm(native, x[10:11], weight),
                silu_mul(native, x[10:11]),
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize("inner", [1, 16, 100, 1536])
def test_gates_match_float64_over_all_magnitudes(native, inner):
    gate_up = torch.cat([normal(7, inner) * 10, normal(7, inner, seed=1)], 1)
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0
    gate, up = gate_up.double().split(inner, 1)
    expected = F.silu(gate) * up
    error = (silu_mul(native, gate_up) - expected).abs()
    assert (error <= 1e-6 * expected.abs() + 1e-30).all()


@pytest.mark.parametrize("head_dim", [2, 6, 32, 64, 80, 128])
def test_rope_rotates_the_leading_heads_only(native, head_dim):
    rows, heads, rotated = 5, 4, 3
    x = normal(rows, heads, head_dim)
    angles = normal(rows, 1, head_dim // 2, seed=1)
    cosines = torch.cat([angles.cos(), angles.cos()], -1)
    sines = torch.cat([-angles.sin(), angles.sin()], -1)
    wide = x[:, :rotated].double()
    expected = wide * cosines + wide.roll(head_dim // 2, -1) * sines
    before = x.clone()
    native.rope(
        x.data_ptr(), heads * head_dim, rows, rotated, head_dim, head_dim,
        cosines.data_ptr(), sines.data_ptr(),
    )  # fmt: skip
    assert (x[:, :rotated] - expected).abs().max() <= 1e-6
    assert x[:, rotated:].equal(before[:, rotated:])


@pytest.mark.parametrize("num_dims", [2, 12, 32, 48, 62])
def test_rope_leaves_the_rest_of_a_head_as_it_is(native, num_dims):
    rows, heads, head_dim = 5, 4, 64
    x = normal(rows, heads, head_dim)
    angles = normal(rows, 1, num_dims // 2, seed=1)
    cosines = torch.cat([angles.cos(), angles.cos()], -1)
    sines = torch.cat([-angles.sin(), angles.sin()], -1)
    wide = x[..., :num_dims].double()
    expected = wide * cosines + wide.roll(num_dims // 2, -1) * sines
    before = x.clone()
    native.rope(
        x.data_ptr(), heads * head_dim, rows, heads, head_dim, num_dims,
        cosines.data_ptr(), sines.data_ptr(),
    )  # fmt: skip
    assert (x[..., :num_dims] - expected).abs().max() <= 1e-6
    assert x[..., num_dims:].equal(before[..., num_dims:])


@pytest.mark.parametrize("size", [1, 15, 16, 48, 130])
def test_rms_norms_in_place_and_added_are_those_of_their_own(native, size):
    rows, count, stride = 5, 3, 3 * size + 7
    x, weight, y = normal(rows, stride), normal(size, seed=1), normal(rows * count, size, seed=2)
    each = x[:, : count * size].reshape(-1, size).contiguous()
    expected = rms_norm(native, each, weight)
    before, added = x.clone(), y.clone()
    native.rms_norm_within(x.data_ptr(), stride, rows, count, size, weight.data_ptr(), 1e-6)
    assert x[:, : count * size].reshape(-1, size).equal(expected)
    assert x[:, count * size :].equal(before[:, count * size :])
    native.add_rms_norm(each.data_ptr(), weight.data_ptr(), y.data_ptr(), *each.shape, 1e-6)
    assert y.equal(added + expected)


@pytest.mark.parametrize("inner", [1, 16, 100])
def test_gelu_gates_are_torchs(native, inner):
    gate_up, y = 3 * normal(4, 2 * inner), torch.empty(4, inner)
    native.gelu_mul(gate_up.data_ptr(), y.data_ptr(), 4, inner)
    gate, up = gate_up.double().chunk(2, -1)
    assert (y - F.gelu(gate, approximate="tanh") * up).abs().max() <= 1e-5


@pytest.mark.parametrize("inner", [1, 16, 100])
def test_clamped_gates_are_those_of_float64(native, inner):
    gate_up, y = 6 * normal(4, 2 * inner), torch.empty(4, inner)
    native.clamped_mul(gate_up.data_ptr(), y.data_ptr(), 4, inner, 1.702, 7.0)
    gate, up = gate_up.double().chunk(2, -1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    assert (y - gate * torch.sigmoid(1.702 * gate) * (up + 1)).abs().max() <= 1e-5


def test_a_clamped_gate_keeps_what_is_no_number(native):
    """A limit must not make a number of what went wrong before."""
    gate_up, y = torch.ones(2, 4), torch.empty(2, 2)
    gate_up[0, 0], gate_up[1, 3] = torch.nan, torch.nan
    native.clamped_mul(gate_up.data_ptr(), y.data_ptr(), 2, 2, 1.702, 7.0)
    assert y.isnan().tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("count", [0, 1, 16, 33])
def test_scaling_ends_where_it_is_told(native, count):
    x = normal(count + 3)
    before = x.clone()
    native.scale(x.data_ptr(), count, 2.5)
    assert x[:count].equal(before[:count] * 2.5)
    assert x[count:].equal(before[count:])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50257])
def test_argmax_is_the_first_greatest(native, n):
    x = normal(4, n).round(decimals=1) - 10
    found = torch.empty(4, dtype=torch.int64)
    native.argmax(x.data_ptr(), 4, n, found.data_ptr())
    for row, index in zip(x.tolist(), found.tolist(), strict=True):
        assert index == row.index(max(row))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_argmax_of_what_is_no_number_is_none_wherever_it_stands(native, n, bad):
    for at in range(0, n, max(1, n // 40)):
        x = normal(3, n)
        x[1, at] = bad
        found = torch.empty(3, dtype=torch.int64)
        native.argmax(x.data_ptr(), 3, n, found.data_ptr())
        expected = [int(x[0].argmax()), -1, int(x[2].argmax())]
        assert found.tolist() == expected
    x.fill_(-float("inf"))
    native.argmax(x.data_ptr(), 3, n, found.data_ptr())
    assert found.tolist() == [-1, -1, -1]
    x[0, n // 2] = -7.0  # the only one that may be chosen
    native.argmax(x.data_ptr(), 1, n, found.data_ptr())
    assert found[0] == n // 2


def test_impossible_shapes_are_refused(native):
    for num_dims in (0, 15, 18):
        with pytest.raises(ValueError, match="pairs of a head"):
            native.rope(0, 32, 1, 1, 16, num_dims, 0, 0)
    for head_dim in (0, 16):
        with pytest.raises(ValueError, match="heads exceed"):
            native.rope(0, 32, 1, 3, head_dim, 16, 0, 0)
    with pytest.raises(ValueError, match="exceeds a row"):
        native.rms_norm_within(0, 32, 1, 3, 16, 0, 1e-5)
    for size_first in (native.add_rms_norm, native.rms_norm):
        with pytest.raises(ValueError, match="size"):
            size_first(0, 0, 0, 1, 0, 1e-5)
    with pytest.raises(ValueError, match="size"):
        native.rms_norm(0, 0, 0, 1, 0, 1e-5)
    with pytest.raises(ValueError, match="num_threads"):
        native.set_num_threads(0)
