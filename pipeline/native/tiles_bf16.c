/* Tiles of a product in bf16, for CPUs that multiply it: rows rounded to bf16, sums in float32. */
#define EXTRA_TARGET ",avx512bf16"
#include "simd.h"

#if defined(VEILPIPE_X86)

int has_bf16_dot(void) { return __builtin_cpu_supports("avx512bf16"); }

size_t rounded_bytes(size_t num_in) { return (num_in + 1) / 2 * 2 * sizeof(uint16_t); }

void round_row(const float *x, size_t num_in, void *rounded) {
    char *to = rounded;
    size_t padded = (num_in + 1) / 2 * 2; /* weights are stored in pairs, too */
    for (size_t k = 0; k < padded; k += BLOCK) {
        __m512 from = _mm512_maskz_loadu_ps(lanes(num_in - k), x + k);
        __m256i bits = (__m256i)_mm512_cvtneps_pbh(from);
        _mm256_mask_storeu_epi16(to + k * sizeof(uint16_t), lanes(padded - k), bits);
    }
}

enum { AHEAD = 16 }; /* vectors of each block, as in tiles_f32.c */

INLINE void run_dot(const int R, const int B, float *out, size_t out_stride, size_t out_block,
                    const char *x_base, size_t x_stride, const char *w_base, size_t block_stride,
                    size_t k_stride, size_t num_k, int adds) {
    __m512 acc[6 * 4];
    __m512i pairs[8];
    const char *x[6], *w[8];
    spread(x, R, x_base, x_stride);
    spread(w, B, w_base, block_stride);
#pragma GCC unroll 24
    for (int i = 0; i < R * B; i++) acc[i] = _mm512_setzero_ps();
    for (size_t k = 0, at = 0; k < num_k; k += 2, at += k_stride) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            pairs[b] = _mm512_loadu_si512(w[b] + at);
            _mm_prefetch(w[b] + at + AHEAD * k_stride, _MM_HINT_T1);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            int32_t pair;
            __builtin_memcpy(&pair, x[r] + k * sizeof(uint16_t), sizeof pair);
            __m512i xr = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                acc[r * B + b] =
                    _mm512_dpbf16_ps(acc[r * B + b], (__m512bh)pairs[b], (__m512bh)xr);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            float *at = out + r * out_stride + b * out_block;
            __m512 sum = acc[r * B + b];
            if (adds) sum = _mm512_add_ps(_mm512_loadu_ps(at), sum);
            _mm512_storeu_ps(at, sum);
        }
    }
}

#define TILE(R, B)                                                                                 \
    static void dot_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,      \
                              size_t x_stride, const char *w, size_t block_stride,                 \
                              size_t k_stride, size_t num_k, int adds) {                           \
        run_dot(R, B, acc, acc_stride, acc_block, x, x_stride, w, block_stride, k_stride, num_k,   \
                adds);                                                                             \
    }
#define ROW(R) TILE(R, 1) TILE(R, 2) TILE(R, 4)
ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6) TILE(1, 8)

#define NAMES(R) {dot_##R##x1, dot_##R##x2, dot_##R##x4}

tile_fn tile_bf16_dot(size_t rows, size_t blocks) {
    static const tile_fn tiles[6][3] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4), NAMES(5), NAMES(6)};
    return blocks == 8 ? dot_1x8 : tiles[rows - 1][blocks / 2];
}

END_SIMD
#endif
