/* Weights as files hold them, a tile at a time: loaded, converted, quantised. */
#ifndef VEILPIPE_STORED_TILES_H
#define VEILPIPE_STORED_TILES_H

#include "simd.h"

#include <string.h>

#if defined(VEILPIPE_X86)

/* [inputs, or words of them][outputs] */
typedef struct {
    _Alignas(VECTOR) float values[SUPER][BLOCK];
} tile_t;

typedef struct {
    _Alignas(VECTOR) uint32_t words[SUPER / 4][BLOCK];
} quads_t;

INLINE void transpose_16(__m512i rows[16]) {
    __m512i a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 128 bits of rows i, i + 4, i + 8 and i + 12 */
        a[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}

/* Of 16 numbers in a row those that `mask` has, as floats. */
INLINE __m512 floats_at(const int STORED, const char *from, __mmask16 mask) {
    if (STORED == STORED_F32) return _mm512_maskz_loadu_ps(mask, from);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    if (STORED == STORED_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* bf16 in the lower halves, nearest with ties to even; of what is not a number a quiet one, but
 * what was bf16 stays what it was. */
INLINE __m512i rounded(const int STORED, __m512 values) {
    __m512i bits = _mm512_castps_si512(values), upper = _mm512_srli_epi32(bits, 16);
    if (STORED == STORED_BF16) return upper;
    __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_set1_epi32(_mm512_srli_epi32(sum, 16), is_nan, 0x7fc0);
}

INLINE size_t stored_bytes(int stored) {
    return stored == STORED_F32 ? sizeof(float) : stored == STORED_I8 ? 1 : sizeof(uint16_t);
}

/* Where 64 inputs of a block come from; outputs first..end of its 16 are there. */
typedef struct {
    const char *from; /* the block's output 0, there or not */
    ptrdiff_t stride_out, stride_in; /* bytes */
    size_t first, end, num_in;
} source_t;

/* Of 64 bytes the first so many. */
INLINE __mmask64 inputs_of(size_t num_in) {
    return num_in >= SUPER ? ~(__mmask64)0 : ((__mmask64)1 << num_in) - 1;
}

INLINE __mmask16 outputs_of(const source_t *source) {
    return (__mmask16)(lanes(source->end) & ~lanes(source->first));
}

/* Rows of 16 words each, and zeros for outputs that are not there, on end. */
INLINE void load_rows(const int STORED, const source_t *source, size_t size, tile_t *tile) {
#pragma GCC unroll 1
    for (size_t k = 0; k < SUPER; k += 16) {
        __mmask16 mask = lanes(source->num_in > k ? source->num_in - k : 0);
        __m512i rows[16];
#pragma GCC unroll 16
        for (size_t out = 0; out < BLOCK; out++) {
            const char *from = source->from + (ptrdiff_t)out * source->stride_out + k * size;
            __mmask16 own = out >= source->first && out < source->end ? mask : 0;
            rows[out] = _mm512_castps_si512(floats_at(STORED, from, own));
        }
        transpose_16(rows);
#pragma GCC unroll 16
        for (size_t i = 0; i < 16; i++) {
            _mm512_store_ps(tile->values[k + i], _mm512_castsi512_ps(rows[i]));
        }
    }
}

INLINE void load_columns(const int STORED, const source_t *source, tile_t *tile) {
    __mmask16 outputs = outputs_of(source);
    for (size_t k = 0; k < SUPER; k++) {
        const char *from = source->from + (ptrdiff_t)k * source->stride_in;
        __m512 values = floats_at(STORED, from, k < source->num_in ? outputs : 0);
        _mm512_store_ps(tile->values[k], values);
    }
}

INLINE void load(const int STORED, const source_t *source, tile_t *tile) {
    const ptrdiff_t size = STORED == STORED_F32 ? sizeof(float) : sizeof(uint16_t);
    if (source->stride_in == size) {
        load_rows(STORED, source, (size_t)size, tile);
    } else if (source->stride_out == size) {
        load_columns(STORED, source, tile);
    } else {
        for (size_t i = 0; i < SUPER * BLOCK; i++) {
            size_t k = i / BLOCK, out = i % BLOCK;
            int is_there = k < source->num_in && out >= source->first && out < source->end;
            const char *from = source->from + (ptrdiff_t)out * source->stride_out +
                               (ptrdiff_t)k * source->stride_in;
            tile->values[k][out] = _mm512_cvtss_f32(floats_at(STORED, from, is_there ? 1 : 0));
        }
    }
}

/* int8, four inputs of an output in a word. */
INLINE void load_quads(const source_t *source, quads_t *quads) {
    size_t count = source->num_in < SUPER ? source->num_in : SUPER;
    if (source->stride_in == 1) {
        __mmask64 mask = inputs_of(count);
        __m512i rows[16];
        for (size_t out = 0; out < BLOCK; out++) {
            const char *from = source->from + (ptrdiff_t)out * source->stride_out;
            __mmask64 own = out >= source->first && out < source->end ? mask : 0;
            rows[out] = _mm512_maskz_loadu_epi8(own, from);
        }
        transpose_16(rows);
        for (size_t i = 0; i < 16; i++) _mm512_store_si512(quads->words[i], rows[i]);
        return;
    }
    memset(quads, 0, sizeof *quads);
    for (size_t k = 0; k < count; k++) {
        for (size_t out = source->first; out < source->end; out++) {
            const char *from = source->from + (ptrdiff_t)out * source->stride_out +
                               (ptrdiff_t)k * source->stride_in;
            quads->words[k / 4][out] |= (uint32_t)(uint8_t)*from << k % 4 * 8;
        }
    }
}

/* What quantises 32 inputs of 16 outputs: each output's largest over 127, as the least bf16 that is
 * not below it. Where one is not a number, neither is the scale, and all levels are zeros. */
INLINE __m512i scales_of(const float (*values)[BLOCK]) {
    const __m512 smallest = _mm512_set1_ps(SMALLEST_SCALE);
    __m512 greatest = _mm512_setzero_ps();
    __mmask16 is_nan = 0;
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k++) {
        __m512 value = _mm512_load_ps(values[k]);
        greatest = _mm512_max_ps(greatest, _mm512_abs_ps(value));
        is_nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    __m512i wanted = _mm512_castps_si512(_mm512_div_ps(greatest, _mm512_set1_ps(127)));
    __m512i bits = _mm512_srli_epi32(_mm512_add_epi32(wanted, _mm512_set1_epi32(0xffff)), 16);
    __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    bits = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(scales, smallest, _CMP_GE_OQ), bits);
    return _mm512_mask_set1_epi32(bits, is_nan, 0x7fc0);
}

INLINE void quantise_tile(const tile_t *tile, quads_t *quads, __m512i scales[SUPER / GROUP]) {
    const __m512 one = _mm512_set1_ps(1);
    const __m512 most = _mm512_set1_ps(127), least = _mm512_set1_ps(-127);
    for (size_t group = 0; group < SUPER / GROUP; group++) {
        const float(*values)[BLOCK] = tile->values + group * GROUP;
        scales[group] = scales_of(values);
        __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(scales[group], 16));
        __mmask16 is_positive = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
        __m512 inverse = _mm512_maskz_div_ps(is_positive, one, scale);
        for (size_t quad = 0; quad < GROUP / 4; quad++) {
            __m512i word = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 3; i >= 0; i--) {
                __m512 level = _mm512_mul_ps(_mm512_load_ps(values[quad * 4 + i]), inverse);
                __mmask16 is_number = _mm512_cmp_ps_mask(level, level, _CMP_ORD_Q);
                level = _mm512_max_ps(_mm512_min_ps(level, most), least);
                __m512i whole = _mm512_maskz_cvtps_epi32(is_number, level);
                whole = _mm512_and_si512(whole, _mm512_set1_epi32(0xff));
                word = _mm512_or_si512(_mm512_slli_epi32(word, 8), whole);
            }
            _mm512_store_si512(quads->words[group * GROUP / 4 + quad], word);
        }
    }
}

/* A block's outputs, from its input 0; the matrix has first_out..end_out of them. */
INLINE source_t source_of(const matrix_t *matrix, size_t first_out, size_t end_out,
                          size_t block) {
    ptrdiff_t size = (ptrdiff_t)stored_bytes(matrix->stored), stride = matrix->stride_out * size;
    ptrdiff_t behind = (ptrdiff_t)(block * BLOCK) - (ptrdiff_t)first_out;
    size_t end = end_out - block * BLOCK;
    return (source_t){
        .from = (const char *)matrix->values + behind * stride,
        .stride_out = stride,
        .stride_in = matrix->stride_in * size,
        .first = behind < 0 ? (size_t)-behind : 0,
        .end = end < BLOCK ? end : BLOCK,
        .num_in = matrix->num_in,
    };
}

/* The next 64 inputs; 0 when there are none. */
INLINE int advance(source_t *source) {
    if (source->num_in <= SUPER) return 0;
    source->num_in -= SUPER;
    source->from += SUPER * source->stride_in;
    return 1;
}

#endif
#endif
