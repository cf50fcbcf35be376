/* AVX-512 for the functions of the file that includes this, and the vector maths they share. */
#ifndef VEILPIPE_SIMD_H
#define VEILPIPE_SIMD_H

#include "kernels.h"

#if defined(VEILPIPE_X86)
#include <immintrin.h>

/* The module loads anywhere; only these functions need the CPU that features() asks for. */
#if !defined(EXTRA_TARGET)
#define EXTRA_TARGET ""
#endif
#define TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" EXTRA_TARGET
#define PRAGMA(text) _Pragma(#text)
#define PRAGMA_OF(text) PRAGMA(text)
#if defined(__clang__)
PRAGMA_OF(clang attribute push(__attribute__((target(TARGET_AVX512))), apply_to = function))
#define END_SIMD _Pragma("clang attribute pop")
#else
#pragma GCC push_options
PRAGMA_OF(GCC target(TARGET_AVX512))
#define END_SIMD _Pragma("GCC pop_options")
#endif

#define INLINE static inline __attribute__((always_inline))

/* Pointers[i] = base + i * stride, each kept in a register of its own: left to itself, gcc derives
 * them from each other in the inner loop and runs out of registers. */
INLINE void spread(const char **pointers, const int count, const char *base, size_t stride) {
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        pointers[i] = base + i * stride;
        __asm__("" : "+r"(pointers[i]));
    }
}

/* Lanes below `count` (0..16 or more). */
INLINE __mmask16 lanes(size_t count) {
    return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

/* e^x to 1 ulp: 2^round(x / ln 2) times a degree-6 polynomial of the rest. */
INLINE __m512 exp_ps(__m512 x) {
    x = _mm512_min_ps(x, _mm512_set1_ps(88.8f));
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.39276846e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.36438069e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16665454e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166665696f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

/* x / (1 + e^-x) */
INLINE __m512 silu_ps(__m512 x) {
    __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

/* 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
INLINE __m512 gelu_tanh_ps(__m512 x) {
    __m512 x2 = _mm512_mul_ps(x, x);
    __m512 u = _mm512_fmadd_ps(x2, _mm512_set1_ps(-0.0713548163f), _mm512_set1_ps(-1.59576912f));
    __m512 e = exp_ps(_mm512_mul_ps(u, x));
    return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

/* erfc(u) / 2 for u >= 0: t / 2 * e^(p(t) - u^2), t = 1 / (1 + u / 2), to about 1e-6 of itself. */
INLINE __m512 half_erfc_ps(__m512 u) {
    static const float fit[] = {0.144240463f,  -0.6768506f,   1.14675378f,  -0.681979051f,
                                -0.0930585719f, 0.00866603425f, 0.0318448337f, 0.387275472f,
                                0.998551267f,  -1.26544358f};
    const __m512 half = _mm512_set1_ps(0.5f);
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(u, half, one));
    __m512 p = _mm512_set1_ps(fit[0]);
    for (int i = 1; i < 10; i++) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(fit[i]));
    __m512 e = exp_ps(_mm512_fnmadd_ps(u, u, p));
    return _mm512_mul_ps(_mm512_mul_ps(t, half), e);
}

/* 0.5 x (1 + erf(x / sqrt 2)) = x erfc(-x / sqrt 2) / 2 */
INLINE __m512 gelu_erf_ps(__m512 x) {
    __m512 u = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    __m512 tail = _mm512_mul_ps(x, half_erfc_ps(u));
    __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_sub_ps(tail, is_positive, x, tail);
}

INLINE __m512 activate_ps(__m512 x, int activation) {
    switch (activation) {
    case ACT_GELU_TANH: return gelu_tanh_ps(x);
    case ACT_GELU_ERF: return gelu_erf_ps(x);
    case ACT_RELU: return _mm512_max_ps(_mm512_setzero_ps(), x); /* the second if not a number */
    default: return x;
    }
}

#endif
#endif
