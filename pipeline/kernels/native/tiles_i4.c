/* Tiles of a product in int4: exact integer sums over 32 inputs, as in int8, each less what the zero
 * adds and then scaled into a float sum.
 *
 * A byte of weights has two, unsigned as vpdpbusd wants one of its operands. One tile takes them
 * apart as they come. Many tiles, which multiply by the same weights, have that done once for all.
 */
#define EXTRA_TARGET ",avx512vnni"
#include "tiles.h"

#if defined(VEILPIPE_SIMD)

/* What one tile makes of a super4_t as it goes along. */
typedef struct {
    float scales[SUPER / GROUP][BLOCK], zeros[SUPER / GROUP][BLOCK];
    uint8_t weights[SUPER / 4][BLOCK][4];
} wide_t;
_Static_assert(sizeof(wide_t) == WIDE_SUPER, "kernels.h says how long it is");

void sum_rows(const float *x, size_t num_in, size_t rows, void *panel) {
    quantise_rows(x, num_in, rows, panel);
    char *super = panel;
    for (size_t k = 0; k < num_in; k += SUPER, super += (LEVELS + SCALES + STARTS) * rows) {
        char *sums = super + (LEVELS + SCALES) * rows;
        for (size_t i = 0; i < SUPER / GROUP * rows; i++, sums += sizeof(float)) {
            int32_t start;
            __builtin_memcpy(&start, sums, sizeof start);
            float sum = (float)start / -128;
            __builtin_memcpy(sums, &sum, sizeof sum);
        }
    }
}

/* The n-th 64 bytes of a group: quads n below and n + 4 above. */
INLINE void split(const super4_t *super, int group, int n, i32x16 *below, i32x16 *above) {
    const i32x16 mask = i_set1(0x0f0f0f0f);
    i32x16 both = i_load(super->weights[group][n]);
    *below = i_and(both, mask);
    *above = i_and(i_shr(both, 4), mask);
}

void widen_i4(const char *w, size_t num_supers, void *wide) {
    const super4_t *super = (const super4_t *)w;
    wide_t *to = wide;
    for (size_t i = 0; i < num_supers; i++, super++, to++) {
        for (int group = 0; group < SUPER / GROUP; group++) {
            f_store(to->scales[group], f_load_halves(super->scales[group]));
            f_store(to->zeros[group], f_load_halves(super->zeros[group]));
            for (int n = 0; n < GROUP / 8; n++) {
                i32x16 below, above;
                split(super, group, n, &below, &above);
                i_store(to->weights[group * GROUP / 4 + n], below);
                i_store(to->weights[group * GROUP / 4 + GROUP / 8 + n], above);
            }
        }
    }
}

/* A group of a super: of rows, and of each block's weights, wide or not. */
typedef struct {
    const char *x;
    const char *w[MAX_I8_WIDTH];
    int index;
} nibbles_t;

INLINE nibbles_t nibbles_of(const int B, const char *x, const char *const *w, size_t offset,
                            int index) {
    nibbles_t group = {.x = x, .index = index};
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) group.w[b] = w[b] + offset;
    return group;
}

/* Row r's exact sums of a group, less the zeros' and scaled, into its float sums. */
INLINE void settle_nibbles(const int WIDE, const int R, const int B, const int r, f32x16 *sums,
                           const i32x16 *exact, nibbles_t group) {
    const float *scales = (const float *)(group.x + LEVELS * R) + group.index * R;
    const float *row_sums = (const float *)(group.x + (LEVELS + SCALES) * R) + group.index * R;
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        const wide_t *wide = (const wide_t *)group.w[b];
        const super4_t *super = (const super4_t *)group.w[b];
        f32x16 scale = WIDE ? f_load(wide->scales[group.index])
                            : f_load_halves(super->scales[group.index]);
        f32x16 zero = WIDE ? f_load(wide->zeros[group.index])
                           : f_load_halves(super->zeros[group.index]);
        f32x16 sum = f_fnma(zero, f_set1(row_sums[r]),
                                      f_of_i(exact[r * B + b]));
        scale = f_mul(scale, f_set1(scales[r]));
        sums[r * B + b] = f_fma(sum, scale, sums[r * B + b]);
    }
}

INLINE void load_nibbles(const int WIDE, const int B, const nibbles_t *group, const int n,
                         i32x16 *below, i32x16 *above) {
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        if (WIDE) {
            const wide_t *wide = (const wide_t *)group->w[b];
            below[b] = i_load(wide->weights[group->index * GROUP / 4 + n]);
            above[b] = i_load(wide->weights[group->index * GROUP / 4 + GROUP / 8 + n]);
        } else {
            split((const super4_t *)group->w[b], group->index, n, &below[b], &above[b]);
        }
    }
}

