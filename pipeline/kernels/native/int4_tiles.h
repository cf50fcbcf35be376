/* From floats to int4, a tile at a time: to the bit what pipeline/weights/int4.py finds. */
#ifndef VEILPIPE_INT4_TILES_H
#define VEILPIPE_INT4_TILES_H

#include "stored_tiles.h"

#if defined(VEILPIPE_X86)

enum { INT4_MAX = 15, HALF_NAN = 0x7e00 };

/* (level - zero) * scale of 16 outputs; scale and zero as halves hold them. */
typedef struct {
    __m512 scale, zero, inverse; /* 1 / scale, or 0 */
} grid_t;

INLINE __m512 as_half(__m512 values) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

/* With 16 levels from `low` <= 0 to `high` >= 0. */
INLINE grid_t grid_of(__m512 low, __m512 high) {
    grid_t grid;
    __m512 span = _mm512_sub_ps(high, low);
    grid.scale = as_half(_mm512_div_ps(span, _mm512_set1_ps(INT4_MAX)));
    __mmask16 is_positive = _mm512_cmp_ps_mask(grid.scale, _mm512_setzero_ps(), _CMP_GT_OQ);
    grid.inverse = _mm512_maskz_div_ps(is_positive, _mm512_set1_ps(1), grid.scale);
    __m512 below = _mm512_sub_ps(_mm512_setzero_ps(), low);
    grid.zero = as_half(_mm512_mul_ps(below, grid.inverse));
    return grid;
}

INLINE __m512 level_of(grid_t grid, __m512 value) {
    __m512 level = _mm512_add_ps(_mm512_mul_ps(value, grid.inverse), grid.zero);
    level = _mm512_roundscale_ps(level, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(INT4_MAX));
}

INLINE __m512 error_of(grid_t grid, const float (*values)[BLOCK]) {
    __m512 error = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k++) {
        __m512 value = _mm512_load_ps(values[k]), level = level_of(grid, value);
        __m512 held = _mm512_mul_ps(_mm512_sub_ps(level, grid.zero), grid.scale);
        __m512 off = _mm512_sub_ps(held, value);
        error = _mm512_add_ps(error, _mm512_mul_ps(off, off));
    }
    return error;
}

/* Of grids whose ends are those of the numbers, or some sixteenths nearer to 0, the one with the
 * least squared error, the first of equals. Where one is not a number, or what halves cannot scale,
 * neither is the scale. */
INLINE grid_t best_grid(const float (*values)[BLOCK]) {
    __m512 low = _mm512_setzero_ps(), high = low, least = _mm512_set1_ps(__builtin_inff());
    __mmask16 is_nan = 0;
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k++) {
        __m512 value = _mm512_load_ps(values[k]);
        low = _mm512_min_ps(low, value);
        high = _mm512_max_ps(high, value);
        is_nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    grid_t best = grid_of(low, high);
    is_nan |= _mm512_cmp_ps_mask(best.scale, least, _CMP_NLT_UQ);
    for (int below = 16; below > 12; below--) {
        for (int above = 16; above > 12; above--) {
            grid_t grid = grid_of(_mm512_mul_ps(low, _mm512_set1_ps((float)below / 16)),
                                  _mm512_mul_ps(high, _mm512_set1_ps((float)above / 16)));
            __m512 error = error_of(grid, values);
            __mmask16 is_less = _mm512_cmp_ps_mask(error, least, _CMP_LT_OQ);
            least = _mm512_mask_mov_ps(least, is_less, error);
            best.scale = _mm512_mask_mov_ps(best.scale, is_less, grid.scale);
            best.zero = _mm512_mask_mov_ps(best.zero, is_less, grid.zero);
            best.inverse = _mm512_mask_mov_ps(best.inverse, is_less, grid.inverse);
        }
    }
    best.scale = _mm512_mask_mov_ps(best.scale, is_nan, _mm512_set1_ps(__builtin_nanf("")));
    best.zero = _mm512_maskz_mov_ps(~is_nan, best.zero);
    best.inverse = _mm512_maskz_mov_ps(~is_nan, best.inverse);
    return best;
}

/* Scales and zeros as halves, in the lower half of a word each. */
typedef struct {
    __m512i scales[SUPER / GROUP], zeros[SUPER / GROUP];
} sides_t;

INLINE __m512i half_bits(__m512 values) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

/* Levels in bytes, 0 for those of what is not a number. */
INLINE void quantise_tile_int4(const tile_t *tile, quads_t *quads, sides_t *sides) {
    for (size_t group = 0; group < SUPER / GROUP; group++) {
        const float(*values)[BLOCK] = tile->values + group * GROUP;
        grid_t grid = best_grid(values);
        __mmask16 is_number = _mm512_cmp_ps_mask(grid.scale, grid.scale, _CMP_ORD_Q);
        sides->scales[group] = _mm512_mask_set1_epi32(half_bits(grid.scale), ~is_number, HALF_NAN);
        sides->zeros[group] = half_bits(grid.zero);
        for (size_t quad = 0; quad < GROUP / 4; quad++) {
            __m512i word = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 3; i >= 0; i--) {
                __m512 level = level_of(grid, _mm512_load_ps(values[quad * 4 + i]));
                word = _mm512_or_si512(_mm512_slli_epi32(word, 8),
                                       _mm512_maskz_cvtps_epi32(is_number, level));
            }
            _mm512_store_si512(quads->words[group * GROUP / 4 + quad], word);
        }
    }
}

#endif
#endif
