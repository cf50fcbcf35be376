"""Products are right in every precision, and kernels are used only where they prove themselves."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from pipeline.errors import InputError
from pipeline.kernels import kernel_selection, runtime, torch_kernels
from pipeline.kernels.base import HeadShape, LinearSpec
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.kernels.runtime import set_num_threads
from pipeline.kernels.torch_kernels import TorchKernels, blas_matvec, choose_matvec, torch_matvec
from pipeline.models.config import load_config
from pipeline.protocol.batch import Segment
from pipeline.weights.int4 import dequantise_int4, quantise_int4
from pipeline.weights.quantization import GROUP, dequantise, quantise


@pytest.fixture(scope="module")
def config(make_oracle):
    return make_oracle("gpt2").config


@pytest.fixture
def make_linear(kernels, config):
    """A layer with random weights, and those weights as the precision rounds them."""

    def make(num_in, num_out, precision, *, bias=False, activation="none"):
        generator = torch.Generator().manual_seed(0)
        chosen = choose_kernels(kernels, config.head_dim)
        layer = chosen.linear(LinearSpec(num_in, num_out, bias, precision, activation))
        weight = torch.randn(num_out, num_in, generator=generator) / num_in**0.5
        biases = torch.randn(num_out, generator=generator)
        sinks = layer.sinks("x")
        sinks["x.weight"].write(0, weight.numpy())
        if layer.bias is not None:
            sinks["x.bias"].write(0, biases.numpy())
        return chosen, layer, rounded(weight, precision), biases

    return make


def rounded(weight, precision):
    if precision == "int8":
        return torch.from_numpy(dequantise(*quantise(weight.numpy())))
    if precision == "int4":
        return torch.from_numpy(dequantise_int4(quantise_int4(weight.numpy())))
    return weight.bfloat16().float() if precision == "bfloat16" else weight


def on_host(kernels, array):
    return torch.from_numpy(kernels.to_host(array)[0])


TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-5, "int8": 5e-2, "int4": 5e-2}
ROUNDED = 2e-2  # native products may round their rows to bfloat16, too
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_layer_equals_torch_with_the_precisions_weights(
    make_linear, kernels, precision, activation, rows
):
    chosen, layer, weight, bias = make_linear(48, 80, precision, bias=True, activation=activation)
    x, y = torch.randn(rows, 48), torch.randn(rows, 80)
    expected = ACTIVATIONS[activation](F.linear(x, weight, bias)) + y
    x, residual = chosen.to_device(x.numpy()), chosen.to_device(y.numpy())
    found = layer(x, residual, residual=residual)  # in place
    assert found is residual
    is_rounded = kernels == "native" and precision == "bfloat16"
    tolerance = ROUNDED if is_rounded else TOLERANCES[precision]
    assert (on_host(chosen, found) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("stored", ["floats", "int8"])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_weights_stored_by_input_come_in_pieces_of_them(kernels, config, precision, stored):
    if stored == "int8" and precision != "int8":
        pytest.skip("only int8 layers take int8")
    chosen = choose_kernels(kernels, config.head_dim)
    values = np.random.default_rng(0).standard_normal((48, 200), np.float32)
    spec = LinearSpec(200, 48, False, precision)
    whole, pieces = chosen.linear(spec), chosen.linear(spec)
    by_output, by_input = whole.sinks("x"), pieces.sinks("x", is_in_out=True)
    if stored == "int8":
        values, scales = quantise(values)
        by_output["x.weight_scale"].write(0, scales)
        by_input["x.weight_scale"].write(0, scales)
    by_output["x.weight"].write(0, values)
    for first in range(0, 200, 64):
        by_input["x.weight"].write(first, np.ascontiguousarray(values.T)[first : first + 64])
    x = chosen.to_device(np.eye(200, dtype=np.float32))
    expected, found = (each(x, chosen.empty(200, 48)) for each in (whole, pieces))
    assert torch.equal(on_host(chosen, found), on_host(chosen, expected))
    assert on_host(chosen, found).any()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_head_gives_back_its_rows_as_an_embedding(make_linear, precision):
    chosen, layer, weight, _ = make_linear(48, 80, precision, bias=False)
    ids, out = np.array([3, 79, 3, 0]), chosen.empty(4, 48)
    layer.gather(chosen.to_device(ids), out)
    assert torch.equal(on_host(chosen, out), weight[ids])


def test_quantised_weights_are_within_half_a_step():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 100, generator=generator) * torch.logspace(-25, 3, 64).unsqueeze(1)
    weights[5] = 0
    exact = torch.from_numpy(dequantise(*quantise(weights.numpy())))
    step = F.pad(weights.abs(), (0, 28)).unflatten(1, (-1, GROUP)).amax(2) / 127
    step = step.repeat_interleave(GROUP, 1)[:, :100]
    assert ((exact - weights).abs() <= 0.51 * step).all()
    assert not exact[5].any()


def test_native_kernels_hold_int8_weights_as_they_were_quantised(native, config):
    """A prepared shard and a conversion at load mean the same weights."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(80, 130, generator=generator) * torch.logspace(-20, 2, 80).unsqueeze(1)
    layer = choose_kernels(native, config.head_dim).linear(LinearSpec(130, 80, False, "int8"))
    layer.sinks("x")["x.weight"].write(0, weights.numpy())
    found = np.empty((80, 130), np.float32)
    layer.gather(np.arange(80), found)
    np.testing.assert_array_equal(found, dequantise(*quantise(weights.numpy())))


