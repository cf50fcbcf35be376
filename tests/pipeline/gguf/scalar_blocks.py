"""Blocks of weights unpacked one weight at a time, as the format's description has it."""

import struct


def half(block: bytes, start: int) -> float:
    return struct.unpack_from("<e", block, start)[0]


def nibble(data: bytes, index: int, width: int) -> int:
    """Of weight `index`: `width` bytes hold as many weights in their low halves, then high ones."""
    group, at = divmod(index, 2 * width)
    byte = data[group * width + at % width]
    return byte >> 4 if at >= width else byte & 15


def q4_0(block: bytes) -> list[float]:
    return [half(block, 0) * (nibble(block[2:], i, 16) - 8) for i in range(32)]


def q4_1(block: bytes) -> list[float]:
    return [half(block, 0) * nibble(block[4:], i, 16) + half(block, 2) for i in range(32)]


def fives(block: bytes, start: int) -> list[int]:
    word = int.from_bytes(block[start : start + 4], "little")
    return [nibble(block[start + 4 :], i, 16) + 16 * (word >> i & 1) for i in range(32)]


def q5_0(block: bytes) -> list[float]:
    return [half(block, 0) * (value - 16) for value in fives(block, 2)]


def q5_1(block: bytes) -> list[float]:
    return [half(block, 0) * value + half(block, 2) for value in fives(block, 4)]


def q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * value for value in struct.unpack_from("<32b", block, 2)]


def six_bits(packed: bytes, group: int) -> tuple[int, int]:
    """Scale and minimum of a group of 32."""
    if group < 4:
        return packed[group] % 64, packed[group + 4] % 64
    last = packed[group + 4]
    return (
        last % 16 + 16 * (packed[group - 4] // 64),
        last // 16 + 16 * (packed[group] // 64),
    )


def k_block(block: bytes, values: list[int]) -> list[float]:
    found = []
    for index, value in enumerate(values):
        scale, minimum = six_bits(block[4:16], index // 32)
        found.append(half(block, 0) * scale * value - half(block, 2) * minimum)
    return found


def q4_k(block: bytes) -> list[float]:
    return k_block(block, [nibble(block[16:], i, 32) for i in range(256)])


def q5_k(block: bytes) -> list[float]:
    high = block[16:48]
    return k_block(
        block,
        [nibble(block[48:], i, 32) + 16 * (high[i % 32] >> i // 32 & 1) for i in range(256)],
    )


def q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    found = []
    for i in range(256):
        part, at = divmod(i, 128)
        value = nibble(low[64 * part : 64 * part + 64], at, 64)
        value += 16 * (high[32 * part + at % 32] >> 2 * (at // 32) & 3)
        found.append(half(block, 208) * scales[i // 16] * (value - 32))
    return found


def mxfp4(block: bytes) -> list[float]:
    """A sign, two bits of an exponent above -1, one of a fraction: the lowest is half of one."""
    found = []
    for i in range(32):
        bits = nibble(block[1:], i, 16)
        exponent, fraction = bits >> 1 & 3, bits & 1
        size = 2.0 ** (exponent - 1) * (1 + fraction / 2) if exponent else fraction / 2
        found.append((-size if bits & 8 else size) * 2.0 ** (block[0] - 127))
    return found


SCALAR = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k,
    "Q5_K": q5_k, "Q6_K": q6_k, "MXFP4": mxfp4,
}  # fmt: skip
