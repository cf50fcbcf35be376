import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.weights.int4 import dequantise_int4, quantise_int4
from pipeline.weights.quantization import quantise

SIZES = [
    (1, 1),
    (3, 5),
    (16, 16),
    (31, 33),
    (64, 130),
    (65, 64),
    (576, 192),
    (770, 100),
    (3072, 48),
]
ROWS = (1, 2, 3, 4, 6, 7, 16, 97)
ACTIVATIONS = {
    0: lambda x: x,
    1: lambda x: F.gelu(x, approximate="tanh"),
    2: F.gelu,
    3: F.relu,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(x):
    """x as int8 rounds it: 32 inputs share a scale. float64.

    Levels in float32, as the kernel finds them: what lies within an ulp of the middle between two
    levels would else go either way.
    """
    padded = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    greatest = padded.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    levels = (padded * torch.full_like(greatest, 127).div(greatest)).round()
    return (levels.double() * (greatest / 127).double()).flatten(-2)[..., : x.shape[-1]]


def tolerance(num_in):
    """Of a sum of num_in products of unit variance in float32."""
    return 1e-6 * (num_in + 16)


@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
def test_a_packed_weight_unpacks_to_what_its_kind_can_hold(native, kind, packed, num_in, num_out):
    weight = normal(num_out, num_in)
    held = packed(weight).unpack()
    if kind == native.F32:
        assert held.equal(weight)
    elif kind == native.BF16:
        assert held.equal(weight.bfloat16().float())
    elif kind == native.I4:
        assert held.equal(torch.from_numpy(dequantise_int4(quantise_int4(weight.numpy()))))
    else:
        step = F.pad(weight.abs(), (0, -num_in % 32)).unflatten(1, (-1, 32)).amax(2) / 127
        step = step.repeat_interleave(32, 1)[:, :num_in]
        assert ((held - weight).abs() <= step * 0.51).all()


def test_transposed_pieces_pack_to_the_same_bytes(packed):
    weight = normal(75, 50)
    whole, pieces = packed(weight), packed(torch.zeros(75, 50))
    pieces.memory.zero_()
    for first, last in ((40, 75), (0, 7), (7, 40)):
        pieces.pack(weight[first:last].t().contiguous().t(), first)
    assert pieces.memory.equal(whole.memory)


def test_what_is_quantised_already_packs_to_the_same_bytes(native, kind, packed):
    if kind != native.I8:
        pytest.skip("floats are not quantised")
    weight = normal(75, 130) * torch.logspace(-9, 3, 75).unsqueeze(1)
    weight[3] = 0
    weight[4] *= 1e-30
    values, scales = (torch.from_numpy(each) for each in quantise(weight.numpy()))
    whole, pieces = packed(weight), packed(weight)
    pieces.memory.zero_()
    for first, last in ((40, 75), (0, 7), (7, 40)):
        turned = values[first:last].t().contiguous().t()
        native.pack_int8(
            pieces.memory.data_ptr(), 130, 75, turned.data_ptr(), *turned.stride(),
            scales[first:].data_ptr(), scales.stride(0), first, last - first, 0, 130,
        )  # fmt: skip
    assert pieces.memory.equal(whole.memory)


def test_gathered_rows_are_those_of_the_weight(packed):
    weight = packed(normal(75, 50))
    ids = torch.tensor([74, 0, 31, 31, 16])
    assert weight.gather(ids).equal(weight.unpack()[ids])


def as_seen(native, kind, x):
    """What a kind's products make of rows before they multiply them."""
    if kind in {native.I8, native.I4}:
        return quantised(x)
    is_rounded = kind == native.BF16 and "bf16_dot" in native.features()
    return (x.bfloat16() if is_rounded else x).double()


@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_products_match_float64(native, kind, packed, num_in, num_out, rows):
    weight, x = packed(normal(num_out, num_in)), normal(rows, num_in, seed=1)
    seen = as_seen(native, kind, x)
    expected = seen @ weight.unpack().double().t()
    assert (weight.linear(x) - expected).abs().max() <= tolerance(num_in)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_bias_activation_and_residual_follow_the_product(native, packed, activation, rows):
    weight, x = packed(normal(37, 20)), normal(rows, 20, seed=1)
    bias, residual = normal(37, seed=2), normal(rows, 37, seed=3)
    plain = weight.linear(x).double()
    expected = ACTIVATIONS[activation](plain + bias) + residual
    assert (weight.linear(x, bias, activation, residual) - expected).abs().max() <= 4e-6
    in_place = residual.clone()
    assert weight.linear(x, bias, activation, in_place, in_place).sub(expected).abs().max() <= 4e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_over_all_magnitudes(native, activation):
    x = torch.cat([torch.linspace(-30, 30, 4001), normal(1000) * 1e-4, torch.tensor([1e4, -1e4])])
    one = torch.zeros(16, dtype=torch.float32).fill_(1)
    memory = torch.zeros(native.packed_bytes(native.F32, 1, 1) + 64, dtype=torch.uint8)
    address = memory.data_ptr() + -memory.data_ptr() % 64
    native.pack(native.F32, address, 1, 1, native.STORED_F32, one.data_ptr(), 1, 1, 0, 1, 0, 1)
    y = torch.empty_like(x)
    native.linear(native.F32, address, 0, x.data_ptr(), y.data_ptr(), len(x), 1, 1, activation, 0)
    expected = ACTIVATIONS[activation](x.double())
    assert ((y - expected).abs() <= 2e-6 * expected.abs() + 1e-7).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("num_in", "num_out"), [(33, 100), (768, 208), (1100, 130)])
