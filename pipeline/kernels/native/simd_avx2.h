/* Sixteen lanes in AVX2: two registers. Every function gives the bits that AVX-512's would. */
#include <immintrin.h>

#define TARGET "avx2,fma,f16c"
#include "target.h"

#define LEVEL_AVX2 1

typedef struct {
    __m256 low, high;
} f32x16;

typedef struct {
    __m256i low, high;
} i32x16;

typedef uint16_t mask16;

#define F_EACH(OP, a, b) ((f32x16){OP((a).low, (b).low), OP((a).high, (b).high)})
#define I_EACH(OP, a, b) ((i32x16){OP((a).low, (b).low), OP((a).high, (b).high)})

/* All bits of the lanes that a mask has. */
INLINE i32x16 i_of_mask(mask16 mask) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i low = _mm256_and_si256(_mm256_set1_epi32(mask), each);
    __m256i high = _mm256_and_si256(_mm256_set1_epi32(mask >> 8), each);
    return (i32x16){_mm256_cmpeq_epi32(low, each), _mm256_cmpeq_epi32(high, each)};
}

INLINE mask16 mask_of(__m256 low, __m256 high) {
    return (mask16)(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}

INLINE f32x16 f_of_bits(i32x16 x) {
    return (f32x16){_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
INLINE i32x16 i_of_bits(f32x16 x) {
    return (i32x16){_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}

INLINE i32x16 i_zero(void) { return (i32x16){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE i32x16 i_set1(int32_t x) { return (i32x16){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE i32x16 i_load(const void *p) {
    const __m256i *from = p;
    return (i32x16){_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
INLINE void i_store(void *p, i32x16 x) {
    _mm256_storeu_si256(p, x.low);
    _mm256_storeu_si256((__m256i *)p + 1, x.high);
}
INLINE void i_store_some(void *p, mask16 mask, i32x16 x) {
    if (mask == 0xffff) {
        i_store(p, x);
        return;
    }
    i32x16 lanes = i_of_mask(mask);
    _mm256_maskstore_epi32(p, lanes.low, x.low);
    _mm256_maskstore_epi32((int *)p + 8, lanes.high, x.high);
}
INLINE i32x16 i_add(i32x16 a, i32x16 b) { return I_EACH(_mm256_add_epi32, a, b); }
INLINE i32x16 i_sub(i32x16 a, i32x16 b) { return I_EACH(_mm256_sub_epi32, a, b); }
INLINE i32x16 i_and(i32x16 a, i32x16 b) { return I_EACH(_mm256_and_si256, a, b); }
INLINE i32x16 i_or(i32x16 a, i32x16 b) { return I_EACH(_mm256_or_si256, a, b); }
INLINE i32x16 i_xor(i32x16 a, i32x16 b) { return I_EACH(_mm256_xor_si256, a, b); }
INLINE i32x16 i_shl(i32x16 x, const int n) {
    return (i32x16){_mm256_slli_epi32(x.low, n), _mm256_slli_epi32(x.high, n)};
}
INLINE i32x16 i_shr(i32x16 x, const int n) {
    return (i32x16){_mm256_srli_epi32(x.low, n), _mm256_srli_epi32(x.high, n)};
}
INLINE int32_t i_sum(i32x16 x) {
    __m256i both = _mm256_add_epi32(x.low, x.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE mask16 i_ge(i32x16 a, i32x16 b) {
    f32x16 below = f_of_bits(I_EACH(_mm256_cmpgt_epi32, b, a));
    return (mask16)~mask_of(below.low, below.high);
}
INLINE i32x16 i_keep(mask16 mask, i32x16 x) { return i_and(i_of_mask(mask), x); }
INLINE i32x16 i_select(mask16 mask, i32x16 x, i32x16 other) {
    i32x16 lanes = i_of_mask(mask);
    return (i32x16){_mm256_blendv_epi8(other.low, x.low, lanes.low),
                    _mm256_blendv_epi8(other.high, x.high, lanes.high)};
}

INLINE f32x16 f_zero(void) { return (f32x16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE f32x16 f_set1(float x) { return (f32x16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE f32x16 f_load(const void *p) {
    const float *from = p;
    return (f32x16){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
INLINE f32x16 f_load_some(mask16 mask, const void *p) {
    if (mask == 0xffff) return f_load(p);
    const float *from = p;
    i32x16 lanes = i_of_mask(mask);
    return (f32x16){_mm256_maskload_ps(from, lanes.low), _mm256_maskload_ps(from + 8, lanes.high)};
}
INLINE void f_store(void *p, f32x16 x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps((float *)p + 8, x.high);
}
INLINE void f_store_some(void *p, mask16 mask, f32x16 x) { i_store_some(p, mask, i_of_bits(x)); }
INLINE f32x16 f_add(f32x16 a, f32x16 b) { return F_EACH(_mm256_add_ps, a, b); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { return F_EACH(_mm256_sub_ps, a, b); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { return F_EACH(_mm256_mul_ps, a, b); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { return F_EACH(_mm256_div_ps, a, b); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) {
    return (f32x16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE f32x16 f_fnma(f32x16 a, f32x16 b, f32x16 c) {
    return (f32x16){_mm256_fnmadd_ps(a.low, b.low, c.low),
                    _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE f32x16 f_min(f32x16 a, f32x16 b) { return F_EACH(_mm256_min_ps, a, b); }
INLINE f32x16 f_max(f32x16 a, f32x16 b) { return F_EACH(_mm256_max_ps, a, b); }
INLINE f32x16 f_abs(f32x16 x) {
    return f_of_bits(i_and(i_of_bits(x), i_set1(0x7fffffff)));
}
INLINE f32x16 f_round(f32x16 x) {
    return (f32x16){_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE i32x16 i_of_f(f32x16 x) {
    return (i32x16){_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}
INLINE f32x16 f_of_i(i32x16 x) {
    return (f32x16){_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)};
}
INLINE float f_first(f32x16 x) { return _mm256_cvtss_f32(x.low); }
INLINE float f_sum(f32x16 x) {
    __m256 both = _mm256_add_ps(x.high, x.low);
    __m128 four = _mm_add_ps(_mm256_extractf128_ps(both, 1), _mm256_castps256_ps128(both));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float f_greatest(f32x16 x) {
    __m256 both = _mm256_max_ps(x.high, x.low);
    __m128 four = _mm_max_ps(_mm256_extractf128_ps(both, 1), _mm256_castps256_ps128(both));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#define COMPARE(a, b, HOW)                                                                         \
    mask_of(_mm256_cmp_ps((a).low, (b).low, HOW), _mm256_cmp_ps((a).high, (b).high, HOW))
INLINE mask16 f_unordered(f32x16 a, f32x16 b) { return COMPARE(a, b, _CMP_UNORD_Q); }
INLINE mask16 f_gt(f32x16 a, f32x16 b) { return COMPARE(a, b, _CMP_GT_OQ); }
INLINE mask16 f_ge(f32x16 a, f32x16 b) { return COMPARE(a, b, _CMP_GE_OQ); }
INLINE mask16 f_eq(f32x16 a, f32x16 b) { return COMPARE(a, b, _CMP_EQ_OQ); }
#undef COMPARE
INLINE f32x16 f_keep(mask16 mask, f32x16 x) { return f_of_bits(i_keep(mask, i_of_bits(x))); }
INLINE f32x16 f_select(mask16 mask, f32x16 x, f32x16 other) {
    return f_of_bits(i_select(mask, i_of_bits(x), i_of_bits(other)));
}

INLINE f32x16 f_as_halves(f32x16 x) {
    return (f32x16){_mm256_cvtph_ps(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT)),
                    _mm256_cvtph_ps(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT))};
}
INLINE f32x16 f_load_halves(const void *p) {
    const __m128i *from = p;
    return (f32x16){_mm256_cvtph_ps(_mm_loadu_si128(from)),
                    _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
INLINE void f_store_halves(void *p, f32x16 x) {
    _mm_storeu_si128(p, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
INLINE i32x16 i_load_words(const void *p) {
    const __m128i *from = p;
    return (i32x16){_mm256_cvtepu16_epi32(_mm_loadu_si128(from)),
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1))};
}
INLINE void i_store_words(void *p, i32x16 x) {
    const __m256i lower = _mm256_set1_epi32(0xffff);
    __m256i both = _mm256_packus_epi32(_mm256_and_si256(x.low, lower),
                                       _mm256_and_si256(x.high, lower));
    _mm256_storeu_si256(p, _mm256_permute4x64_epi64(both, 0xd8));
}
INLINE i32x16 i_load_bytes(const void *p) {
    __m128i bytes = _mm_loadu_si128(p);
    return (i32x16){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
INLINE void i_store_saturated_bytes(void *p, i32x16 x) {
    __m256i words = _mm256_packs_epi32(x.low, x.high);
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128(p, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                        _mm256_extracti128_si256(words, 1)));
}

/* Weights + 128, and what multiplies them by four levels of a row, exactly: vpdpbusd, or products
 * of sizes, for pairs of those fit 16 bits. */
typedef struct {
    i32x16 bytes, sizes;
} bytes_t;

INLINE bytes_t bytes_of(const int HAS_DOT, const void *p) {
    i32x16 x = i_load(p);
    if (HAS_DOT) return (bytes_t){x, x};
    x = i_xor(x, i_set1((int)0x80808080));
    return (bytes_t){x, {_mm256_abs_epi8(x.low), _mm256_abs_epi8(x.high)}};
}

/* Of bytes that are below 128 as they are. */
INLINE bytes_t small_bytes(i32x16 x) { return (bytes_t){x, x}; }

INLINE __m256i dot_of(const int HAS_DOT, __m256i sum, __m256i bytes, __m256i sizes, __m256i row) {
    if (HAS_DOT) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(bytes), "x"(row));
        return sum;
    }
    __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(row, bytes));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(sum)); /* else summed up in another order, for which registers are too few */
    return sum;
}

INLINE i32x16 i_dot(const int HAS_DOT, i32x16 sum, bytes_t x, const int32_t *levels) {
    __m256i row = _mm256_set1_epi32(*levels);
    return (i32x16){dot_of(HAS_DOT, sum.low, x.bytes.low, x.sizes.low, row),
                    dot_of(HAS_DOT, sum.high, x.bytes.high, x.sizes.high, row)};
}

INLINE void fetch_far(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }
INLINE void fetch_near(const void *p) { _mm_prefetch(p, _MM_HINT_T0); }

INLINE void transpose_8(__m256i rows[8]) {
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

INLINE void transpose_16(i32x16 rows[16]) {
    __m256i quarters[4][8]; /* rows 0..8 and 8..16, of each the lower lanes and the higher */
    for (int i = 0; i < 16; i++) {
        quarters[i / 8 * 2][i % 8] = rows[i].low;
        quarters[i / 8 * 2 + 1][i % 8] = rows[i].high;
    }
    for (int i = 0; i < 4; i++) transpose_8(quarters[i]);
    for (int i = 0; i < 8; i++) {
        rows[i] = (i32x16){quarters[0][i], quarters[2][i]};
        rows[i + 8] = (i32x16){quarters[1][i], quarters[3][i]};
    }
}

#include "simd_some.h"
