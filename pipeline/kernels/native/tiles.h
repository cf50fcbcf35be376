/* The tiles of a product: R rows by B blocks of 16 outputs, each shape a function of its own, so
 * that its sums live in registers.
 *
 * The rows of a tile come interleaved, input by input (a "panel"): one address leads to all.
 */
#ifndef VEILPIPE_TILES_H
#define VEILPIPE_TILES_H

#include "simd.h"

#if defined(VEILPIPE_X86)

enum { MAX_SUMS = 24, MAX_WIDTH = 8 }; /* vectors of sums a tile has, blocks it covers */
enum { MAX_I8_SUMS = 8, MAX_I8_WIDTH = 2 }; /* each has a float and two integer parts */

/* 64 inputs of R rows of x for I8 and I4, R of each number: int8 levels[SUPER / 4][R][4], float
 * scales[SUPER / GROUP][R], and for each group of a row what makes up for weights being unsigned:
 * I8 int32 -128 * the sum of levels, where sums start; I4 that sum as a float. */
enum { LEVELS = SUPER, SCALES = SUPER / GROUP * sizeof(float), STARTS = SCALES };

INLINE void zero_sums(const int R, const int B, __m512 *sums) {
#pragma GCC unroll 24
    for (int i = 0; i < R * B; i++) sums[i] = _mm512_setzero_ps();
}

INLINE void load_sums(const int R, const int B, __m512 *sums, const float *acc, size_t acc_stride,
                      size_t acc_block) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            sums[r * B + b] = _mm512_loadu_ps(acc + r * acc_stride + b * acc_block);
        }
    }
}

/* Sums replace what acc holds, or add to it. */
INLINE void store_sums(const int R, const int B, const __m512 *sums, float *acc, size_t acc_stride,
                       size_t acc_block, int adds) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            float *at = acc + r * acc_stride + b * acc_block;
            __m512 sum = sums[r * B + b];
            if (adds) sum = _mm512_add_ps(_mm512_loadu_ps(at), sum);
            _mm512_storeu_ps(at, sum);
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
        _mm_prefetch(w[b] + at + (R < MANY_ROWS ? AHEAD : AHEAD_OF_MANY) * k_stride, _MM_HINT_T1);
    }
}

/* Each shape that there is: as many blocks as there are registers for, and what is left then. */
#define UP_TO_4(DO, R) DO(R, 1) DO(R, 2) DO(R, 4)
#define UP_TO_2(DO, R) DO(R, 1) DO(R, 2)
#define ALL_SHAPES(DO)                                                                             \
    DO(1, 8) UP_TO_4(DO, 1) UP_TO_4(DO, 2) UP_TO_4(DO, 3) UP_TO_4(DO, 4) UP_TO_4(DO, 5)            \
    UP_TO_4(DO, 6) UP_TO_2(DO, 7) UP_TO_2(DO, 8) UP_TO_2(DO, 9) UP_TO_2(DO, 10) UP_TO_2(DO, 11)    \
    UP_TO_2(DO, 12) DO(13, 1) DO(14, 1) DO(15, 1) DO(16, 1)

#endif
#endif
