/* Packed weights: 16 outputs side by side, so that a product needs no horizontal sums.
 *
 * F32   [out/16][in][16]
 * BF16  [out/16][in/2][16][2]
 * I8    [out/16][in/64] of { bf16 scale[2][16]; uint8 weight + 128 [16][16][4] }: a scale for each
 *       32 inputs of an output, and weights unsigned as vpdpbusd wants one of its operands.
 * I4    [out/16][in/64] of { half scale[2][16], zero[2][16]; uint8 weights[2][4][16][4] }: the same
 *       with two weights in a byte, which mean (weight - zero) * scale.
 * Ends are padded with zeros, which products either ignore (outputs) or multiply by zero (inputs).
 */
#include "kernels.h"

#include <string.h>

size_t block_bytes(int kind, size_t num_in) {
    switch (kind) {
    case KIND_F32: return num_in * BLOCK * sizeof(float);
    case KIND_BF16: return (num_in + 1) / 2 * BLOCK * 2 * sizeof(uint16_t);
    case KIND_I4: return (num_in + SUPER - 1) / SUPER * sizeof(super4_t);
    default: return (num_in + SUPER - 1) / SUPER * sizeof(super_t);
    }
}

size_t packed_bytes(int kind, size_t num_in, size_t num_out) {
    return (num_out + BLOCK - 1) / BLOCK * block_bytes(kind, num_in);
}

static float float_of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static float float_of_half(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x7fff) << 13; /* but for 112 of its exponent */
    if ((bits & 0x7c00) == 0x7c00) wide |= 0x7f800000;
    float value;
    memcpy(&value, &wide, sizeof value);
    return (bits & 0x8000 ? -0x1p112f : 0x1p112f) * value;
}

static float weight_of_int4(const super4_t *super, size_t k, size_t lane) {
    size_t group = k / GROUP, quad = k % GROUP / 4;
    uint8_t both = super->weights[group][quad % (GROUP / 8)][lane][k % 4];
    int level = quad < GROUP / 8 ? both & 15 : both >> 4;
    return ((float)level - float_of_half(super->zeros[group][lane])) *
           float_of_half(super->scales[group][lane]);
}

/* W[out, 0..num_in] as float. */
static void unpack_row(const weight_t *weight, size_t out, float *dst) {
    const char *block =
        (const char *)weight->packed + out / BLOCK * block_bytes(weight->kind, weight->num_in);
    size_t lane = out % BLOCK;
    for (size_t k = 0; k < weight->num_in; k++) {
        if (weight->kind == KIND_F32) {
            dst[k] = ((const float *)block)[k * BLOCK + lane];
        } else if (weight->kind == KIND_BF16) {
            dst[k] = float_of_bf16(((const uint16_t *)block)[(k / 2 * BLOCK + lane) * 2 + k % 2]);
        } else if (weight->kind == KIND_I4) {
            dst[k] = weight_of_int4((const super4_t *)block + k / SUPER, k % SUPER, lane);
        } else {
            const super_t *super = (const super_t *)block + k / SUPER;
            int level = super->weights[k % SUPER / 4][lane][k % 4] - 128;
            dst[k] = (float)level * float_of_bf16(super->scales[k % SUPER / GROUP][lane]);
        }
    }
}

void unpack(const weight_t *weight, float *dst) {
    for (size_t out = 0; out < weight->num_out; out++) {
        unpack_row(weight, out, dst + out * weight->num_in);
    }
}

void gather(const weight_t *weight, const int64_t *ids, size_t count, float *dst) {
    for (size_t row = 0; row < count; row++) {
        unpack_row(weight, (size_t)ids[row], dst + row * weight->num_in);
    }
}