def test_a_row_is_the_same_bits_alone_and_in_company(native, packed, num_in, num_out, threads):
    weight, x, bias = packed(normal(num_out, num_in)), normal(200, num_in), normal(num_out)
    native.set_num_threads(1)
    alone = torch.cat([weight.linear(x[i : i + 1], bias, 1) for i in range(200)])
    native.set_num_threads(threads)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 16, 97, 200):
        assert weight.linear(x[:rows], bias, 1).equal(alone[:rows]), rows
        assert weight.linear(x[200 - rows :], bias, 1).equal(alone[200 - rows :]), rows


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    num_in=st.integers(1, 300),
    num_out=st.integers(1, 150),
    rows=st.integers(1, 30),
    threads=st.integers(1, 4),
)
@example(num_in=188, num_out=1, rows=28, threads=1)  # a value in the middle of two levels
def test_any_shape_is_right_and_independent_of_rows_and_threads(
    native, kind, packed, num_in, num_out, rows, threads
):
    weight, x = packed(normal(num_out, num_in)), normal(rows, num_in, seed=rows)
    native.set_num_threads(threads)
    together = weight.linear(x)
    native.set_num_threads(1)
    assert torch.cat([weight.linear(row[None]) for row in x]).equal(together)
    seen = as_seen(native, kind, x)
    expected = seen @ weight.unpack().double().t()
    assert (together - expected).abs().max() <= tolerance(num_in)


def test_int8_is_as_near_as_eight_bits_with_shared_scales_get(native):
    if "int8" not in native.features():
        pytest.skip("int8 needs vnni")
    from_weight = normal(256, 768)
    x = normal(8, 768, seed=1)
    x[:, 5] *= 50  # the outlier channels that language models have
    exact = x.double() @ from_weight.double().t()
    rounded = quantised(x) @ quantised(from_weight).t()
    memory = torch.zeros(native.packed_bytes(native.I8, 768, 256) + 64, dtype=torch.uint8)
    address = memory.data_ptr() + -memory.data_ptr() % 64
    native.pack(
        native.I8,
        address,
        768,
        256,
        native.STORED_F32,
        from_weight.data_ptr(),
        768,
        1,
        0,
        256,
        0,
        768,
    )
    y = torch.empty(8, 256)
    native.linear(native.I8, address, 0, x.data_ptr(), y.data_ptr(), 8, 768, 256, 0, 0)
    assert (y - exact).square().mean() <= 1.05 * (rounded - exact).square().mean()


def test_rows_of_zeros_stay_zeros(packed):
    weight = packed(torch.zeros(20, 40))
    assert weight.linear(normal(3, 40)).equal(torch.zeros(3, 20))
    assert packed(normal(20, 40)).linear(torch.zeros(3, 40)).equal(torch.zeros(3, 20))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_visible_and_in_its_row(packed, activation):
    weight, x = packed(normal(20, 70)), normal(3, 70)
    clean = weight.linear(x, activation=activation)
    for column in (0, 20, 69):
        spoilt = x.clone()
        spoilt[1, column] = torch.nan
        found = weight.linear(spoilt, activation=activation)
        assert found[1].isnan().all()
        assert found[::2].equal(clean[::2])
        spoilt[1, column] = torch.inf
        assert not weight.linear(spoilt)[1].isfinite().any()


@pytest.mark.parametrize("magnitude", [1e-30, 3e-37, 1e-40])
def test_the_smallest_activations_do_not_grow_or_turn(packed, magnitude):
    weight, x = packed(torch.ones(20, 70)), torch.full((1, 70), magnitude)
    found = weight.linear(x)
    assert (found >= 0).all()
    assert (found <= 71 * x.max()).all()


def test_sizes_whose_bytes_overflow_are_refused(native):
    with pytest.raises(ValueError, match="num_in"):
        native.packed_bytes(native.F32, 2**40, 2**40)
    assert native.packed_bytes(native.F32, 2**28, 2**28) == 2**58


@pytest.mark.parametrize(
    "change", [{0: 4}, {0: -1}, {1: 8}, {5: -1}, {6: 0}, {7: 0}, {7: 2**50}, {8: 4}]
)
def test_impossible_arguments_are_refused(native, change):
    sizes = [native.F32, 0, 0, 0, 0, 0, 4, 4, 0, 0]
    native.linear(*sizes)  # no rows: nothing is touched
    for index, value in change.items():
        sizes[index] = value
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        native.linear(*sizes)
    with pytest.raises(TypeError, match="10 arguments"):
        native.linear(*sizes[1:])


def test_outputs_beyond_the_weight_and_unknown_ids_are_refused(native, packed):
    weight = packed(normal(10, 4))
    with pytest.raises(ValueError, match="outputs end"):
        weight.pack(normal(5, 4), 6)
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=f"no such row: {bad}"):
            weight.gather(torch.tensor([0, bad]))
