/* From floats to int4, a tile at a time: to the bit what pipeline/weights/int4.py finds. */
#ifndef VEILPIPE_INT4_TILES_H
#define VEILPIPE_INT4_TILES_H

#include "stored_tiles.h"

#if defined(VEILPIPE_SIMD)

enum { INT4_MAX = 15, HALF_NAN = 0x7e00 };

/* (level - zero) * scale of 16 outputs; scale and zero as halves hold them. */
typedef struct {
    f32x16 scale, zero, inverse; /* 1 / scale, or 0 */
} grid_t;

/* With 16 levels from `low` <= 0 to `high` >= 0. */
INLINE grid_t grid_of(f32x16 low, f32x16 high) {
    grid_t grid;
    f32x16 span = f_sub(high, low);
    grid.scale = f_as_halves(f_div(span, f_set1(INT4_MAX)));
    mask16 is_positive = f_gt(grid.scale, f_zero());
    grid.inverse = f_keep(is_positive, f_div(f_set1(1), grid.scale));
    f32x16 below = f_sub(f_zero(), low);
    grid.zero = f_as_halves(f_mul(below, grid.inverse));
    return grid;
}

INLINE f32x16 level_of(grid_t grid, f32x16 value) {
    f32x16 level = f_add(f_mul(value, grid.inverse), grid.zero);
    level = f_round(level);
    return f_min(f_max(level, f_zero()), f_set1(INT4_MAX));
}

INLINE f32x16 error_of(grid_t grid, const float (*values)[BLOCK]) {
    f32x16 error = f_zero();
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k++) {
        f32x16 value = f_load(values[k]), level = level_of(grid, value);
        f32x16 held = f_mul(f_sub(level, grid.zero), grid.scale);
        f32x16 off = f_sub(held, value);
        error = f_add(error, f_mul(off, off));
    }
    return error;
}

/* Of grids whose ends are those of the numbers, or some sixteenths nearer to 0, the one with the
 * least squared error, the first of equals. Where one is not a number, or what halves cannot scale,
 * neither is the scale. */
INLINE grid_t best_grid(const float (*values)[BLOCK]) {
    f32x16 low = f_zero(), high = low, least = f_set1(__builtin_inff());
    mask16 is_nan = 0;
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k++) {
        f32x16 value = f_load(values[k]);
        low = f_min(low, value);
        high = f_max(high, value);
        is_nan |= f_unordered(value, value);
    }
    grid_t best = grid_of(low, high);
    is_nan |= (mask16)~f_gt(least, best.scale);
    for (int below = 16; below > 12; below--) {
        for (int above = 16; above > 12; above--) {
            grid_t grid = grid_of(f_mul(low, f_set1((float)below / 16)),
                                  f_mul(high, f_set1((float)above / 16)));
            f32x16 error = error_of(grid, values);
            mask16 is_less = f_gt(least, error);
            least = f_select(is_less, error, least);
            best.scale = f_select(is_less, grid.scale, best.scale);
            best.zero = f_select(is_less, grid.zero, best.zero);
            best.inverse = f_select(is_less, grid.inverse, best.inverse);
        }
    }
    best.scale = f_select(is_nan, f_set1(__builtin_nanf("")), best.scale);
    best.zero = f_keep((mask16)~is_nan, best.zero);
    best.inverse = f_keep((mask16)~is_nan, best.inverse);
    return best;
}

/* Scales and zeros as halves, in the lower half of a word each. */
typedef struct {
    i32x16 scales[SUPER / GROUP], zeros[SUPER / GROUP];
} sides_t;

INLINE i32x16 half_bits(f32x16 values) {
    uint16_t halves[BLOCK];
    f_store_halves(halves, values);
    return i_load_words(halves);
}

/* Levels in bytes, 0 for those of what is not a number. */
INLINE void quantise_tile_int4(const tile_t *tile, quads_t *quads, sides_t *sides) {
    for (size_t group = 0; group < SUPER / GROUP; group++) {
        const float(*values)[BLOCK] = tile->values + group * GROUP;
        grid_t grid = best_grid(values);
        mask16 is_number = (mask16)~f_unordered(grid.scale, grid.scale);
        sides->scales[group] = i_select(is_number, half_bits(grid.scale), i_set1(HALF_NAN));
        sides->zeros[group] = half_bits(grid.zero);
        for (size_t quad = 0; quad < GROUP / 4; quad++) {
            i32x16 word = i_zero();
#pragma GCC unroll 4
            for (int i = 3; i >= 0; i--) {
                f32x16 level = level_of(grid, f_load(values[quad * 4 + i]));
                word = i_or(i_shl(word, 8),
                                       i_keep(is_number, i_of_f(level)));
            }
            i_store(quads->words[group * GROUP / 4 + quad], word);
        }
    }
}

#endif
#endif
