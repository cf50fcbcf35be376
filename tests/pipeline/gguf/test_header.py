"""A head that nobody vouched for is read as it is written, or refused in one line."""

import struct

import gguf
import pytest

from pipeline.gguf.header import CorruptGguf, MoreNeeded, parse_head_untrusted

F32, Q8_0, IQ4_XS = 0, 8, 23


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def text_value(key: str, value: str) -> bytes:
    return string(key) + struct.pack("<I", 8) + string(value)


def size_value(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


def float_value(key: str, value: float) -> bytes:
    return string(key) + struct.pack("<If", 6, value)


def texts_value(key: str, values: list[str]) -> bytes:
    head = string(key) + struct.pack("<IIQ", 9, 8, len(values))
    return head + b"".join(string(value) for value in values)


def floats_value(key: str, values: list[float]) -> bytes:
    return string(key) + struct.pack(f"<IIQ{len(values)}f", 9, 6, len(values), *values)


def gguf_file(
    entries: list[bytes], values: list[bytes], data: bytes, *, magic=b"GGUF", version=3
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(entries), len(values))
    head += b"".join(values) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


def whole_values() -> list[bytes]:
    """Of a small Llama with a SentencePiece tokenizer."""
    sizes = {
        "embedding_length": 32, "feed_forward_length": 64, "block_count": 1, "context_length": 16,
        "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16,
    }  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "\u2581"]
    return [
        text_value("general.architecture", "llama"),
        *(size_value(f"llama.{key}", value) for key, value in sizes.items()),
        string("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5),
        text_value("tokenizer.ggml.model", "llama"),
        texts_value("tokenizer.ggml.tokens", tokens),
        floats_value("tokenizer.ggml.scores", [0.0] * 4 + [-1.0, -2.0, -3.0, -4.0]),
        string("tokenizer.ggml.token_type")
        + struct.pack("<IIQ8i", 9, 5, 8, 2, 3, 3, 6, 1, 1, 1, 1),
        size_value("tokenizer.ggml.bos_token_id", 1),
        size_value("tokenizer.ggml.eos_token_id", 2),
    ]


def whole_file() -> bytes:
    entries = [
        entry("token_embd.weight", (8, 32), Q8_0, 0),
        entry("output_norm.weight", (32,), F32, 288),
        entry("blk.0.attn_q.weight", (32, 32), Q8_0, 416),
    ]
    return gguf_file(entries, whole_values(), bytes(416 + 32 * 34))


def test_a_head_reads_as_the_package_reads_it(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(whole_file())
    theirs = gguf.GGUFReader(path)
    head = parse_head_untrusted(whole_file(), path.stat().st_size)
    found = {tensor.name: tensor for tensor in head.tensors}
    for tensor in theirs.tensors:
        own = found.pop(tensor.name)
        assert (own.dtype, own.shape[::-1]) == (tensor.tensor_type.name, tuple(tensor.shape))
        assert (own.start, own.end - own.start) == (tensor.data_offset, tensor.n_bytes)
    assert not found
    assert head.metadata.size("llama.embedding_length") == 32
    assert head.metadata.texts("tokenizer.ggml.tokens")[-1] == "\u2581"
    assert head.metadata.numbers("tokenizer.ggml.scores")[4:] == [-1.0, -2.0, -3.0, -4.0]


BAD = {
    "wrong magic": (gguf_file([], [], b"", magic=b"GGML"), "no GGUF file"),
    "nothing": (b"", "no GGUF file"),
    "first version": (gguf_file([], [], b"", version=1), "version 1"),
    "big-endian": (gguf_file([], [], b"", version=3 << 24), "little-endian"),
    "unknown tensor type": (
        gguf_file([entry("a", (4,), 77, 0)], [], bytes(32)),
        "tensor a is of type number 77: F32, F16, BF16, Q4_0",
    ),
    "a type that is not read": (
        gguf_file([entry("a", (1, 256), IQ4_XS, 0)], [], bytes(256)),
        "tensor a is of type IQ4_XS",
    ),
    "a value of an unknown type": (
        gguf_file([], [string("a") + struct.pack("<I", 13)], b""),
        "unknown type 13",
    ),
    "an array in an array": (
        gguf_file([], [string("a") + struct.pack("<IIQ", 9, 9, 1)], bytes(99)),
        "unknown type 9",
    ),
    "the same key twice": (gguf_file([], [size_value("a", 1)] * 2, b""), "key 'a' appears twice"),
    "the same tensor twice": (
        gguf_file([entry("a", (8,), F32, 0), entry("a", (8,), F32, 32)], [], bytes(64)),
        "tensor a appears twice",
    ),
    "overlapping tensors": (
        gguf_file([entry("a", (9,), F32, 0), entry("b", (8,), F32, 32)], [], bytes(64)),
        "tensor b starts at 128, and the one before ends at 132: they overlap",
    ),
    "a gap": (
        gguf_file([entry("a", (8,), F32, 0), entry("b", (8,), F32, 64)], [], bytes(96)),
        "there is a gap",
    ),
    "a tensor outside of the file": (
        gguf_file([entry("a", (8,), F32, 1 << 40)], [], bytes(32)),
        "tensor a starts at",
    ),
    "a tensor that is cut off": (
        gguf_file([entry("a", (9,), F32, 0)], [], bytes(32)),
        "truncated: tensor a ends at 100, the file at 96",
    ),
    "a file that goes on": (gguf_file([entry("a", (8,), F32, 0)], [], bytes(65)), "too long"),
    "rows that are no whole blocks": (
        gguf_file([entry("a", (2, 33), Q8_0, 0)], [], bytes(96)),
        "no multiple of 32",
    ),
    "dimensions beyond any file": (
        gguf_file([entry("a", (1 << 63, 1 << 63), F32, 0)], [], b""),
        "has the shape",
    ),
    "too many dimensions": (gguf_file([entry("a", (1,) * 5, F32, 0)], [], b""), "5 dimensions"),
    "an alignment beyond any": (
        gguf_file([], [size_value("general.alignment", 1 << 30)], b""),
        "general.alignment is 1073741824",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_head_that_cannot_be_is_refused(name):
    data, message = BAD[name]
    with pytest.raises(CorruptGguf, match=message) as caught:
        parse_head_untrusted(data, len(data))
    assert "\n" not in str(caught.value)


def test_a_head_cut_off_anywhere_is_refused_and_a_longer_file_is_asked_for_more():
    data = whole_file()
    head_bytes = parse_head_untrusted(data, len(data)).num_bytes
    for end in range(4, head_bytes, 7):
        with pytest.raises(CorruptGguf, match="truncated"):
            parse_head_untrusted(data[:end], end)
        with pytest.raises(MoreNeeded):
            parse_head_untrusted(data[:end], len(data))


@pytest.mark.parametrize("count", [1 << 20, 1 << 61, (1 << 64) - 1])
def test_counts_and_lengths_beyond_the_file_take_no_memory(count):
    for head in (
        struct.pack("<IQQ", 3, count, 0),
        struct.pack("<IQQ", 3, 0, count),
        struct.pack("<IQQQ", 3, 0, 1, count),
        struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IIQ", 9, 0, count),
        struct.pack("<IQQ", 3, 0, 1) + string("a") + struct.pack("<IIQ", 9, 8, count),
    ):
        with pytest.raises(CorruptGguf):
            parse_head_untrusted(b"GGUF" + head, 4 + len(head))
