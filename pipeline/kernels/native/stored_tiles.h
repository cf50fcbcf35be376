/* Weights as files hold them, a tile at a time: loaded, converted, quantised. */
#ifndef VEILPIPE_STORED_TILES_H
#define VEILPIPE_STORED_TILES_H

#include "simd.h"

#include <string.h>

#if defined(VEILPIPE_SIMD)

/* [inputs, or words of them][outputs] */
typedef struct {
    _Alignas(VECTOR) float values[SUPER][BLOCK];
} tile_t;

typedef struct {
    _Alignas(VECTOR) uint32_t words[SUPER / 4][BLOCK];
} quads_t;

/* Of 16 numbers in a row those that `mask` has, as floats. */
INLINE f32x16 floats_at(const int STORED, const char *from, mask16 mask) {
    if (STORED == STORED_F32) return f_load_some(mask, from);
    if (STORED == STORED_F16) return f_load_some_halves(mask, from);
    return f_of_bits(i_shl(i_load_some_words(mask, from), 16));
}

/* bf16 in the lower halves, nearest with ties to even; of what is not a number a quiet one, but
 * what was bf16 stays what it was. */
INLINE i32x16 rounded(const int STORED, f32x16 values) {
    i32x16 bits = i_of_bits(values), upper = i_shr(bits, 16);
    if (STORED == STORED_BF16) return upper;
    i32x16 odd = i_and(upper, i_set1(1));
    i32x16 sum = i_add(i_add(bits, odd), i_set1(0x7fff));
    mask16 is_nan = f_unordered(values, values);
    return i_select(is_nan, i_set1(0x7fc0), i_shr(sum, 16));
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

INLINE mask16 outputs_of(const source_t *source) {
    return (mask16)(lanes(source->end) & ~lanes(source->first));
}

/* Rows of 16 words each, and zeros for outputs that are not there, on end. */
INLINE void load_rows(const int STORED, const source_t *source, size_t size, tile_t *tile) {
#pragma GCC unroll 1
    for (size_t k = 0; k < SUPER; k += 16) {
        mask16 mask = lanes(source->num_in > k ? source->num_in - k : 0);
        i32x16 rows[16];
#pragma GCC unroll 16
        for (size_t out = 0; out < BLOCK; out++) {
            const char *from = source->from + (ptrdiff_t)out * source->stride_out + k * size;
            mask16 own = out >= source->first && out < source->end ? mask : 0;
            rows[out] = i_of_bits(floats_at(STORED, from, own));
        }
        transpose_16(rows);
#pragma GCC unroll 16
        for (size_t i = 0; i < 16; i++) {
            f_store(tile->values[k + i], f_of_bits(rows[i]));
        }
    }
}

INLINE void load_columns(const int STORED, const source_t *source, tile_t *tile) {
    mask16 outputs = outputs_of(source);
    for (size_t k = 0; k < SUPER; k++) {
        const char *from = source->from + (ptrdiff_t)k * source->stride_in;
        f32x16 values = floats_at(STORED, from, k < source->num_in ? outputs : 0);
        f_store(tile->values[k], values);
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
            tile->values[k][out] = f_first(floats_at(STORED, from, is_there ? 1 : 0));
        }
    }
}

/* int8, four inputs of an output in a word. */
INLINE void load_quads(const source_t *source, quads_t *quads) {
    size_t count = source->num_in < SUPER ? source->num_in : SUPER;
    if (source->stride_in == 1) {
        i32x16 rows[16];
        for (size_t out = 0; out < BLOCK; out++) {
            const char *from = source->from + (ptrdiff_t)out * source->stride_out;
            int is_there = out >= source->first && out < source->end;
            rows[out] = i_load_first_bytes(is_there ? count : 0, from);
        }
        transpose_16(rows);
        for (size_t i = 0; i < 16; i++) i_store(quads->words[i], rows[i]);
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
INLINE i32x16 scales_for(const float (*values)[BLOCK]) {
    const f32x16 smallest = f_set1(SMALLEST_SCALE);
    f32x16 greatest = f_zero();
    mask16 is_nan = 0;
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k++) {
        f32x16 value = f_load(values[k]);
        greatest = f_max(greatest, f_abs(value));
        is_nan |= f_unordered(value, value);
    }
    i32x16 wanted = i_of_bits(f_div(greatest, f_set1(127)));
    i32x16 bits = i_shr(i_add(wanted, i_set1(0xffff)), 16);
    f32x16 scales = f_of_bits(i_shl(bits, 16));
    bits = i_keep(f_ge(scales, smallest), bits);
    return i_select(is_nan, i_set1(0x7fc0), bits);
}

INLINE void quantise_tile(const tile_t *tile, quads_t *quads, i32x16 scales[SUPER / GROUP]) {
    const f32x16 one = f_set1(1);
    const f32x16 most = f_set1(127), least = f_set1(-127);
    for (size_t group = 0; group < SUPER / GROUP; group++) {
        const float(*values)[BLOCK] = tile->values + group * GROUP;
        scales[group] = scales_for(values);
        f32x16 scale = f_of_bits(i_shl(scales[group], 16));
        mask16 is_positive = f_gt(scale, f_zero());
        f32x16 inverse = f_keep(is_positive, f_div(one, scale));
        for (size_t quad = 0; quad < GROUP / 4; quad++) {
            i32x16 word = i_zero();
#pragma GCC unroll 4
            for (int i = 3; i >= 0; i--) {
                f32x16 level = f_mul(f_load(values[quad * 4 + i]), inverse);
                mask16 is_number = (mask16)~f_unordered(level, level);
                level = f_max(f_min(level, most), least);
                i32x16 whole = i_keep(is_number, i_of_f(level));
                whole = i_and(whole, i_set1(0xff));
                word = i_or(i_shl(word, 8), whole);
            }
            i_store(quads->words[group * GROUP / 4 + quad], word);
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
