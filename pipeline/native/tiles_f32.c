/* Tiles of a product in float32: weights in float32, or in bf16 widened exactly on the way. */
#include "simd.h"

#if defined(VEILPIPE_X86)

/* With R and B constants, acc lives in registers. */
INLINE void load_acc(const int R, const int B, __m512 *acc, const float *from, size_t stride,
                     int goes_on) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            acc[r * B + b] = goes_on ? _mm512_loadu_ps(from + r * stride + b * BLOCK)
                                     : _mm512_setzero_ps();
        }
    }
}

INLINE void store_acc(const int R, const int B, const __m512 *acc, float *to, size_t stride) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) _mm512_storeu_ps(to + r * stride + b * BLOCK, acc[r * B + b]);
    }
}

INLINE void multiply(const int R, const int B, __m512 *acc, const char *x, size_t x_stride,
                     const __m512 *w) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        __m512 xr = _mm512_set1_ps(*(const float *)(x + r * x_stride));
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) acc[r * B + b] = _mm512_fmadd_ps(xr, w[b], acc[r * B + b]);
    }
}

enum { AHEAD = 8 }; /* vectors of each block fetched ahead */

INLINE void run_f32(const int R, const int B, float *out, size_t out_stride, const char *x,
                    size_t x_stride, const char *w, size_t block_stride, size_t k_stride,
                    size_t num_k, int goes_on) {
    __m512 acc[6 * 8], wb[8];
    load_acc(R, B, acc, out, out_stride, goes_on);
    for (size_t k = 0; k < num_k; k++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            wb[b] = _mm512_loadu_ps(w + b * block_stride);
            if (R < 4) _mm_prefetch(w + b * block_stride + AHEAD * k_stride, _MM_HINT_T0);
        }
        multiply(R, B, acc, x, x_stride, wb);
        w += k_stride;
        x += sizeof(float);
    }
    store_acc(R, B, acc, out, out_stride);
}

INLINE void run_bf16(const int R, const int B, float *out, size_t out_stride, const char *x,
                     size_t x_stride, const char *w, size_t block_stride, size_t k_stride,
                     size_t num_k, int goes_on) {
    __m512 acc[6 * 8], wb[8];
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    load_acc(R, B, acc, out, out_stride, goes_on);
    for (size_t k = 0; k + 1 < num_k; k += 2) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            __m512i pair = _mm512_loadu_si512(w + b * block_stride);
            wb[b] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
            if (R < 4) _mm_prefetch(w + b * block_stride + AHEAD * k_stride, _MM_HINT_T0);
        }
        multiply(R, B, acc, x, x_stride, wb);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            __m512i pair = _mm512_loadu_si512(w + b * block_stride);
            wb[b] = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
        }
        multiply(R, B, acc, x + sizeof(float), x_stride, wb);
        w += k_stride;
        x += 2 * sizeof(float);
    }
    if (num_k % 2) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            __m512i pair = _mm512_loadu_si512(w + b * block_stride);
            wb[b] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        }
        multiply(R, B, acc, x, x_stride, wb);
    }
    store_acc(R, B, acc, out, out_stride);
}

#define TILE(KIND, R, B)                                                                           \
    static void KIND##_##R##x##B(float *acc, size_t acc_stride, const char *x, size_t x_stride,    \
                                 const char *w, size_t block_stride, size_t k_stride,              \
                                 size_t num_k, int goes_on) {                                      \
        run_##KIND(R, B, acc, acc_stride, x, x_stride, w, block_stride, k_stride, num_k, goes_on); \
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