def test_what_halves_cannot_hold_is_attended_to_as_their_greatest(kernels, config, make_cache):
    chosen, shape = choose_kernels(kernels, config.head_dim), HeadShape(1, 1, 16, 0)
    cache = make_cache(chosen, key_block=chosen.key_block)
    values = np.linspace(-1e6, 1e6, 16, dtype=np.float32)
    values[3:13] /= 50
    values[0], values[15] = -np.inf, np.inf
    qkv = np.concatenate((np.zeros(16, np.float32), values, values))[None]
    out = chosen.empty(1, 16)
    attention = chosen.attention([Segment(0, 0, 1)], shape, cache.capacity)
    attention(chosen.to_device(qkv), cache.keys[0], cache.values[0], out)
    expected = values.clip(-65504, 65504).astype(np.float16).astype(np.float32)
    assert on_host(chosen, out)[0].numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("matvec", [torch_matvec, blas_matvec])
def test_a_single_row_equals_torchs_product(matvec):
    row, weight, out = torch.randn(1, 48), torch.randn(48, 80), torch.empty(1, 80)
    matvec(row, weight, out)
    assert torch.allclose(out, row @ weight, atol=1e-5)


def test_a_blas_that_cannot_be_governed_is_not_used(monkeypatch):
    monkeypatch.setattr(torch_kernels, "pin_blas", lambda: False)
    assert choose_matvec() is torch_matvec


def test_a_blas_that_computes_wrongly_is_not_used(monkeypatch):
    def wrong(row, weight, out):
        out.copy_(row @ weight * 1.001)

    monkeypatch.setattr(torch_kernels, "pin_blas", lambda: True)
    monkeypatch.setattr(torch_kernels, "blas_matvec", wrong)
    assert choose_matvec() is torch_matvec


class WrongNorm(TorchKernels):
    def rms_norm(self, size, eps):
        return super().rms_norm(size, eps + 1e-2)


class WrongInt8(TorchKernels):
    def linear(self, spec):
        if spec.precision == "int8":
            spec = replace(spec, precision="float32", activation="none")
        return super().linear(spec)


@pytest.mark.parametrize(
    ("broken", "told"), [(WrongNorm, "RMSNorm is wrong"), (WrongInt8, "int8 products are wrong")]
)
def test_kernels_that_compute_wrongly_are_not_used(broken, told):
    assert told in kernel_selection.first_difference(broken())


def test_native_kernels_that_are_absent_are_refused_only_when_demanded(monkeypatch, config):
    monkeypatch.setattr(
        kernel_selection, "why_not_native", lambda level=None: "they were not built"
    )
    assert choose_kernels("auto", config.head_dim).name == "torch"
    with pytest.raises(InputError, match="--kernels native: they were not built; leave the flag"):
        choose_kernels("native", config.head_dim)


