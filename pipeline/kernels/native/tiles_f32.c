/* Tiles of a product in float32: weights in float32, or in bf16 widened exactly on the way. */
#include "tiles.h"

#if defined(VEILPIPE_SIMD)

INLINE void multiply(const int R, const int B, f32x16 *sums, const char *x, const f32x16 *w) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        f32x16 xr = f_set1(((const float *)x)[r]);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sums[r * B + b] = f_fma(xr, w[b], sums[r * B + b]);
    }
}

INLINE void run_f32(const int R, const int B, float *acc, size_t acc_stride, size_t acc_block,
                    const char *x, const char *w_base, size_t block_stride, size_t num_k,
                    int adds) {
    f32x16 sums[MAX_SUMS], wide[MAX_WIDTH];
    const char *w[MAX_WIDTH];
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    for (size_t k = 0, at = 0; k < num_k; k++, at += VECTOR, x += R * sizeof(float)) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) wide[b] = f_load(w[b] + at);
        fetch(R, B, w, at, VECTOR);
        multiply(R, B, sums, x, wide);
    }
    store_sums(R, B, sums, acc, acc_stride, acc_block, adds);
}

/* Of each pair of inputs the even one is the low half, the odd one the high half of 32 bits. */
INLINE void widen(const int B, f32x16 *wide, const char *const *w, size_t at, const int is_odd) {
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
        i32x16 pair = i_load(w[b] + at);
        pair = is_odd ? i_and(pair, i_set1((int)0xffff0000))
                      : i_shl(pair, 16);
        wide[b] = f_of_bits(pair);
    }
}

INLINE void run_bf16(const int R, const int B, float *acc, size_t acc_stride, size_t acc_block,
                     const char *x, const char *w_base, size_t block_stride, size_t num_k,
                     int adds) {
    f32x16 sums[MAX_SUMS], wide[MAX_WIDTH];
    const char *w[MAX_WIDTH];
    size_t k = 0, at = 0;
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    for (; k + 1 < num_k; k += 2, at += VECTOR, x += 2 * R * sizeof(float)) {
        fetch(R, B, w, at, VECTOR);
        widen(B, wide, w, at, 0);
        multiply(R, B, sums, x, wide);
        widen(B, wide, w, at, 1);
        multiply(R, B, sums, x + R * sizeof(float), wide);
    }
    if (k < num_k) {
        widen(B, wide, w, at, 0);
        multiply(R, B, sums, x, wide);
    }
    store_sums(R, B, sums, acc, acc_stride, acc_block, adds);
}

#define TILE(KIND, R, B)                                                                           \
    static void KIND##_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,   \
                                 const char *w, size_t block_stride, size_t num_k, int adds,       \
                                 share_t next) {                                                   \
        (void)next;                                                                                \
        run_##KIND(R, B, acc, acc_stride, acc_block, x, w, block_stride, num_k, adds);             \
    }
#define F32(R, B) TILE(f32, R, B)
#define BF16(R, B) TILE(bf16, R, B)
ALL_SHAPES(F32)
ALL_SHAPES(BF16)
#undef TILE

tile_fn tile_f32(size_t rows, size_t blocks) {
#define F32_ENTRY(R, B) [R][B] = f32_##R##x##B,
    static const tile_fn tiles[MAX_TILE_ROWS + 1][MAX_WIDTH + 1] = {ALL_SHAPES(F32_ENTRY)};
    return tiles[rows][blocks];
}

tile_fn tile_bf16(size_t rows, size_t blocks) {
#define BF16_ENTRY(R, B) [R][B] = bf16_##R##x##B,
    static const tile_fn tiles[MAX_TILE_ROWS + 1][MAX_WIDTH + 1] = {ALL_SHAPES(BF16_ENTRY)};
    return tiles[rows][blocks];
}

enum { ROWS_AHEAD = 4096 }; /* bytes: of what most heads have for 16 positions, the next head's */

/* The same of rows as they lie in memory, for attention. */
INLINE void run_rows(const int IS_HALF, const int R, const int B, float *acc, size_t acc_stride, size_t acc_block,
                     const char *x_base, size_t x_stride, const char *w_base, size_t block_stride,
                     size_t k_stride, size_t num_k, int adds) {
    f32x16 sums[MAX_SUMS], wide[MAX_WIDTH];
    const char *x[MAX_ATTENTION_ROWS], *w[MAX_WIDTH];
    spread(x, R, x_base, x_stride);
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    if (adds) load_sums(R, B, sums, acc, acc_stride, acc_block);
    for (size_t k = 0, at = 0; k < num_k; k++, at += k_stride) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            wide[b] = IS_HALF ? f_load_halves(w[b] + at) : f_load(w[b] + at);
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) fetch_far(w[b] + at + ROWS_AHEAD);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            f32x16 xr = f_set1(((const float *)x[r])[k]);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                sums[r * B + b] = f_fma(xr, wide[b], sums[r * B + b]);
            }
        }
    }
    store_sums(R, B, sums, acc, acc_stride, acc_block, 0);
}

#define ROWS(NAME, IS_HALF, R, B)                                                                  \
    static void NAME##_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,   \
                                 size_t x_stride, const char *w, size_t block_stride,              \
                                 size_t k_stride, size_t num_k, int adds) {                        \
        run_rows(IS_HALF, R, B, acc, acc_stride, acc_block, x, x_stride, w, block_stride,          \
                 k_stride, num_k, adds);                                                           \
    }
#define FLOAT_ROWS(R, B) ROWS(float_rows, 0, R, B)
#define HALF_ROWS(R, B) ROWS(half_rows, 1, R, B)
ATTENTION_SHAPES(FLOAT_ROWS)
ATTENTION_SHAPES(HALF_ROWS)

rows_fn tile_rows(int is_half, size_t rows, size_t blocks) {
#define FLOAT_ENTRY(R, B) [R][B] = float_rows_##R##x##B,
#define HALF_ENTRY(R, B) [R][B] = half_rows_##R##x##B,
    static const rows_fn tiles[2][MAX_ATTENTION_ROWS + 1][5] = {
        {ATTENTION_SHAPES(FLOAT_ENTRY)},
        {ATTENTION_SHAPES(HALF_ENTRY)},
    };
    return tiles[is_half][rows][blocks];
}

void interleave(const float *x, size_t num_in, size_t rows, void *panel) {
    float *to = panel;
    for (size_t row = 0; row < rows; row++) {
        for (size_t k = 0; k < num_in; k++) to[k * rows + row] = x[row * num_in + k];
    }
}

END_SIMD
#endif
