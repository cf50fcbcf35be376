"""The kernels for NVIDIA GPUs: torch's operations there, decode steps recorded as CUDA graphs.

A token's step is hundreds of operations too small to hide what it costs to launch each, so one in
which every request takes one token is a graph (`cuda_graphs`), padded to the next larger number of
requests and to the next larger context. All other steps launch their operations one by one.

Everything runs in the order of one stream, except copies of inputs of such other steps: those
overlap what is still being computed. The host waits once a step, for results that it reads.

A row's result is independent of its batch-mates except in rounding. float32 is never shortened to
TF32. bfloat16 weights multiply rows rounded to bfloat16. int8 has no kernel here.

With the device `cpu` the same steps are computed without graphs, streams and pinned memory: what
remains is what can be tested without a GPU.

Source: "CUDA semantics" in torch's documentation.
"""

from functools import partial

import torch

from pipeline.dtypes import PRECISIONS, Array, HostArray
from pipeline.errors import InputError
from pipeline.kernels.base import (
    Attention,
    HeadShape,
    KernelLinear,
    Linear,
    LinearSpec,
    StepWork,
)
from pipeline.kernels.cuda_graphs import Recorder, StaticStep
from pipeline.kernels.torch_attention import TorchAttention
from pipeline.kernels.torch_kernels import (
    ACTIVATIONS,
    TORCH_DTYPES,
    TorchKernels,
    to_tensor,
    torch_matvec,
)
from pipeline.protocol.batch import Batch
from pipeline.weights.tensor_sinks import in_precision

# Shorter contexts share one graph: reading them costs less than recording more.
MIN_CONTEXT = 128
GRAPHS = "graphs"  # what a cache keeps its recorder under


def find_gpu(name: str) -> torch.device:
    """The GPU that `cuda` or `cuda:N` names, made the current one.

    Raises InputError for another name, and where torch or the machine has no such GPU.
    """
    kind, _, index = name.partition(":")
    if kind != "cuda" or (":" in name and not (index.isascii() and index.isdigit())):
        raise InputError(f"--device {name}: use cpu, cuda or cuda:N")
    if torch.version.cuda is None:
        raise InputError(f"--device {name}: this torch was built without CUDA; install one with it")
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch finds no GPU; is there one, and its driver?")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


class CudaLinear(KernelLinear):
    """Weights as float32 or bfloat16 [in, out]; everything but the product is in float32."""

    def __init__(self, kernels: "CudaKernels", spec: LinearSpec) -> None:
        """Raises InputError for int8 and int4."""
        if spec.precision in {"int8", "int4"}:
            raise InputError(
                f"{spec.precision} weights have no kernel on a GPU: use bfloat16 or float32 there"
            )
        super().__init__(kernels, spec)
        dtype = PRECISIONS[spec.precision]
        self._weight = kernels.empty(spec.num_in, spec.num_out, dtype=dtype)
        self._dtype = TORCH_DTYPES[dtype]
        self._activate = ACTIVATIONS[spec.activation]

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, in] -> out [rows, out]."""
        y = torch.mm(x.to(self._dtype), self._weight).float()
        if self.bias is not None:
            y.add_(self.bias)
        y = self._activate(y)
        return out.copy_(y) if residual is None else torch.add(y, residual, out=out)

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Weights of the outputs `ids`, [n, in]."""
        out.copy_(self._weight.index_select(1, ids).t())

    def put(
        self, first: int, outputs: HostArray, scales: HostArray | None, *, first_in: int = 0
    ) -> None:
        """Store outputs first.., [n, in], in this layer's precision."""
        held = self._weight[first_in : first_in + outputs.shape[1]]
        for at, piece, own in in_precision(self.precision, first, outputs, scales):
            assert own is None, "int8 has been refused"
            held[:, at : at + len(piece)] = to_tensor(piece).t()

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class CudaKernels(TorchKernels):
    """Everything through torch, on one GPU."""

    name = "cuda"
    scratch_slots = 1

    def __init__(self, device: torch.device) -> None:
        """Compute on `device`: a GPU, or in tests the CPU."""
        super().__init__(torch_matvec, device)
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            torch.set_float32_matmul_precision("highest")  # no TF32
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def linear(self, spec: LinearSpec) -> Linear:
        """An empty linear layer. Raises InputError for int8."""
        return CudaLinear(self, spec)

    def attention(self, batch: Batch, shape: HeadShape, max_seq_len: int) -> Attention:
        """A step's attention."""
        del max_seq_len
        with self.device:  # where masks are made
            return TorchAttention(batch, shape)

    def run(self, work: StepWork, inputs: HostArray, batch: Batch) -> Array:
        """A step from the host's inputs to rows on the device; recorded if all are decoding."""
        if not work.is_recordable or any(segment.num_tokens != 1 for segment in batch):
            return super().run(work, inputs, batch)
        cache, rows = work.cache, _bucket(len(batch))
        longest = max(segment.position for segment in batch) + 1
        context = min(max(_bucket(longest), MIN_CONTEXT), cache.capacity)
        recorder = cache.recordings.get(GRAPHS, partial(Recorder, self.device))
        step = recorder.steps.get((rows, context))
        if step is None:
            step = recorder.steps[rows, context] = StaticStep(
                work.compute,
                inputs,
                rows=rows,
                context=context,
                scratch=cache.num_slots,
                recorder=recorder,
            )
        return step(inputs, batch)

    def to_device(self, array: HostArray) -> torch.Tensor:
        """A host's array on the device, copied beside what is being computed."""
        if not self._is_gpu:
            return super().to_device(array)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = to_tensor(array).pin_memory().to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        moved.record_stream(current)  # made on one stream, used and freed on the other
        return moved

    def to_host(self, *arrays: torch.Tensor) -> tuple[HostArray, ...]:
        """Results in pinned memory; waits once for all that has been launched."""
        if not self._is_gpu:
            return super().to_host(*arrays)
        found = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in arrays)
        for host, tensor in zip(found, arrays, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return super().to_host(*found)

    def free_bytes(self) -> int:
        """What weights leave free of the GPU, less a tenth to compute in."""
        return (
            torch.cuda.mem_get_info(self.device)[0] * 9 // 10
            if self._is_gpu
            else super().free_bytes()
        )


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
