import pytest
import torch


# "avxvnni" is "avx2" with another instruction for int8: test_levels.py compares the two.
@pytest.fixture(scope="session", params=["widest", "avx2"])
def native(request):
    """The module at the best level of this processor, and at the one that most have."""
    module = pytest.importorskip("pipeline.kernels._native", reason="built without a C compiler")
    best = next(iter(module.levels()), None)
    level = best if request.param == "widest" else request.param
    if level not in module.levels() or (request.param != "widest" and level == best):
        pytest.skip(f"this processor lacks {level}, or anything better")
    module.use_level(level)
    yield module
    module.set_num_threads(1)
    module.use_level(best)


@pytest.fixture(params=["F32", "BF16", "I8", "I4"])
def kind(request, native):
    needs = {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "I4": "int4"}[request.param]
    if needs not in native.features():
        pytest.skip(f"this processor has no instructions for {request.param}")
    return getattr(native, request.param)


def aligned(num_bytes):
    """Zeroed bytes at an address that 64 divides."""
    memory = torch.zeros(num_bytes + 64, dtype=torch.uint8)
    offset = -memory.data_ptr() % 64
    return memory[offset : offset + num_bytes]


class Packed:
    """A weight [out, in] in a kind's layout, and what it is worth after rounding."""

    def __init__(self, native, kind, weight):
        self.native, self.kind = native, kind
        self.num_out, self.num_in = weight.shape
        self.memory = aligned(native.packed_bytes(kind, self.num_in, self.num_out))
        self.pack(weight, 0)

    @property
    def sizes(self):
        return self.num_in, self.num_out

    def pack(self, weight, first_out):
        is_bf16 = self.kind == self.native.BF16
        source = weight.bfloat16() if is_bf16 else weight.float()
        stored = self.native.STORED_BF16 if is_bf16 else self.native.STORED_F32
        self.native.pack(
            self.kind, self.memory.data_ptr(), *self.sizes, stored, source.data_ptr(),
            *source.stride(), first_out, weight.shape[0], 0, self.num_in,
        )  # fmt: skip

    def unpack(self):
        dst = torch.full((self.num_out, self.num_in), torch.nan)
        self.native.unpack(self.kind, self.memory.data_ptr(), *self.sizes, dst.data_ptr())
        return dst

    def gather(self, ids):
        dst = torch.full((len(ids), self.num_in), torch.nan)
        self.native.gather(
            self.kind, self.memory.data_ptr(), *self.sizes, ids.data_ptr(), len(ids), dst.data_ptr()
        )
        return dst

    def linear(self, x, bias=None, activation=0, residual=None, y=None):
        if y is None:
            y = torch.full((x.shape[0], self.num_out), torch.nan)
        self.native.linear(
            self.kind, self.memory.data_ptr(), 0 if bias is None else bias.data_ptr(),
            x.data_ptr(), y.data_ptr(), x.shape[0], *self.sizes, activation,
            0 if residual is None else residual.data_ptr(),
        )  # fmt: skip
        return y


@pytest.fixture
def packed(native, kind):
    return lambda weight: Packed(native, kind, weight)
