/* The tiles of a product: R rows by B blocks of 16 outputs, each shape a function of its own, so
 * that its sums live in registers.
 *
 * The rows of a tile come interleaved, input by input (a "panel"): one address leads to all.
 */
#ifndef VEILPIPE_TILES_H
#define VEILPIPE_TILES_H

#include "simd.h"

#if defined(VEILPIPE_SIMD)

/* Vectors of sums a tile has, blocks it covers, rows: of I8 each sum has two integer parts, too. */
#if defined(LEVEL_AVX512)
enum { MAX_SUMS = 24, MAX_WIDTH = 8, MAX_TILE_ROWS = 16, WIDE_TILE_ROWS = 6 };
enum { MAX_I8_SUMS = 8, MAX_I8_WIDTH = 2 };
#else
enum { MAX_SUMS = 6, MAX_WIDTH = 4, MAX_TILE_ROWS = 6, WIDE_TILE_ROWS = 6 };
enum { MAX_I8_SUMS = 4, MAX_I8_WIDTH = 2 };
#endif

/* 64 inputs of R rows of x for I8 and I4, R of each number: int8 levels[SUPER / 4][R][4], float
 * scales[SUPER / GROUP][R], and for each group of a row what makes up for weights being unsigned:
 * I8 int32 -128 * the sum of levels, where sums start; I4 that sum as a float. */
enum { LEVELS = SUPER, SCALES = SUPER / GROUP * sizeof(float), STARTS = SCALES };

INLINE void zero_sums(const int R, const int B, f32x16 *sums) {
#pragma GCC unroll 24
    for (int i = 0; i < R * B; i++) sums[i] = f_zero();
}

INLINE void load_sums(const int R, const int B, f32x16 *sums, const float *acc, size_t acc_stride,
                      size_t acc_block) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            sums[r * B + b] = f_load(acc + r * acc_stride + b * acc_block);
        }
    }
}

/* Sums replace what acc holds, or add to it. */
INLINE void store_sums(const int R, const int B, const f32x16 *sums, float *acc, size_t acc_stride,
                       size_t acc_block, int adds) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            float *at = acc + r * acc_stride + b * acc_block;
            f32x16 sum = sums[r * B + b];
            if (adds) sum = f_add(f_load(at), sum);
            f_store(at, sum);
        }
    }
}

/* Vectors of each block to ask for in advance: hardware alone does not keep enough of them on the
 * way, and the more rows, the fewer streams there are and the longer the processor is busy. */
enum { AHEAD = 16, AHEAD_OF_MANY = 64, MANY_ROWS = 7 };

/* Into L2, for these streams would evict each other from L1. */
INLINE void fetch(const int R, const int B, const char *const *w, size_t at, size_t k_stride) {
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
        fetch_far(w[b] + at + (R < MANY_ROWS ? AHEAD : AHEAD_OF_MANY) * k_stride);
    }
}

/* Of I8 and I4, whose bytes take longer to compute with, hardware alone fetches too little. Few rows
 * fetch each stream so far ahead, the n-th line of a group with its n-th step. Many keep the core
 * busy while the next weights come, a pass ahead and a part with each of its tiles: all the time, not
 * only while the first tile is computed. */
enum { FETCHING_ROWS = MAX_I8_SUMS / 2 + 1, SUPERS_AHEAD = 6 };

INLINE void fetch_next(const int R, const int B, const char *const *w, size_t super_bytes,
                       const int group, const int n, share_t *next) {
    if (R >= FETCHING_ROWS) {
        fetch_far(next->from);
        next->from += next->step;
        return;
    }
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        fetch_far(w[b] + (2 * SUPERS_AHEAD + group) * (super_bytes / 2) + n * VECTOR);
    }
}

/* Each shape that there is: as many blocks as there are registers for, and what is left then. */
#define UP_TO_4(DO, R) DO(R, 1) DO(R, 2) DO(R, 4)
#define UP_TO_2(DO, R) DO(R, 1) DO(R, 2)
#if defined(LEVEL_AVX512)
#define ALL_SHAPES(DO)                                                                             \
    DO(1, 8) UP_TO_4(DO, 1) UP_TO_4(DO, 2) UP_TO_4(DO, 3) UP_TO_4(DO, 4) UP_TO_4(DO, 5)            \
    UP_TO_4(DO, 6) UP_TO_2(DO, 7) UP_TO_2(DO, 8) UP_TO_2(DO, 9) UP_TO_2(DO, 10) UP_TO_2(DO, 11)    \
    UP_TO_2(DO, 12) DO(13, 1) DO(14, 1) DO(15, 1) DO(16, 1)
#define ATTENTION_SHAPES(DO)                                                                       \
    UP_TO_4(DO, 1) UP_TO_4(DO, 2) UP_TO_4(DO, 3) UP_TO_4(DO, 4) UP_TO_4(DO, 5) UP_TO_4(DO, 6)
#define I8_SHAPES(DO)                                                                              \
    UP_TO_2(DO, 1) UP_TO_2(DO, 2) UP_TO_2(DO, 3) UP_TO_2(DO, 4) DO(5, 1) DO(6, 1) DO(7, 1) DO(8, 1)
#define I4_WIDE_SHAPES(DO) DO(4, 1) DO(5, 1) DO(6, 1) DO(7, 1) DO(8, 1)
#else
#define ALL_SHAPES(DO)                                                                             \
    UP_TO_4(DO, 1) UP_TO_2(DO, 2) UP_TO_2(DO, 3) DO(4, 1) DO(5, 1) DO(6, 1)
#define ATTENTION_SHAPES ALL_SHAPES
#define I8_SHAPES(DO) UP_TO_2(DO, 1) UP_TO_2(DO, 2) DO(3, 1) DO(4, 1)
#define I4_WIDE_SHAPES(DO) DO(2, 1) DO(3, 1) DO(4, 1)
#endif

/* Blocks of attention's tiles. */
INLINE size_t widest(size_t rows) {
    if (rows * 4 <= MAX_SUMS) return 4;
    return rows * 2 <= MAX_SUMS ? 2 : 1;
}

#endif
#endif
