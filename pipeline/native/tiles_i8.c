/* Tiles of a product in int8: exact integer sums over 32 inputs, each scaled into a float sum.
 *
 * vpdpbusd multiplies unsigned by signed bytes, so weights carry + 128; each sum starts at what
 * undoes it, -128 times the sum of the row's 32 inputs.
 */
#define EXTRA_TARGET ",avx512vnni"
#include "simd.h"

#if defined(VEILPIPE_X86)

/* 64 inputs of a row of x. */
typedef struct {
    int8_t levels[SUPER];
    float scales[SUPER / GROUP];
    int32_t starts[SUPER / GROUP]; /* -128 * sum of levels */
} super_x_t;

size_t quantised_bytes(size_t num_in) { return (num_in + SUPER - 1) / SUPER * sizeof(super_x_t); }

INLINE void quantise_group(__m512 low, __m512 high, super_x_t *to, size_t group) {
    float greatest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    /* a maximum may pass over what is not a number, and then the result would look like one */
    if (_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q)) greatest = __builtin_nanf("");
    float inverse = greatest >= SMALLEST_SCALE ? 127.0f / greatest : 0.0f;
    __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, _mm512_set1_ps(inverse)));
    __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(inverse)));
    int8_t *levels = to->levels + group * GROUP;
    _mm_storeu_si128((__m128i *)levels, _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(levels + 16), _mm512_cvtsepi32_epi8(b));
    to->scales[group] = greatest / 127.0f;
    uint32_t sum = (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    to->starts[group] = (int32_t)(-128u * sum); /* unsigned: levels of infinities wrap */
}

void quantise_row(const float *x, size_t num_in, void *quantised) {
    super_x_t *to = quantised;
    for (size_t k = 0; k < (num_in + SUPER - 1) / SUPER * SUPER; k += GROUP) {
        size_t left = num_in > k ? num_in - k : 0;
        __m512 low = _mm512_maskz_loadu_ps(lanes(left), x + k);
        __m512 high = _mm512_maskz_loadu_ps(lanes(left > 16 ? left - 16 : 0), x + k + 16);
        quantise_group(low, high, to + k / SUPER, k % SUPER / GROUP);
    }
}

INLINE __m512 scales_of(const super_t *super, int group) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)super->scales[group]);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* Many rows keep the core busy while the next weights come; for few, hardware fetches faster. */
enum { AHEAD = 3, FETCHING_ROWS = 5 };

INLINE void run_group(const int R, const int B, __m512 *acc, const super_x_t *const *x,
                      const super_t *const *w, const int group) {
    __m512i sum[6 * 2], wide[2];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) sum[r * B + b] = _mm512_set1_epi32(x[r]->starts[group]);
    }
#pragma GCC unroll 8
    for (int k = group * GROUP / 4; k < (group + 1) * GROUP / 4; k++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            wide[b] = _mm512_loadu_si512(w[b]->weights[k]);
            if (R >= FETCHING_ROWS) _mm_prefetch((w[b] + AHEAD)->weights[k], _MM_HINT_T1);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            __m512i xr = _mm512_set1_epi32(*(const int32_t *)(x[r]->levels + 4 * k));
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) {
                sum[r * B + b] = _mm512_dpbusd_epi32(sum[r * B + b], wide[b], xr);
            }
        }
    }
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) {
        __m512 scales = scales_of(w[b], group);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x[r]->scales[group]));
            acc[r * B + b] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r * B + b]), scale, acc[r * B + b]);
        }
    }
}

INLINE void run_i8(const int R, const int B, float *out, size_t out_stride, size_t out_block,
                   const char *x_base, size_t x_stride, const char *w_base, size_t block_stride,
                   size_t num_supers) {
    __m512 acc[6 * 2];
    const super_x_t *x[6];
    const super_t *w[2];
    spread((const char **)x, R, x_base, x_stride);
    spread((const char **)w, B, w_base, block_stride);
#pragma GCC unroll 12
    for (int i = 0; i < R * B; i++) acc[i] = _mm512_setzero_ps();
    for (size_t k = 0; k < num_supers; k++) {
        run_group(R, B, acc, x, w, 0);
        run_group(R, B, acc, x, w, 1);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) x[r]++;
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            w[b]++;
            __asm__("" : "+r"(w[b]));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            _mm512_storeu_ps(out + r * out_stride + b * out_block, acc[r * B + b]);
        }
    }
}

#define TILE(R, B)                                                                                 \
    static void i8_##R##x##B(float *acc, size_t acc_stride, size_t acc_block, const char *x,       \
                             size_t x_stride, const char *w, size_t block_stride, size_t k_stride, \
                             size_t num_k, int adds) {                                             \
        (void)k_stride, (void)adds; /* supers follow each other, and one pass takes all */         \
        run_i8(R, B, acc, acc_stride, acc_block, x, x_stride, w, block_stride, num_k);             \
    }
#define ROW(R) TILE(R, 1) TILE(R, 2)
ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6)

tile_fn tile_i8(size_t rows, size_t blocks) {
    static const tile_fn tiles[6][2] = {
        {i8_1x1, i8_1x2}, {i8_2x1, i8_2x2}, {i8_3x1, i8_3x2},
        {i8_4x1, i8_4x2}, {i8_5x1, i8_5x2}, {i8_6x1, i8_6x2},
    };
    return tiles[rows - 1][blocks - 1];
}

END_SIMD
#endif
