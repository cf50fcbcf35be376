/* Tiles of a product in float32: weights in float32, or in bf16 widened exactly on the way. */
#include "simd.h"

#if defined(VEILPIPE_X86)

/* With R and B constants, acc lives in registers. */
INLINE void zero_acc(const int R, const int B, __m512 *acc) {
#pragma GCC unroll 24
    for (int i = 0; i < R * B; i++) acc[i] = _mm512_setzero_ps();
}

INLINE void store_acc(const int R, const int B, const __m512 *acc, float *to, size_t stride,
                      size_t block, int adds) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            float *at = to + r * stride + b * block;
            __m512 sum = acc[r * B + b];
            if (adds) sum = _mm512_add_ps(_mm512_loadu_ps(at), sum);
            _mm512_storeu_ps(at, sum);
        }
    }
}

INLINE void multiply(const int R, const int B, __m512 *acc, const char *const *x, size_t at,
                     const __m512 *w) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        __m512 xr = _mm512_set1_ps(*(const float *)(x[r] + at));
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) acc[r * B + b] = _mm512_fmadd_ps(xr, w[b], acc[r * B + b]);
    }
}


enum { AHEAD = 16 }; /* vectors of each block */

/* Asks for what comes next: hardware alone does not keep enough of it on the way. Into L2, for
 * these streams would evict each other from L1. */
INLINE void fetch(const int B, const char *const *w, size_t at, size_t k_stride) {
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) _mm_prefetch(w[b] + at + AHEAD * k_stride, _MM_HINT_T1);
}

INLINE void run_f32(const int R, const int B, float *out, size_t out_stride, size_t out_block,
                    const char *x_base, size_t x_stride, const char *w_base, size_t block_stride,
                    size_t k_stride, size_t num_k, int adds) {
    __m512 acc[6 * 4], wide[8];
    const char *x[6], *w[8];
    spread(x, R, x_base, x_stride);
    spread(w, B, w_base, block_stride);
    zero_acc(R, B, acc);
    for (size_t k = 0, at = 0; k < num_k; k++, at += k_stride) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) wide[b] = _mm512_loadu_ps(w[b] + at);
        fetch(B, w, at, k_stride);
        multiply(R, B, acc, x, k * sizeof(float), wide);
    }
    store_acc(R, B, acc, out, out_stride, out_block, adds);
}

/* Of each pair of inputs the even one is the low half, the odd one the high half of 32 bits. */
INLINE void widen(const int B, __m512 *wide, const char *const *w, size_t at, const int is_odd) {
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
        __m512i pair = _mm512_loadu_si512(w[b] + at);
        pair = is_odd ? _mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000))
                      : _mm512_slli_epi32(pair, 16);
        wide[b] = _mm512_castsi512_ps(pair);
    }
}

INLINE void run_bf16(const int R, const int B, float *out, size_t out_stride, size_t out_block,
                     const char *x_base, size_t x_stride, const char *w_base, size_t block_stride,
                     size_t k_stride, size_t num_k, int adds) {
    __m512 acc[6 * 4], wide[8];
    const char *x[6], *w[8];
    size_t k = 0, at = 0;
    spread(x, R, x_base, x_stride);
    spread(w, B, w_base, block_stride);
    zero_acc(R, B, acc);
    for (; k + 1 < num_k; k += 2, at += k_stride) {
        fetch(B, w, at, k_stride);
        widen(B, wide, w, at, 0);
        multiply(R, B, acc, x, k * sizeof(float), wide);
        widen(B, wide, w, at, 1);
        multiply(R, B, acc, x, (k + 1) * sizeof(float), wide);
    }
    if (k < num_k) {
        widen(B, wide, w, at, 0);
        multiply(R, B, acc, x, k * sizeof(float), wide);
    }
    store_acc(R, B, acc, out, out_stride, out_block, adds);
}

#define TILE(KIND, R, B)                                                                           \
    static void KIND##_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,   \
                                 size_t x_stride, const char *w, size_t block_stride,              \
                                 size_t k_stride, size_t num_k, int adds) {                        \
        run_##KIND(R, B, acc, acc_stride, acc_block, x, x_stride, w, block_stride, k_stride,       \
                   num_k, adds);                                                                   \
    }
#define ROW(KIND, R) TILE(KIND, R, 1) TILE(KIND, R, 2) TILE(KIND, R, 4)
#define ALL(KIND)                                                                                  \
    ROW(KIND, 1) ROW(KIND, 2) ROW(KIND, 3) ROW(KIND, 4) ROW(KIND, 5) ROW(KIND, 6) TILE(KIND, 1, 8)
ALL(f32)
ALL(bf16)

#define NAMES(KIND, R) {KIND##_##R##x1, KIND##_##R##x2, KIND##_##R##x4}
#define TABLE(KIND)                                                                                \
    tile_fn tile_##KIND(size_t rows, size_t blocks) {                                              \
        static const tile_fn tiles[6][3] = {NAMES(KIND, 1), NAMES(KIND, 2), NAMES(KIND, 3),        \
                                            NAMES(KIND, 4), NAMES(KIND, 5), NAMES(KIND, 6)};       \
        return blocks == 8 ? KIND##_1x8 : tiles[rows - 1][blocks / 2];                             \
    }
TABLE(f32)
TABLE(bf16)

END_SIMD
#endif