@pytest.mark.parametrize(
    ("choice", "device", "problem", "words"),
    [
        ("auto", "cpu", kernel_selection.NOT_BUILT, ["not built", "veilpipe[torch]", "C compiler"]),
        ("auto", "cpu", "this processor lacks them", ["processor", "veilpipe[torch]"]),
        ("torch", "cpu", None, ["--kernels torch", "veilpipe[torch]"]),
        ("auto", "cuda", None, ["--device cuda", "veilpipe[cuda]"]),
    ],
)
def test_without_torch_what_to_install_is_said(monkeypatch, config, choice, device, problem, words):
    monkeypatch.setattr(kernel_selection, "why_not_native", lambda level=None: problem)
    monkeypatch.setattr(kernel_selection, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        choose_kernels(choice, config.head_dim, device)
    assert all(word in str(caught.value) for word in words)
    kernel_selection.import_kernels()  # ahead of knowing what for: no fault of anybody's


def test_an_installation_without_the_module_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pipeline.kernels._native", None)
    monkeypatch.delattr("pipeline.kernels._native", raising=False)
    assert "not built" in kernel_selection.why_not_native.__wrapped__()


def test_a_processor_without_the_instructions_computes_with_torch(monkeypatch):
    """There the module says so, and offers or allows nothing else."""

    class Bare:
        features = staticmethod(tuple)

    monkeypatch.setattr("pipeline.kernels._native", Bare, raising=False)
    monkeypatch.setitem(sys.modules, "pipeline.kernels._native", Bare)
    set_num_threads(1)
    assert "this processor lacks" in kernel_selection.why_not_native.__wrapped__()


@pytest.mark.parametrize("change", [None, lambda: None])
def test_a_module_built_from_older_sources_is_not_used(native, monkeypatch, change):
    if change is None:
        monkeypatch.delattr("pipeline.kernels._native.attend")
    else:
        monkeypatch.setattr("pipeline.kernels._native.attend", change)
    level = sys.modules["pipeline.kernels._native"].levels()[0]
    assert "built from other sources" in kernel_selection.why_not_native.__wrapped__(level)


def test_a_model_whose_heads_do_not_fit_is_computed_with_torch(native, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 9, "n_layer": 1, "n_embd": 40, "n_head": 5, '
        '"n_positions": 8}'
    )
    config = load_config(tmp_path)
    assert choose_kernels("auto", config.head_dim).name == "torch"
    with pytest.raises(InputError, match="heads of 8 dimensions"):
        choose_kernels(native, config.head_dim)


def test_an_unknown_choice_is_refused(config):
    with pytest.raises(InputError, match="--kernels fast: use auto, native, torch"):
        choose_kernels("fast", config.head_dim)


def test_more_threads_than_compute_are_refused_where_kernels_have_a_limit(native, monkeypatch):
    module = sys.modules["pipeline.kernels._native"]
    most = module.MAX_THREADS
    with pytest.raises(InputError, match=f"{most + 1} threads are more than the {most}"):
        set_num_threads(most + 1)
    with pytest.raises(ValueError, match=f"num_threads: {most + 1}"):
        module.set_num_threads(most + 1)
    monkeypatch.setattr(runtime, "_native_threads", lambda: None)
    monkeypatch.setattr(runtime, "limit_torch", lambda: None)
    try:
        set_num_threads(most + 1)  # torch makes as many as it is told to
    finally:
        set_num_threads(1)


def test_a_cpu_that_no_thread_can_be_pinned_to_is_refused(native, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(2048)))
    with pytest.raises(InputError, match="CPU 1024 is beyond those"):
        set_num_threads(2, (3, 1024))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_one_of_several_threads_is_left_to_whoever_reads(native, monkeypatch, num_threads):
    cpus, told, allowed = tuple(range(4, 4 + num_threads)), [], []
    module = sys.modules["pipeline.kernels._native"]
    monkeypatch.setattr(module, "set_num_threads", lambda *given: told.append(given))
    monkeypatch.setattr("os.sched_setaffinity", lambda _, given: allowed.append(given))
    monkeypatch.setattr(runtime, "_asked", (num_threads, cpus))
    with runtime.beside_a_reader():
        during = list(told)
    if num_threads == 1:
        assert told == []
    else:
        assert during == [(num_threads - 1, *cpus[:-1])]
        assert told == [*during, (num_threads, *cpus)]
    assert allowed[0] == cpus


@pytest.mark.parametrize(
    ("asked", "during"), [((1, ()), [(3,), (1,)]), ((3, ()), []), ((4, ()), []), ((1, (2,)), [])]
)
def test_all_cpus_compute_meanwhile_unless_some_were_asked_for(native, monkeypatch, asked, during):
    told = []
    module = sys.modules["pipeline.kernels._native"]
    monkeypatch.setattr(module, "set_num_threads", lambda *given: told.append(given))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(runtime, "_asked", asked)
    with runtime.all_cpus():
        assert told == during[:1]
    assert told == during


@pytest.mark.parametrize(
    ("asked", "during"),
    [
        ((1, ()), [(2,), (1,)]),
        ((4, ()), [(3,), (4,)]),
        ((1, (2,)), []),
        ((2, (1, 2)), [(1, 1), (2, 1, 2)]),
    ],
)
def test_where_others_wait_for_what_is_read_all_cpus_pack_it(native, monkeypatch, asked, during):
    told = []
    module = sys.modules["pipeline.kernels._native"]
    monkeypatch.setattr(module, "set_num_threads", lambda *given: told.append(given))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(runtime, "_asked", asked)
    with runtime.beside_a_reader(others_wait=True):
        assert told == during[:1]
        assert runtime.reading_threads() == (asked[0] if asked[1] else max(asked[0], 3))
    assert told == during
    assert runtime.reading_threads() == asked[0]


def test_at_least_one_thread_computes():
    with pytest.raises(ValueError, match="num_threads=0"):
        set_num_threads(0)
