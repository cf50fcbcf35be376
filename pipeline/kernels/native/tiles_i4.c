/* Tiles of a product in int4: exact integer sums over 32 inputs, as in int8, each less what the zero
 * adds and then scaled into a float sum.
 *
 * A byte of weights has two, unsigned as vpdpbusd wants one of its operands. One tile takes them
 * apart as they come. Many tiles, which multiply by the same weights, have that done once for all.
 */
#define EXTRA_TARGET ",avx512vnni"
#include "tiles.h"

#if defined(VEILPIPE_X86)

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

INLINE __m512 of_halves(const uint16_t *halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}

/* The n-th 64 bytes of a group: quads n below and n + 4 above. */
INLINE void split(const super4_t *super, int group, int n, __m512i *below, __m512i *above) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i both = _mm512_loadu_si512(super->weights[group][n]);
    *below = _mm512_and_si512(both, mask);
    *above = _mm512_and_si512(_mm512_srli_epi32(both, 4), mask);
}

void widen_i4(const char *w, size_t num_supers, void *wide) {
    const super4_t *super = (const super4_t *)w;
    wide_t *to = wide;
    for (size_t i = 0; i < num_supers; i++, super++, to++) {
        for (int group = 0; group < SUPER / GROUP; group++) {
            _mm512_storeu_ps(to->scales[group], of_halves(super->scales[group]));
            _mm512_storeu_ps(to->zeros[group], of_halves(super->zeros[group]));
            for (int n = 0; n < GROUP / 8; n++) {
                __m512i below, above;
                split(super, group, n, &below, &above);
                _mm512_storeu_si512(to->weights[group * GROUP / 4 + n], below);
                _mm512_storeu_si512(to->weights[group * GROUP / 4 + GROUP / 8 + n], above);
            }
        }
    }
}

/* As in tiles_i8.c: many rows keep the core busy while the next weights come. */
enum { FETCHING_ROWS = 5 };

/* A group of a super: of rows, and of each block's weights, wide or not. */
typedef struct {
    const char *x;
    const char *w[MAX_I8_WIDTH];
    int index;
} group_t;

INLINE group_t group_of(const int B, const char *x, const char *const *w, size_t offset,
                        int index) {
    group_t group = {.x = x, .index = index};
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) group.w[b] = w[b] + offset;
    return group;
}

/* Row r's exact sums of a group, less the zeros' and scaled, into its float sums. */
INLINE void settle_row(const int WIDE, const int R, const int B, const int r, __m512 *sums,
                       const __m512i *exact, group_t group) {
    const float *scales = (const float *)(group.x + LEVELS * R) + group.index * R;
    const float *row_sums = (const float *)(group.x + (LEVELS + SCALES) * R) + group.index * R;
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        const wide_t *wide = (const wide_t *)group.w[b];
        const super4_t *super = (const super4_t *)group.w[b];
        __m512 scale = WIDE ? _mm512_loadu_ps(wide->scales[group.index])
                            : of_halves(super->scales[group.index]);
        __m512 zero = WIDE ? _mm512_loadu_ps(wide->zeros[group.index])
                           : of_halves(super->zeros[group.index]);
        __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(row_sums[r]),
                                      _mm512_cvtepi32_ps(exact[r * B + b]));
        scale = _mm512_mul_ps(scale, _mm512_set1_ps(scales[r]));
        sums[r * B + b] = _mm512_fmadd_ps(sum, scale, sums[r * B + b]);
    }
}

INLINE void fetch_share(const int R, share_t *next) {
    if (R < FETCHING_ROWS) return;
    _mm_prefetch(next->from, _MM_HINT_T1);
    next->from += next->step;
}

INLINE void load_quads(const int WIDE, const int B, const group_t *group, const int n,
                       __m512i *below, __m512i *above) {
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        if (WIDE) {
            const wide_t *wide = (const wide_t *)group->w[b];
            below[b] = _mm512_loadu_si512(wide->weights[group->index * GROUP / 4 + n]);
            above[b] = _mm512_loadu_si512(wide->weights[group->index * GROUP / 4 + GROUP / 8 + n]);
        } else {
            split((const super4_t *)group->w[b], group->index, n, &below[b], &above[b]);
        }
    }
}

