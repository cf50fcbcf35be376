/* Tiles of a product in int8: exact integer sums over 32 inputs, each scaled into a float sum.
 *
 * vpdpbusd multiplies unsigned by signed bytes, so weights carry + 128; each sum starts at what
 * undoes it, -128 times the sum of the row's 32 inputs. Where that is missing, weights lose it.
 */
#define EXTRA_TARGET ",avx512vnni"
#include "tiles.h"

#if defined(VEILPIPE_SIMD)

size_t quantised_bytes(size_t num_in) {
    return (num_in + SUPER - 1) / SUPER * (LEVELS + SCALES + STARTS);
}

INLINE void quantise_group(f32x16 low, f32x16 high, char *super, size_t rows, size_t row,
                           size_t group) {
    float greatest = f_greatest(f_max(f_abs(low), f_abs(high)));
    /* a maximum may pass over what is not a number, and then the result would look like one */
    if (f_unordered(low, high)) greatest = __builtin_nanf("");
    float inverse = greatest >= SMALLEST_SCALE ? 127.0f / greatest : 0.0f;
    i32x16 a = i_of_f(f_mul(low, f_set1(inverse)));
    i32x16 b = i_of_f(f_mul(high, f_set1(inverse)));
    int32_t quads[GROUP / 4];
    i_store_saturated_bytes(quads, a);
    i_store_saturated_bytes(quads + 4, b);
    int32_t *levels = (int32_t *)super + group * GROUP / 4 * rows + row;
    for (size_t i = 0; i < GROUP / 4; i++) levels[i * rows] = quads[i];
    float *scales = (float *)(super + LEVELS * rows);
    scales[group * rows + row] = greatest / 127.0f;
    int32_t *starts = (int32_t *)(super + (LEVELS + SCALES) * rows);
    uint32_t sum = (uint32_t)i_sum(i_add(a, b));
    starts[group * rows + row] = (int32_t)(-128u * sum); /* unsigned: infinities' levels wrap */
}

void quantise_rows(const float *x, size_t num_in, size_t rows, void *panel) {
    char *super = panel;
    for (size_t k = 0; k < (num_in + SUPER - 1) / SUPER * SUPER; k += GROUP) {
        size_t left = num_in > k ? num_in - k : 0;
        mask16 low = lanes(left), high = lanes(left > 16 ? left - 16 : 0);
        for (size_t row = 0; row < rows; row++) {
            const float *from = x + row * num_in + k;
            quantise_group(f_load_some(low, from),
                           f_load_some(high, from + 16), super, rows, row,
                           k % SUPER / GROUP);
        }
        if (k % SUPER) super += (LEVELS + SCALES + STARTS) * rows;
    }
}

INLINE f32x16 scales_of(const super_t *super, int group) {
    return f_of_bits(i_shl(i_load_words(super->scales[group]), 16));
}

/* A group of a super: of rows, and of each block's weights. */
typedef struct {
    const char *x;
    const super_t *w[MAX_I8_WIDTH];
    int index;
} group_t;

INLINE group_t group_of(const int B, const char *x, const super_t *const *w, size_t super,
                        int index) {
    group_t group = {.x = x, .index = index};
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) group.w[b] = w[b] + super;
    return group;
}

/* Row r's exact sums of a group, scaled, into its float sums. */
INLINE void settle_row(const int R, const int B, const int r, f32x16 *sums, const i32x16 *exact,
                       group_t group) {
    const float *scales = (const float *)(group.x + LEVELS * R) + group.index * R;
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        f32x16 of_weights = scales_of(group.w[b], group.index);
        f32x16 scale = f_mul(of_weights, f_set1(scales[r]));
        sums[r * B + b] = f_fma(f_of_i(exact[r * B + b]), scale, sums[r * B + b]);
    }
}

INLINE void fetch_group(const int R, const int B, const group_t *group, const int n,
                        share_t *next) {
    fetch_next(R, B, (const char *const *)group->w, sizeof(super_t), group->index, n, next);
}

#if defined(LEVEL_AVX512)

/* A group's exact sums. Between its products those of the group before are settled row by row
 * (`sums` is NULL where there is none): nothing waits for the last product of a sum. */
INLINE void multiply_group(const int R, const int B, i32x16 *exact, group_t group, f32x16 *sums,
                           const i32x16 *exact_before, group_t before, share_t *next) {
    i32x16 wide[MAX_I8_WIDTH];
    const int32_t *levels = (const int32_t *)group.x + group.index * GROUP / 4 * R;
    const int32_t *starts = (const int32_t *)(group.x + (LEVELS + SCALES) * R) + group.index * R;
    fetch_group(R, B, &group, 0, next);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) exact[r * B + b] = i_set1(starts[r]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < GROUP / 4; k++) {
        const int at = group.index * GROUP / 4 + k;
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            wide[b] = i_load(group.w[b]->weights[at]);
            if (R >= FETCHING_ROWS) fetch_near((group.w[b] + 1)->weights[at]);
        }
        fetch_group(R, B, &group, k + 1, next);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) {
                /* compilers would load each level into a register of its own */
                __asm__("vpdpbusd %2%{1to16%}, %1, %0"
                        : "+v"(exact[r * B + b])
                        : "v"(wide[b]), "m"(levels[k * R + r]));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (sums && r * GROUP / 4 / R == k) settle_row(R, B, r, sums, exact_before, before);
        }
        __asm__ volatile("" ::: "memory"); /* in this order */
    }
}

