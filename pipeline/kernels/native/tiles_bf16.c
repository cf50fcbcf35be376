/* Tiles of a product in bf16, for CPUs that multiply it: rows rounded to bf16, sums in float32. */
#define EXTRA_TARGET ",avx512bf16"
#include "tiles.h"

#if defined(LEVEL_AVX512)

int has_bf16_dot(void) { return __builtin_cpu_supports("avx512bf16"); }

size_t rounded_bytes(size_t num_in) { return (num_in + 1) / 2 * 2 * sizeof(uint16_t); }

enum { PAIRS = 8 }; /* that are rounded at once */

void round_rows(const float *x, size_t num_in, size_t rows, void *panel) {
    int32_t *to = panel;
    size_t num_pairs = (num_in + 1) / 2; /* weights are stored in pairs, too */
    for (size_t pair = 0; pair < num_pairs; pair += PAIRS) {
        size_t left = num_pairs - pair < PAIRS ? num_pairs - pair : PAIRS;
        for (size_t row = 0; row < rows; row++) {
            __mmask16 mask = lanes(num_in - 2 * pair);
            __m512 from = _mm512_maskz_loadu_ps(mask, x + row * num_in + 2 * pair);
            int32_t bits[PAIRS];
            _mm256_storeu_si256((__m256i *)bits, (__m256i)_mm512_cvtneps_pbh(from));
            for (size_t i = 0; i < left; i++) to[(pair + i) * rows + row] = bits[i];
        }
    }
}

/* sum += weights * the pair of a row. */
INLINE void dot(const int B, __m512 *sum, __m512i weights, const char *pair) {
    int32_t bits;
    if (B == 1) { /* compilers would load a pair that only this needs into a register */
        __asm__("vdpbf16ps %2%{1to16%}, %1, %0"
                : "+v"(*sum)
                : "v"(weights), "m"(*(const int32_t *)pair));
        return;
    }
    __builtin_memcpy(&bits, pair, sizeof bits);
    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(bits));
}

INLINE void run_dot(const int R, const int B, float *acc, size_t acc_stride, size_t acc_block,
                    const char *x, const char *w_base, size_t block_stride, size_t num_k,
                    int adds) {
    __m512 sums[MAX_SUMS];
    __m512i pairs[MAX_WIDTH];
    const char *w[MAX_WIDTH];
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    for (size_t k = 0, at = 0; k < num_k; k += 2, at += VECTOR, x += R * sizeof(int32_t)) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) pairs[b] = _mm512_loadu_si512(w[b] + at);
        fetch(R, B, w, at, VECTOR);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                dot(B, &sums[r * B + b], pairs[b], x + r * sizeof(int32_t));
            }
        }
    }
    store_sums(R, B, sums, acc, acc_stride, acc_block, adds);
}

#define TILE(R, B)                                                                                 \
    static void dot_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,      \
                              const char *w, size_t block_stride, size_t num_k, int adds,          \
                              share_t next) {                                                      \
        (void)next;                                                                                \
        run_dot(R, B, acc, acc_stride, acc_block, x, w, block_stride, num_k, adds);                \
    }
ALL_SHAPES(TILE)

tile_fn tile_bf16_dot(size_t rows, size_t blocks) {
#define ENTRY(R, B) [R][B] = dot_##R##x##B,
    static const tile_fn tiles[MAX_TILE_ROWS + 1][MAX_WIDTH + 1] = {ALL_SHAPES(ENTRY)};
    return tiles[rows][blocks];
}

END_SIMD
#endif
