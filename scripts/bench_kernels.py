"""The native kernels beside torch, interleaved: GB/s of weights for few rows, GFLOP/s for many.

Usage: bench_kernels.py [--rounds N] [--model gpt2|smollm2] [--threads 1,2] [--rows 1,4,16,512]

A line is all of a token's products through the layers of that model's shape, each with memory of
its own, so that nothing stays in a cache that would not in use. Medians of rounds.
"""

import statistics
import time

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from command_line import Parser, run_main, whole, wholes

from pipeline.kernels import _native
from pipeline.kernels.huge_pages import Arena

SHAPES = {  # layers, [in, out] of a layer's products
    "gpt2": (12, [(768, 2304), (768, 768), (768, 3072), (3072, 768)]),
    "smollm2": (30, [(576, 960), (576, 576), (576, 3072), (1536, 576)]),
}
KINDS = {"f32": _native.F32, "bf16": _native.BF16, "i8": _native.I8, "i4": _native.I4}


def native_products(kind, layers, shapes, rows):
    """A function that computes every product once, and the bytes of weights it reads."""
    sizes = [_native.packed_bytes(kind, *shape) for shape in shapes]
    arena, keep, calls = Arena(), [], []
    for _ in range(layers):
        for (num_in, num_out), size in zip(shapes, sizes, strict=True):
            source = torch.randn(num_out, num_in)
            if kind == _native.BF16:
                source = source.bfloat16()
            memory, x, y = arena.take(size), torch.randn(rows, num_in), torch.empty(rows, num_out)
            packed = memory.ctypes.data
            stored = _native.STORED_BF16 if kind == _native.BF16 else _native.STORED_F32
            weights = stored, source.data_ptr(), num_in, 1
            _native.pack(kind, packed, num_in, num_out, *weights, 0, num_out, 0, num_in)
            keep.append((memory, x, y))
            calls.append((kind, packed, 0, x.data_ptr(), y.data_ptr(), rows, num_in, num_out, 0, 0))

    def run(keep=keep):
        for call in calls:
            _native.linear(*call)

    return run, layers * sum(sizes)


def torch_products(layers, shapes, rows):
    pairs = [
        (torch.randn(rows, num_in), torch.randn(num_out, num_in))
        for _ in range(layers)
        for num_in, num_out in shapes
    ]

    def run():
        for x, weight in pairs:
            F.linear(x, weight)

    return run, sum(weight.nbytes for _, weight in pairs)


def read_bandwidth():
    """Reads 512 MiB; the sum is torch's fastest plain read."""
    memory = torch.ones(128 * 2**20)

    def run():
        memory.sum()

    return run, memory.nbytes


def attention(layers, heads, head_dim, rows, start, dtype):
    """All layers' attention of one span of `rows` rows behind `start` positions."""
    max_seq = (start + rows + 15) // 16 * 16
    caches = [torch.zeros(2, heads, max_seq, head_dim, dtype=dtype) for _ in range(layers)]
    qkv, out = torch.randn(rows, 3 * heads * head_dim), torch.empty(rows, heads * head_dim)
    spans = torch.tensor([[0, 0, rows, start]])

    def run():
        for cache in caches:
            _native.attend(
                qkv.data_ptr(), qkv.shape[1], out.data_ptr(), cache[0].data_ptr(), cache[1].data_ptr(),
                spans.data_ptr(), 1, heads, heads, head_dim, max_seq, 0, dtype.itemsize, 0,
            )  # fmt: skip

    return run, sum(cache.nbytes for cache in caches)


def measure(contenders, rounds):
    """Median seconds of each, interleaved."""
    times = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, (run, _) in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main():
    parser = Parser(prog="bench_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole(1), default=7)
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--threads", type=wholes(1), default="1,2")
    parser.add_argument("--rows", type=wholes(1), default="1,4,16,512")
    args = parser.parse_args()
    layers, shapes = SHAPES[args.model]
    num_weights = layers * sum(num_in * num_out for num_in, num_out in shapes)
    print(f"{args.model}: {num_weights / 1e6:.0f} M weights; CPU: {_native.features()}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        _native.set_num_threads(threads)
        for rows in args.rows:
            contenders = {
                name: native_products(kind, layers, shapes, rows) for name, kind in KINDS.items()
            }
            contenders["torch f32"] = torch_products(layers, shapes, rows)
            contenders["read"] = read_bandwidth()
            for name, dtype in (("attend@512", torch.float32), ("in halves", torch.float16)):
                contenders[name] = attention(12, 12, 64, rows, 512 - rows, dtype)
            for name, seconds in measure(contenders, args.rounds).items():
                line = f"{threads} thread(s) {rows:4} rows  {name:10} {seconds * 1e3:8.2f} ms"
                line += f" {contenders[name][1] / seconds / 1e9:6.1f} GB/s"
                if name in (*KINDS, "torch f32"):
                    line += f" {2 * num_weights * rows / seconds / 1e9:7.1f} GFLOP/s"
                print(line, flush=True)


if __name__ == "__main__":
    run_main("bench_kernels", main)