INLINE void run_i8(const int R, const int B, float *acc, size_t acc_stride, size_t acc_block,
                   const char *x, const char *w_base, size_t block_stride, size_t num_supers,
                   int adds, share_t next) {
    enum { STEP = LEVELS + SCALES + STARTS };
    f32x16 sums[MAX_I8_SUMS];
    i32x16 even[MAX_I8_SUMS], odd[MAX_I8_SUMS];
    const super_t *w[MAX_I8_WIDTH];
    spread((const char **)w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    if (adds) load_sums(R, B, sums, acc, acc_stride, acc_block);
    multiply_group(R, B, even, group_of(B, x, w, 0, 0), NULL, NULL, group_of(B, x, w, 0, 0),
                   &next);
    for (size_t k = 1; k < num_supers; k++, x += R * STEP) {
        multiply_group(R, B, odd, group_of(B, x, w, 0, 1), sums, even, group_of(B, x, w, 0, 0),
                       &next);
        multiply_group(R, B, even, group_of(B, x + R * STEP, w, 1, 0), sums, odd,
                       group_of(B, x, w, 0, 1), &next);
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            w[b]++;
            __asm__("" : "+r"(w[b]));
        }
    }
    multiply_group(R, B, odd, group_of(B, x, w, 0, 1), sums, even, group_of(B, x, w, 0, 0), &next);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) settle_row(R, B, r, sums, odd, group_of(B, x, w, 0, 1));
    store_sums(R, B, sums, acc, acc_stride, acc_block, 0);
}

#define TILE(R, B)                                                                                 \
    static void i8_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,       \
                             const char *w, size_t block_stride, size_t num_k, int adds,           \
                             share_t next) {                                                       \
        run_i8(R, B, acc, acc_stride, acc_block, x, w, block_stride, num_k, adds, next);           \
    }
I8_SHAPES(TILE)

tile_fn tile_i8(size_t rows, size_t blocks) {
#define ENTRY(R, B) [R][B] = i8_##R##x##B,
    static const tile_fn tiles[MAX_I8_SUMS + 1][MAX_I8_WIDTH + 1] = {I8_SHAPES(ENTRY)};
    return tiles[rows][blocks];
}

#else

/* With fewer registers: a group's exact sums, and then its float sums, through memory. */
INLINE void run_group(const int HAS_DOT, const int R, const int B, f32x16 *sums, group_t group,
                      share_t *next) {
    i32x16 exact[MAX_I8_SUMS];
    const int32_t *levels = (const int32_t *)group.x + group.index * GROUP / 4 * R;
    const int32_t *starts = (const int32_t *)(group.x + (LEVELS + SCALES) * R) + group.index * R;
    fetch_group(R, B, &group, 0, next);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) exact[r * B + b] = HAS_DOT ? i_set1(starts[r]) : i_zero();
    }
#pragma GCC unroll 8
    for (int k = 0; k < GROUP / 4; k++) {
        const int at = group.index * GROUP / 4 + k;
        fetch_group(R, B, &group, k + 1, next);
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            bytes_t weights = bytes_of(HAS_DOT, group.w[b]->weights[at]);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                exact[r * B + b] = i_dot(HAS_DOT, exact[r * B + b], weights, levels + k * R + r);
            }
        }
        __asm__ volatile("" ::: "memory"); /* in this order */
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) settle_row(R, B, r, sums, exact, group);
}

INLINE void run_i8(const int HAS_DOT, const int R, const int B, float *acc, size_t acc_stride,
                   size_t acc_block, const char *x, const char *w_base, size_t block_stride,
                   size_t num_supers, int adds, share_t next) {
    f32x16 sums[MAX_I8_SUMS];
    const super_t *w[MAX_I8_WIDTH];
    spread((const char **)w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    if (adds) load_sums(R, B, sums, acc, acc_stride, acc_block);
    for (size_t k = 0; k < num_supers; k++, x += R * (LEVELS + SCALES + STARTS)) {
        run_group(HAS_DOT, R, B, sums, group_of(B, x, w, k, 0), &next);
        run_group(HAS_DOT, R, B, sums, group_of(B, x, w, k, 1), &next);
    }
    store_sums(R, B, sums, acc, acc_stride, acc_block, 0);
}

#define TILE(NAME, HAS_DOT, R, B)                                                                  \
    static void NAME##_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,   \
                                 const char *w, size_t block_stride, size_t num_k, int adds,       \
                                 share_t next) {                                                   \
        run_i8(HAS_DOT, R, B, acc, acc_stride, acc_block, x, w, block_stride, num_k, adds, next);  \
    }
#define PLAIN(R, B) TILE(plain, 0, R, B)
#define DOT(R, B) TILE(dot, 1, R, B)
I8_SHAPES(PLAIN)
I8_SHAPES(DOT)

tile_fn tile_i8(size_t rows, size_t blocks) {
#define PLAIN_ENTRY(R, B) [R][B] = plain_##R##x##B,
#define DOT_ENTRY(R, B) [R][B] = dot_##R##x##B,
    static const tile_fn tiles[2][MAX_I8_SUMS + 1][MAX_I8_WIDTH + 1] = {
        {I8_SHAPES(PLAIN_ENTRY)},
        {I8_SHAPES(DOT_ENTRY)},
    };
    return tiles[has_byte_dot][rows][blocks];
}

#endif
#undef TILE

END_SIMD
#endif