INLINE void fetch_nibbles(const int WIDE, const int R, const int B, const nibbles_t *group,
                          const int n, share_t *next) {
    /* what is wide lies in the caches */
    fetch_next(R, WIDE ? 0 : B, group->w, sizeof(super4_t), group->index, n, next);
}

#if defined(LEVEL_AVX512)

/* exact += weights * the rows' levels of a quad. */
INLINE void dot(const int R, const int B, i32x16 *exact, const i32x16 *weights,
                const int32_t *levels) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            /* compilers would load each level into a register of its own */
            __asm__("vpdpbusd %2%{1to16%}, %1, %0"
                    : "+v"(exact[r * B + b])
                    : "v"(weights[b]), "m"(levels[r]));
        }
    }
}

/* A group's exact sums. Between its products those of the group before are settled row by row
 * (`sums` is NULL where there is none): nothing waits for the last product of a sum. */
INLINE void multiply_nibbles(const int WIDE, const int R, const int B, i32x16 *exact,
                             nibbles_t group, f32x16 *sums, const i32x16 *exact_before,
                             nibbles_t before, share_t *next) {
    const int32_t *levels = (const int32_t *)group.x + group.index * GROUP / 4 * R;
    fetch_nibbles(WIDE, R, B, &group, 0, next);
#pragma GCC unroll 8
    for (int i = 0; i < R * B; i++) exact[i] = i_zero();
#pragma GCC unroll 4
    for (int n = 0; n < GROUP / 8; n++) {
        i32x16 below[MAX_I8_WIDTH], above[MAX_I8_WIDTH];
        load_nibbles(WIDE, B, &group, n, below, above);
        fetch_nibbles(WIDE, R, B, &group, n + 1, next);
        dot(R, B, exact, below, levels + n * R);
        dot(R, B, exact, above, levels + (GROUP / 8 + n) * R);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (sums && r * (GROUP / 8) / R == n) {
                settle_nibbles(WIDE, R, B, r, sums, exact_before, before);
            }
        }
        __asm__ volatile("" ::: "memory"); /* in this order */
    }
}

INLINE void run_i4(const int WIDE, const int R, const int B, float *acc, size_t acc_stride,
                   size_t acc_block, const char *x, const char *w_base, size_t block_stride,
                   size_t num_supers, int adds, share_t next) {
    enum { X_STEP = LEVELS + SCALES + STARTS };
    const size_t step = WIDE ? sizeof(wide_t) : sizeof(super4_t);
    f32x16 sums[MAX_I8_SUMS];
    i32x16 even[MAX_I8_SUMS], odd[MAX_I8_SUMS];
    const char *w[MAX_I8_WIDTH];
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    if (adds) load_sums(R, B, sums, acc, acc_stride, acc_block);
    multiply_nibbles(WIDE, R, B, even, nibbles_of(B, x, w, 0, 0), NULL, NULL,
                     nibbles_of(B, x, w, 0, 0), &next);
    for (size_t k = 1; k < num_supers; k++, x += R * X_STEP) {
        multiply_nibbles(WIDE, R, B, odd, nibbles_of(B, x, w, 0, 1), sums, even,
                         nibbles_of(B, x, w, 0, 0), &next);
        multiply_nibbles(WIDE, R, B, even, nibbles_of(B, x + R * X_STEP, w, step, 0), sums, odd,
                         nibbles_of(B, x, w, 0, 1), &next);
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            w[b] += step;
            __asm__("" : "+r"(w[b]));
        }
    }
    multiply_nibbles(WIDE, R, B, odd, nibbles_of(B, x, w, 0, 1), sums, even,
                     nibbles_of(B, x, w, 0, 0), &next);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) settle_nibbles(WIDE, R, B, r, sums, odd, nibbles_of(B, x, w, 0, 1));
    store_sums(R, B, sums, acc, acc_stride, acc_block, 0);
}

#define RUN_I4(HAS_DOT, ...) run_i4(__VA_ARGS__)

#else

