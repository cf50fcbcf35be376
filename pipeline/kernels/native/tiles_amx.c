/* Tiles of a product in int8 by AMX, which multiplies 16 rows' 32 inputs by those of 16 outputs at
 * once: the exact sums that tiles_i8.c has, scaled into the same float sums in the same order.
 *
 * Packed weights are what it takes; of rows it wants a group's inputs side by side. Sums come through
 * memory, so that some are scaled while others are multiplied.
 */
#define EXTRA_TARGET ",amx-tile,amx-int8"
#include "tiles.h"

#if defined(LEVEL_AVX512) && defined(VEILPIPE_AMX)

#include <string.h>

/* How many rows each of the eight tiles has, and bytes a row. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} shapes_t;

void open_tiles(size_t rows) {
    shapes_t shapes = {.palette = 1};
    for (int i = 0; i < 6; i++) { /* four of sums, two of levels */
        shapes.row_bytes[i] = i < 4 ? VECTOR : GROUP;
        shapes.rows[i] = (uint8_t)rows;
    }
    for (int i = 6; i < 8; i++) { /* of weights */
        shapes.row_bytes[i] = VECTOR;
        shapes.rows[i] = GROUP / 4;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

void close_tiles(void) { __asm__ volatile("tilerelease"); }

/* The exact sums of 64 inputs, in two groups; those of a tile with a row less have one too many. */
typedef struct {
    _Alignas(VECTOR) int32_t of[SUPER / GROUP][MAX_TILE_ROWS][BLOCK];
} exact_t;

/* Compilers' own functions do not all say that these read memory. */
#define LOAD_TILE(TILE, from, stride)                                                              \
    __asm__ volatile("tileloadd (%0, %1), %%tmm" #TILE                                             \
                     :                                                                             \
                     : "r"(from), "r"((size_t)(stride))                                            \
                     : "memory")
#define STORE_TILE(TILE, to)                                                                       \
    __asm__ volatile("tilestored %%tmm" #TILE ", (%0, %1)"                                         \
                     :                                                                             \
                     : "r"(to), "r"((size_t)VECTOR)                                                \
                     : "memory")
#define MULTIPLY(SUMS, LEVELS_OF, WEIGHTS)                                                         \
    __asm__ volatile("tilezero %tmm" #SUMS "\n\t"                                                  \
                     "tdpbsud %tmm" #WEIGHTS ", %tmm" #LEVELS_OF ", %tmm" #SUMS)

/* Into sums 0 and 1 or 2 and 3, by turns: none waits for those before to be stored. */
INLINE void multiply(size_t is_odd, const super_t *w) {
    LOAD_TILE(6, w->weights, VECTOR);
    LOAD_TILE(7, w->weights[GROUP / 4], VECTOR);
    if (is_odd) {
        MULTIPLY(2, 4, 6);
        MULTIPLY(3, 5, 7);
    } else {
        MULTIPLY(0, 4, 6);
        MULTIPLY(1, 5, 7);
    }
}

INLINE void store_exact(size_t is_odd, exact_t *exact) {
    if (is_odd) {
        STORE_TILE(2, exact->of[0]);
        STORE_TILE(3, exact->of[1]);
    } else {
        STORE_TILE(0, exact->of[0]);
        STORE_TILE(1, exact->of[1]);
    }
}

/* 64 inputs of a tile's rows and of a block; where their sums are. */
typedef struct {
    const char *x;
    const super_t *w;
    float *acc;
} piece_t;

INLINE void settle(const int R, const int B, piece_t piece, const exact_t *exact) {
    f32x16 sums[MAX_TILE_ROWS];
    const float *scales = (const float *)(piece.x + LEVELS * R);
    const int32_t *starts = (const int32_t *)(piece.x + (LEVELS + SCALES) * R);
    load_sums(R, 1, sums, piece.acc, B * BLOCK, BLOCK);
#pragma GCC unroll 2
    for (int group = 0; group < SUPER / GROUP; group++, scales += R, starts += R) {
        f32x16 of_weights = f_of_bits(i_shl(i_load_words(piece.w->scales[group]), 16));
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            i32x16 whole = i_add(i_load(exact->of[group][r]), i_set1(starts[r]));
            f32x16 scale = f_mul(of_weights, f_set1(scales[r]));
            sums[r] = f_fma(f_of_i(whole), scale, sums[r]);
        }
    }
    store_sums(R, 1, sums, piece.acc, B * BLOCK, BLOCK, 0);
}

INLINE void fetch_lines(const share_t *next, size_t block) {
    const char *from = next->from + block * next->stride;
    for (size_t done = 0; done < next->step; done += VECTOR) fetch_far(from + done);
}

/* All blocks' sums of 64 inputs before those of the next: rows are loaded once for all of them. While
 * some are multiplied and those before them stored, those before these are settled. */
INLINE void run_amx(const int R, const int B, float *acc, const char *x, const char *w,
                    size_t block_stride, size_t num_supers, share_t next) {
    exact_t exact[2];
    piece_t pieces[2];
    size_t turn = 0;
    for (size_t k = 0; k < num_supers; k++, x += R * (LEVELS + SCALES + STARTS)) {
        LOAD_TILE(4, x, GROUP);
        LOAD_TILE(5, x + R * GROUP, GROUP);
        for (size_t b = 0; b < (size_t)B; b++, turn++) {
            size_t is_odd = turn & 1;
            piece_t piece = {x, (const super_t *)(w + b * block_stride) + k, acc + b * BLOCK};
            multiply(is_odd, piece.w);
            fetch_lines(&next, b);
            if (turn > 1) settle(R, B, pieces[is_odd], &exact[is_odd]);
            store_exact(is_odd, &exact[is_odd]);
            pieces[is_odd] = piece;
        }
        next.from += next.step;
    }
    if (turn > 1) settle(R, B, pieces[turn & 1], &exact[turn & 1]);
    settle(R, B, pieces[~turn & 1], &exact[~turn & 1]);
}

#define TILE(R, B)                                                                                 \
    static void amx_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,      \
                              const char *w, size_t block_stride, size_t num_k, int adds,          \
                              share_t next) {                                                      \
        (void)acc_stride, (void)acc_block; /* B blocks lie side by side */                         \
        if (!adds) memset(acc, 0, R * B * BLOCK * sizeof *acc);                                    \
        run_amx(R, B, acc, x, w, block_stride, num_k, next);                                       \
    }
#define ENTRY(R, B) [R][B] = amx_##R##x##B,
#define WIDTHS(DO, R) DO(R, 1) DO(R, 2) DO(R, 4)
/* MIN_AMX_ROWS and more are tiles of at least 11. */
#define AMX_SHAPES(DO)                                                                             \
    WIDTHS(DO, 11) WIDTHS(DO, 12) WIDTHS(DO, 13) WIDTHS(DO, 14) WIDTHS(DO, 15) WIDTHS(DO, 16)
AMX_SHAPES(TILE)

tile_fn tile_amx(size_t rows, size_t blocks) {
    static const tile_fn tiles[MAX_TILE_ROWS + 1][MAX_AMX_WIDTH + 1] = {AMX_SHAPES(ENTRY)};
    return tiles[rows][blocks];
}

END_SIMD
#endif
