/* Sixteen lanes at a time, for the functions of the file that includes this, and the maths they
 * share. A level is a set of vector instructions that has them; all give the same bits. As with
 * AVX-512, a lane of a minimum or maximum that is not a number is the second's, and a number that no
 * integer holds becomes the least one.
 */
#ifndef VEILPIPE_SIMD_H
#define VEILPIPE_SIMD_H

#include "kernels.h"

#if defined(VEILPIPE_SIMD)

#define INLINE static inline __attribute__((always_inline))

#if defined(__aarch64__)
#include "simd_neon.h"
#elif defined(VEILPIPE_AVX2)
#include "simd_avx2.h"
#else
#include "simd_avx512.h"
#endif
/* avx2.c includes all files, and ends it itself. */
#if defined(VEILPIPE_AVX2)
#define END_SIMD
#else
#define END_SIMD END_TARGET
#endif

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
INLINE mask16 lanes(size_t count) {
    return count >= 16 ? (mask16)0xffff : (mask16)((1u << count) - 1);
}

/* e^x to 1 ulp: 2^round(x / ln 2) times a degree-6 polynomial of the rest. */
INLINE f32x16 exp_ps(f32x16 x) {
    x = f_min(x, f_set1(88.8f));
    x = f_max(x, f_set1(-104.0f));
    f32x16 n = f_round(f_mul(x, f_set1(1.44269504f)));
    f32x16 r = f_fnma(n, f_set1(0.693359375f), x);
    r = f_fnma(n, f_set1(-2.12194440e-4f), r);
    f32x16 p = f_set1(1.39276846e-3f);
    p = f_fma(p, r, f_set1(8.36438069e-3f));
    p = f_fma(p, r, f_set1(4.16665454e-2f));
    p = f_fma(p, r, f_set1(0.166665696f));
    p = f_fma(p, r, f_set1(0.5f));
    p = f_fma(f_mul(r, r), p, r);
    return f_scale(f_add(p, f_set1(1.0f)), n);
}

/* x / (1 + e^-x) */
INLINE f32x16 silu_ps(f32x16 x) {
    f32x16 e = exp_ps(f_sub(f_zero(), x));
    return f_div(x, f_add(e, f_set1(1.0f)));
}

/* 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
INLINE f32x16 gelu_tanh_ps(f32x16 x) {
    f32x16 x2 = f_mul(x, x);
    f32x16 u = f_fma(x2, f_set1(-0.0713548163f), f_set1(-1.59576912f));
    f32x16 e = exp_ps(f_mul(u, x));
    return f_div(x, f_add(e, f_set1(1.0f)));
}

/* erfc(u) / 2 for u >= 0: t / 2 * e^(p(t) - u^2), t = 1 / (1 + u / 2), to about 1e-6 of itself. */
INLINE f32x16 half_erfc_ps(f32x16 u) {
    static const float fit[] = {0.144240463f,  -0.6768506f,   1.14675378f,  -0.681979051f,
                                -0.0930585719f, 0.00866603425f, 0.0318448337f, 0.387275472f,
                                0.998551267f,  -1.26544358f};
    const f32x16 half = f_set1(0.5f);
    f32x16 one = f_set1(1.0f);
    f32x16 t = f_div(one, f_fma(u, half, one));
    f32x16 p = f_set1(fit[0]);
    for (int i = 1; i < 10; i++) p = f_fma(p, t, f_set1(fit[i]));
    f32x16 e = exp_ps(f_fnma(u, u, p));
    return f_mul(f_mul(t, half), e);
}

/* 0.5 x (1 + erf(x / sqrt 2)) = x erfc(-x / sqrt 2) / 2 */
INLINE f32x16 gelu_erf_ps(f32x16 x) {
    f32x16 u = f_mul(f_abs(x), f_set1(0.70710678f));
    f32x16 tail = f_mul(x, half_erfc_ps(u));
    mask16 is_positive = f_gt(x, f_zero());
    return f_select(is_positive, f_sub(x, tail), tail);
}

INLINE f32x16 activate_ps(f32x16 x, int activation) {
    switch (activation) {
    case ACT_GELU_TANH: return gelu_tanh_ps(x);
    case ACT_GELU_ERF: return gelu_erf_ps(x);
    case ACT_RELU: return f_max(f_zero(), x); /* the second if not a number */
    default: return x;
    }
}

#endif
#endif