/* With fewer registers: a group's exact sums, and then its float sums, through memory. */
INLINE void run_nibbles(const int HAS_DOT, const int WIDE, const int R, const int B, f32x16 *sums,
                        nibbles_t group, share_t *next) {
    i32x16 exact[MAX_I8_SUMS];
    const int32_t *levels = (const int32_t *)group.x + group.index * GROUP / 4 * R;
    fetch_nibbles(WIDE, R, B, &group, 0, next);
#pragma GCC unroll 4
    for (int i = 0; i < R * B; i++) exact[i] = i_zero();
#pragma GCC unroll 4
    for (int n = 0; n < GROUP / 8; n++) {
        i32x16 below[MAX_I8_WIDTH], above[MAX_I8_WIDTH];
        load_nibbles(WIDE, B, &group, n, below, above);
        fetch_nibbles(WIDE, R, B, &group, n + 1, next);
#pragma GCC unroll 4
        for (int i = 0; i < R * B; i++) {
            const int32_t *row = levels + n * R + i / B;
            exact[i] = i_dot(HAS_DOT, exact[i], small_bytes(below[i % B]), row);
            exact[i] = i_dot(HAS_DOT, exact[i], small_bytes(above[i % B]), row + GROUP / 8 * R);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) settle_nibbles(WIDE, R, B, r, sums, exact, group);
}

INLINE void run_i4(const int HAS_DOT, const int WIDE, const int R, const int B, float *acc,
                   size_t acc_stride, size_t acc_block, const char *x, const char *w_base,
                   size_t block_stride, size_t num_supers, int adds, share_t next) {
    const size_t step = WIDE ? sizeof(wide_t) : sizeof(super4_t);
    f32x16 sums[MAX_I8_SUMS];
    const char *w[MAX_I8_WIDTH];
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    if (adds) load_sums(R, B, sums, acc, acc_stride, acc_block);
    for (size_t k = 0; k < num_supers; k++, x += R * (LEVELS + SCALES + STARTS)) {
        run_nibbles(HAS_DOT, WIDE, R, B, sums, nibbles_of(B, x, w, k * step, 0), &next);
        run_nibbles(HAS_DOT, WIDE, R, B, sums, nibbles_of(B, x, w, k * step, 1), &next);
    }
    store_sums(R, B, sums, acc, acc_stride, acc_block, 0);
}

#define RUN_I4(HAS_DOT, ...) run_i4(HAS_DOT, __VA_ARGS__)

#endif

/* One for each way of multiplying that a level has, and for weights as they are or widened. */
#define I4_TILE_OF(HAS_DOT, WIDE, R, B)                                                            \
    static void i4_##HAS_DOT##WIDE##_##R##x##B(                                                    \
        float *acc, size_t acc_stride, size_t acc_block, const char *x, const char *w,             \
        size_t block_stride, size_t num_k, int adds, share_t next) {                               \
        RUN_I4(HAS_DOT, WIDE, R, B, acc, acc_stride, acc_block, x, w, block_stride, num_k, adds,   \
               next);                                                                              \
    }
#define I4_ENTRY_OF(HAS_DOT, WIDE, R, B) [R][B] = i4_##HAS_DOT##WIDE##_##R##x##B,
#define I4_PLAIN_TILE(R, B) I4_TILE_OF(0, 0, R, B)
#define I4_PLAIN_ENTRY(R, B) I4_ENTRY_OF(0, 0, R, B)
#define I4_WIDE_TILE(R, B) I4_TILE_OF(0, 1, R, B)
#define I4_WIDE_ENTRY(R, B) I4_ENTRY_OF(0, 1, R, B)
I8_SHAPES(I4_PLAIN_TILE)
I4_WIDE_SHAPES(I4_WIDE_TILE)
#if !defined(LEVEL_AVX512)
#define I4_DOT_TILE(R, B) I4_TILE_OF(1, 0, R, B)
#define I4_DOT_ENTRY(R, B) I4_ENTRY_OF(1, 0, R, B)
#define I4_WIDE_DOT_TILE(R, B) I4_TILE_OF(1, 1, R, B)
#define I4_WIDE_DOT_ENTRY(R, B) I4_ENTRY_OF(1, 1, R, B)
I8_SHAPES(I4_DOT_TILE)
I4_WIDE_SHAPES(I4_WIDE_DOT_TILE)
#endif

typedef tile_fn shapes_t[MAX_I8_SUMS + 1][MAX_I8_WIDTH + 1];

tile_fn tile_i4(size_t rows, size_t blocks) {
    static const shapes_t tiles[] = {
        {I8_SHAPES(I4_PLAIN_ENTRY)},
#if !defined(LEVEL_AVX512)
        {I8_SHAPES(I4_DOT_ENTRY)},
#endif
    };
    return tiles[has_byte_dot][rows][blocks];
}

/* Of blocks that are wide: more rows than one tile has are tiles of at least half as many. */
tile_fn tile_wide_i4(size_t rows, size_t blocks) {
    static const shapes_t tiles[] = {
        {I4_WIDE_SHAPES(I4_WIDE_ENTRY)},
#if !defined(LEVEL_AVX512)
        {I4_WIDE_SHAPES(I4_WIDE_DOT_ENTRY)},
#endif
    };
    return tiles[has_byte_dot][rows][blocks];
}

END_SIMD
#endif