/* exact += weights * the rows' levels of a quad. */
INLINE void dot(const int R, const int B, __m512i *exact, const __m512i *weights,
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
INLINE void multiply_group(const int WIDE, const int R, const int B, __m512i *exact, group_t group,
                           __m512 *sums, const __m512i *exact_before, group_t before,
                           share_t *next) {
    const int32_t *levels = (const int32_t *)group.x + group.index * GROUP / 4 * R;
    fetch_share(R, next);
#pragma GCC unroll 8
    for (int i = 0; i < R * B; i++) exact[i] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int n = 0; n < GROUP / 8; n++) {
        __m512i below[MAX_I8_WIDTH], above[MAX_I8_WIDTH];
        load_quads(WIDE, B, &group, n, below, above);
        fetch_share(R, next);
        dot(R, B, exact, below, levels + n * R);
        dot(R, B, exact, above, levels + (GROUP / 8 + n) * R);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (sums && r * (GROUP / 8) / R == n) {
                settle_row(WIDE, R, B, r, sums, exact_before, before);
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
    __m512 sums[MAX_I8_SUMS];
    __m512i even[MAX_I8_SUMS], odd[MAX_I8_SUMS];
    const char *w[MAX_I8_WIDTH];
    spread(w, B, w_base, block_stride);
    zero_sums(R, B, sums);
    if (adds) load_sums(R, B, sums, acc, acc_stride, acc_block);
    multiply_group(WIDE, R, B, even, group_of(B, x, w, 0, 0), NULL, NULL, group_of(B, x, w, 0, 0),
                   &next);
    for (size_t k = 1; k < num_supers; k++, x += R * X_STEP) {
        multiply_group(WIDE, R, B, odd, group_of(B, x, w, 0, 1), sums, even,
                       group_of(B, x, w, 0, 0), &next);
        multiply_group(WIDE, R, B, even, group_of(B, x + R * X_STEP, w, step, 0), sums, odd,
                       group_of(B, x, w, 0, 1), &next);
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            w[b] += step;
            __asm__("" : "+r"(w[b]));
        }
    }
    multiply_group(WIDE, R, B, odd, group_of(B, x, w, 0, 1), sums, even, group_of(B, x, w, 0, 0),
                   &next);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) settle_row(WIDE, R, B, r, sums, odd, group_of(B, x, w, 0, 1));
    store_sums(R, B, sums, acc, acc_stride, acc_block, 0);
}

#define TILE_OF(NAME, WIDE, R, B)                                                                  \
    static void NAME##_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,   \
                                 const char *w, size_t block_stride, size_t num_k, int adds,       \
                                 share_t next) {                                                   \
        run_i4(WIDE, R, B, acc, acc_stride, acc_block, x, w, block_stride, num_k, adds, next);     \
    }
#define TILE(R, B) TILE_OF(i4, 0, R, B)
#define WIDE_TILE(R, B) TILE_OF(wide_i4, 1, R, B)
#define I4_SHAPES(DO)                                                                              \
    UP_TO_2(DO, 1) UP_TO_2(DO, 2) UP_TO_2(DO, 3) UP_TO_2(DO, 4) DO(5, 1) DO(6, 1) DO(7, 1) DO(8, 1)
#define WIDE_I4_SHAPES(DO) DO(4, 1) DO(5, 1) DO(6, 1) DO(7, 1) DO(8, 1)
I4_SHAPES(TILE)
WIDE_I4_SHAPES(WIDE_TILE)

tile_fn tile_i4(size_t rows, size_t blocks) {
#define ENTRY(R, B) [R][B] = i4_##R##x##B,
    static const tile_fn tiles[MAX_I8_SUMS + 1][MAX_I8_WIDTH + 1] = {I4_SHAPES(ENTRY)};
    return tiles[rows][blocks];
}

/* Of blocks that are wide: 9 rows and more are tiles of 4 to 8. */
tile_fn tile_wide_i4(size_t rows, size_t blocks) {
#define WIDE_ENTRY(R, B) [R][B] = wide_i4_##R##x##B,
    static const tile_fn tiles[MAX_I8_SUMS + 1][MAX_I8_WIDTH + 1] = {WIDE_I4_SHAPES(WIDE_ENTRY)};
    return tiles[rows][blocks];
}

END_SIMD
#endif
