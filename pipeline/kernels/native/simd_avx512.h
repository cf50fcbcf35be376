/* Sixteen lanes in AVX-512: one register. */
#include <immintrin.h>

#if !defined(EXTRA_TARGET)
#define EXTRA_TARGET ""
#endif
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" EXTRA_TARGET
#include "target.h"

#define LEVEL_AVX512 1

typedef __m512 f32x16;
typedef __m512i i32x16;
typedef __mmask16 mask16;

INLINE f32x16 f_zero(void) { return _mm512_setzero_ps(); }
INLINE f32x16 f_set1(float x) { return _mm512_set1_ps(x); }
INLINE f32x16 f_load(const void *p) { return _mm512_loadu_ps(p); }
INLINE f32x16 f_load_some(mask16 mask, const void *p) { return _mm512_maskz_loadu_ps(mask, p); }
INLINE void f_store(void *p, f32x16 x) { _mm512_storeu_ps(p, x); }
INLINE void f_store_some(void *p, mask16 mask, f32x16 x) { _mm512_mask_storeu_ps(p, mask, x); }
INLINE f32x16 f_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE f32x16 f_fnma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE f32x16 f_min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
INLINE f32x16 f_max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
INLINE f32x16 f_abs(f32x16 x) { return _mm512_abs_ps(x); }
INLINE f32x16 f_round(f32x16 x) { return _mm512_roundscale_ps(x, 0); }
INLINE f32x16 f_scale(f32x16 x, f32x16 n) { return _mm512_scalef_ps(x, n); }
INLINE float f_first(f32x16 x) { return _mm512_cvtss_f32(x); }
INLINE float f_sum(f32x16 x) { return _mm512_reduce_add_ps(x); }
INLINE float f_greatest(f32x16 x) { return _mm512_reduce_max_ps(x); }
INLINE mask16 f_unordered(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
INLINE mask16 f_gt(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE mask16 f_ge(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE mask16 f_eq(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE f32x16 f_keep(mask16 mask, f32x16 x) { return _mm512_maskz_mov_ps(mask, x); }
INLINE f32x16 f_select(mask16 mask, f32x16 x, f32x16 other) {
    return _mm512_mask_mov_ps(other, mask, x);
}

INLINE f32x16 f_of_bits(i32x16 x) { return _mm512_castsi512_ps(x); }
INLINE f32x16 f_of_i(i32x16 x) { return _mm512_cvtepi32_ps(x); }
INLINE i32x16 i_of_bits(f32x16 x) { return _mm512_castps_si512(x); }
INLINE i32x16 i_of_f(f32x16 x) { return _mm512_cvtps_epi32(x); }
INLINE i32x16 i_zero(void) { return _mm512_setzero_si512(); }
INLINE i32x16 i_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE i32x16 i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void i_store(void *p, i32x16 x) { _mm512_storeu_si512(p, x); }
INLINE void i_store_some(void *p, mask16 mask, i32x16 x) {
    _mm512_mask_storeu_epi32(p, mask, x);
}
INLINE i32x16 i_add(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
INLINE i32x16 i_and(i32x16 a, i32x16 b) { return _mm512_and_si512(a, b); }
INLINE i32x16 i_or(i32x16 a, i32x16 b) { return _mm512_or_si512(a, b); }
INLINE i32x16 i_xor(i32x16 a, i32x16 b) { return _mm512_xor_si512(a, b); }
INLINE i32x16 i_shl(i32x16 x, const int n) { return _mm512_slli_epi32(x, n); }
INLINE i32x16 i_shr(i32x16 x, const int n) { return _mm512_srli_epi32(x, n); }
INLINE int32_t i_sum(i32x16 x) { return _mm512_reduce_add_epi32(x); }
INLINE mask16 i_ge(i32x16 a, i32x16 b) { return _mm512_cmpge_epi32_mask(a, b); }
INLINE i32x16 i_keep(mask16 mask, i32x16 x) { return _mm512_maskz_mov_epi32(mask, x); }
INLINE i32x16 i_select(mask16 mask, i32x16 x, i32x16 other) {
    return _mm512_mask_mov_epi32(other, mask, x);
}

INLINE f32x16 f_as_halves(f32x16 x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE f32x16 f_load_halves(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE f32x16 f_load_some_halves(mask16 mask, const void *p) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}
INLINE void f_store_halves(void *p, f32x16 x) {
    _mm256_storeu_si256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void f_store_some_halves(void *p, mask16 mask, f32x16 x) {
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE i32x16 i_load_words(const void *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE i32x16 i_load_some_words(mask16 mask, const void *p) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
}
INLINE void i_store_words(void *p, i32x16 x) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(x)); }
INLINE void i_store_some_words(void *p, mask16 mask, i32x16 x) {
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(x));
}
INLINE i32x16 i_load_some_bytes(mask16 mask, const void *p) {
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p));
}
INLINE void i_store_saturated_bytes(void *p, i32x16 x) {
    _mm_storeu_si128(p, _mm512_cvtsepi32_epi8(x));
}

INLINE __mmask64 bytes_below(size_t count) {
    return count >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << count) - 1;
}
INLINE i32x16 i_load_first_bytes(size_t count, const void *p) {
    return _mm512_maskz_loadu_epi8(bytes_below(count), p);
}
INLINE void i_store_first_bytes(void *p, size_t count, i32x16 x) {
    _mm512_mask_storeu_epi8(p, bytes_below(count), x);
}

INLINE void fetch_far(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }
INLINE void fetch_near(const void *p) { _mm_prefetch(p, _MM_HINT_T0); }

INLINE void transpose_16(i32x16 rows[16]) {
    i32x16 a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 128 bits of rows i, i + 4, i + 8 and i + 12 */
        a[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}
