/* Tiles of a product in int8: exact integer sums over 32 inputs, each scaled into a float sum.
 *
 * vpdpbusd multiplies unsigned by signed bytes, so weights carry + 128; each sum starts at what
 * undoes it, -128 times the sum of the row's 32 inputs.
 */
#define EXTRA_TARGET ",avx512vnni"
#include "tiles.h"

#if defined(VEILPIPE_X86)

size_t quantised_bytes(size_t num_in) {
    return (num_in + SUPER - 1) / SUPER * (LEVELS + SCALES + STARTS);
}

INLINE void quantise_group(__m512 low, __m512 high, char *super, size_t rows, size_t row,
                           size_t group) {
    float greatest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    /* a maximum may pass over what is not a number, and then the result would look like one */
    if (_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q)) greatest = __builtin_nanf("");
    float inverse = greatest >= SMALLEST_SCALE ? 127.0f / greatest : 0.0f;
    __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, _mm512_set1_ps(inverse)));
    __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(inverse)));
    int32_t quads[GROUP / 4];
    _mm_storeu_si128((__m128i *)quads, _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(quads + 4), _mm512_cvtsepi32_epi8(b));
    int32_t *levels = (int32_t *)super + group * GROUP / 4 * rows + row;
    for (size_t i = 0; i < GROUP / 4; i++) levels[i * rows] = quads[i];
    float *scales = (float *)(super + LEVELS * rows);
    scales[group * rows + row] = greatest / 127.0f;
    int32_t *starts = (int32_t *)(super + (LEVELS + SCALES) * rows);
    uint32_t sum = (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    starts[group * rows + row] = (int32_t)(-128u * sum); /* unsigned: infinities' levels wrap */
}

void quantise_rows(const float *x, size_t num_in, size_t rows, void *panel) {
    char *super = panel;
    for (size_t k = 0; k < (num_in + SUPER - 1) / SUPER * SUPER; k += GROUP) {
        size_t left = num_in > k ? num_in - k : 0;
        __mmask16 low = lanes(left), high = lanes(left > 16 ? left - 16 : 0);
        for (size_t row = 0; row < rows; row++) {
            const float *from = x + row * num_in + k;
            quantise_group(_mm512_maskz_loadu_ps(low, from),
                           _mm512_maskz_loadu_ps(high, from + 16), super, rows, row,
                           k % SUPER / GROUP);
        }
        if (k % SUPER) super += (LEVELS + SCALES + STARTS) * rows;
    }
}

INLINE __m512 scales_of(const super_t *super, int group) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)super->scales[group]);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* Many rows keep the core busy while the next weights come, a pass ahead and a part with each of its
 * tiles: all the time, not only while the first tile is computed. For few, hardware fetches faster. */
enum { FETCHING_ROWS = 5 };

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
INLINE void settle_row(const int R, const int B, const int r, __m512 *sums, const __m512i *exact,
                       group_t group) {
    const float *scales = (const float *)(group.x + LEVELS * R) + group.index * R;
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        __m512 of_weights = scales_of(group.w[b], group.index);
        __m512 scale = _mm512_mul_ps(of_weights, _mm512_set1_ps(scales[r]));
        sums[r * B + b] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r * B + b]), scale, sums[r * B + b]);
    }
}

INLINE void fetch_share(const int R, share_t *next) {
    if (R < FETCHING_ROWS) return;
    _mm_prefetch(next->from, _MM_HINT_T1);
    next->from += next->step;
}

/* A group's exact sums. Between its products those of the group before are settled row by row
 * (`sums` is NULL where there is none): nothing waits for the last product of a sum. */
INLINE void multiply_group(const int R, const int B, __m512i *exact, group_t group, __m512 *sums,
                           const __m512i *exact_before, group_t before, share_t *next) {
    __m512i wide[MAX_I8_WIDTH];
    const int32_t *levels = (const int32_t *)group.x + group.index * GROUP / 4 * R;
    const int32_t *starts = (const int32_t *)(group.x + (LEVELS + SCALES) * R) + group.index * R;
    fetch_share(R, next);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) exact[r * B + b] = _mm512_set1_epi32(starts[r]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < GROUP / 4; k++) {
        const int at = group.index * GROUP / 4 + k;
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            wide[b] = _mm512_loadu_si512(group.w[b]->weights[at]);
            if (R >= FETCHING_ROWS) _mm_prefetch((group.w[b] + 1)->weights[at], _MM_HINT_T0);
        }
        fetch_share(R, next);
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
    __m512 sums[MAX_I8_SUMS];
    __m512i even[MAX_I8_SUMS], odd[MAX_I8_SUMS];
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
#define I8_SHAPES(DO)                                                                              \
    UP_TO_2(DO, 1) UP_TO_2(DO, 2) UP_TO_2(DO, 3) UP_TO_2(DO, 4) DO(5, 1) DO(6, 1) DO(7, 1) DO(8, 1)
I8_SHAPES(TILE)

tile_fn tile_i8(size_t rows, size_t blocks) {
#define ENTRY(R, B) [R][B] = i8_##R##x##B,
    static const tile_fn tiles[MAX_I8_SUMS + 1][MAX_I8_WIDTH + 1] = {I8_SHAPES(ENTRY)};
    return tiles[rows][blocks];
}

END_SIMD
#endif
