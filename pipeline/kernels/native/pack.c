/* Packed weights: 16 outputs side by side, so that a product needs no horizontal sums.
 *
 * F32   [out/16][in][16]
 * BF16  [out/16][in/2][16][2]
 * I8    [out/16][in/64] of { bf16 scale[2][16]; uint8 weight + 128 [16][16][4] }: a scale for each
 *       32 inputs of an output, and weights unsigned as vpdpbusd wants one of its operands.
 * Ends are padded with zeros, which products either ignore (outputs) or multiply by zero (inputs).
 */
#include "kernels.h"

#include <math.h>
#include <string.h>

typedef struct {
    int kind;
    char *dst;
    const void *src;
    size_t num_in, first_out, end_out;
    ptrdiff_t stride_out, stride_in;
} pack_job_t;

size_t block_bytes(int kind, size_t num_in) {
    switch (kind) {
    case KIND_F32: return num_in * BLOCK * sizeof(float);
    case KIND_BF16: return (num_in + 1) / 2 * BLOCK * 2 * sizeof(uint16_t);
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

/* The least bf16 that is not below a finite x >= 0. */
static uint16_t bf16_at_least(float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    return (uint16_t)((wide + 0xffff) >> 16);
}

static void quantise(super_t *super, size_t group, size_t lane, const float *w, size_t count) {
    float greatest = 0;
    for (size_t i = 0; i < count; i++) greatest = fmaxf(greatest, fabsf(w[i]));
    uint16_t bits = bf16_at_least(greatest / 127);
    if (float_of_bf16(bits) < SMALLEST_SCALE) bits = 0;
    float scale = float_of_bf16(bits), inverse = scale > 0 ? 1 / scale : 0;
    super->scales[group][lane] = bits;
    for (size_t i = 0; i < GROUP; i++) {
        float level = i < count ? w[i] * inverse : 0;
        level = fminf(fmaxf(level, -127), 127); /* of infinite weights it is not a number */
        size_t k = group * GROUP + i;
        super->weights[k / 4][lane][k % 4] = (uint8_t)(lrintf(level) + 128);
    }
}

static void pack_i8(const pack_job_t *job, size_t out, const float *src) {
    super_t *block = (super_t *)(job->dst + out / BLOCK * block_bytes(KIND_I8, job->num_in));
    for (size_t k = 0; k < job->num_in; k += GROUP) {
        float w[GROUP];
        size_t count = job->num_in - k < GROUP ? job->num_in - k : GROUP;
        for (size_t i = 0; i < count; i++) w[i] = src[(ptrdiff_t)(k + i) * job->stride_in];
        quantise(&block[k / SUPER], k % SUPER / GROUP, out % BLOCK, w, count);
    }
}

/* Outputs first..end of one block, copied input by input: sequential whichever stride is 1. */
static void pack_floats(const pack_job_t *job, size_t first, size_t end) {
    size_t block = first / BLOCK * BLOCK;
    char *dst = job->dst + first / BLOCK * block_bytes(job->kind, job->num_in);
    for (size_t k = 0; k < job->num_in; k++) {
        for (size_t out = first; out < end; out++) {
            ptrdiff_t from = (ptrdiff_t)(out - job->first_out) * job->stride_out +
                             (ptrdiff_t)k * job->stride_in;
            size_t lane = out - block;
            if (job->kind == KIND_F32) {
                ((float *)dst)[k * BLOCK + lane] = ((const float *)job->src)[from];
            } else {
                ((uint16_t *)dst)[(k / 2 * BLOCK + lane) * 2 + k % 2] =
                    ((const uint16_t *)job->src)[from];
            }
        }
    }
}

static void pack_chunk(void *opaque, size_t chunk) {
    const pack_job_t *job = opaque;
    size_t block = job->first_out / BLOCK + chunk;
    size_t first = block * BLOCK, end = first + BLOCK;
    first = first > job->first_out ? first : job->first_out;
    end = end < job->end_out ? end : job->end_out;
    if (job->kind != KIND_I8) {
        pack_floats(job, first, end);
        return;
    }
    for (size_t out = first; out < end; out++) {
        pack_i8(job, out,
                (const float *)job->src + (ptrdiff_t)(out - job->first_out) * job->stride_out);
    }
}

void pack(int kind, void *dst, size_t num_in, const void *src, ptrdiff_t stride_out,
          ptrdiff_t stride_in, size_t first_out, size_t count) {
    if (count == 0) return;
    pack_job_t job = {kind, dst, src, num_in, first_out, first_out + count, stride_out, stride_in};
    pool_run(pack_chunk, &job, (job.end_out - 1) / BLOCK - first_out / BLOCK + 1);
}

typedef struct {
    char *dst;
    const int8_t *values;
    const uint16_t *scales;
    size_t num_in, first_out, end_out;
    ptrdiff_t stride_out, stride_in, scale_stride;
} pack_int8_job_t;

static void pack_int8_chunk(void *opaque, size_t chunk) {
    const pack_int8_job_t *job = opaque;
    size_t block = job->first_out / BLOCK + chunk;
    size_t first = block * BLOCK, end = first + BLOCK;
    super_t *supers = (super_t *)(job->dst + block * block_bytes(KIND_I8, job->num_in));
    first = first > job->first_out ? first : job->first_out;
    end = end < job->end_out ? end : job->end_out;
    for (size_t out = first; out < end; out++) {
        ptrdiff_t from = (ptrdiff_t)(out - job->first_out);
        const int8_t *values = job->values + from * job->stride_out;
        const uint16_t *scales = job->scales + from * job->scale_stride;
        for (size_t k = 0; k < (job->num_in + GROUP - 1) / GROUP * GROUP; k++) {
            super_t *super = supers + k / SUPER;
            int level = k < job->num_in ? values[(ptrdiff_t)k * job->stride_in] : 0;
            super->weights[k % SUPER / 4][out % BLOCK][k % 4] = (uint8_t)(level + 128);
            if (k % GROUP == 0) super->scales[k % SUPER / GROUP][out % BLOCK] = scales[k / GROUP];
        }
    }
}

void pack_int8(void *dst, size_t num_in, const int8_t *values, ptrdiff_t stride_out,
               ptrdiff_t stride_in, const uint16_t *scales, ptrdiff_t scale_stride,
               size_t first_out, size_t count) {
    if (count == 0) return;
    pack_int8_job_t job = {dst,        values,    scales,      num_in, first_out, first_out + count,
                           stride_out, stride_in, scale_stride};
    pool_run(pack_int8_chunk, &job, (job.end_out - 1) / BLOCK - first_out / BLOCK + 1);
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
