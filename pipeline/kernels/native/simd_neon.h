/* Sixteen lanes in NEON: four registers. Every function gives the bits that AVX-512's would. */
#include <arm_neon.h>

#define TARGET "arch=armv8.2-a+dotprod"
#include "target.h"

#define LEVEL_NEON 1

typedef struct {
    float32x4_t at[4];
} f32x16;

typedef struct {
    int32x4_t at[4];
} i32x16;

typedef uint16_t mask16;

#define EACH(TYPE, VALUE)                                                                          \
    TYPE each;                                                                                     \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) each.at[i] = VALUE;                        \
    return each

INLINE f32x16 f_of_bits(i32x16 x) { EACH(f32x16, vreinterpretq_f32_s32(x.at[i])); }
INLINE i32x16 i_of_bits(f32x16 x) { EACH(i32x16, vreinterpretq_s32_f32(x.at[i])); }

/* All bits of the lanes that a mask has, and the mask of such. */
INLINE i32x16 i_of_mask(mask16 mask) {
    const int32_t bits[] = {1, 2, 4, 8};
    EACH(i32x16, vreinterpretq_s32_u32(vtstq_s32(vdupq_n_s32(mask >> 4 * i), vld1q_s32(bits))));
}
INLINE mask16 mask_of(i32x16 x) {
    const uint32_t bits[] = {1, 2, 4, 8};
    uint32_t mask = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        uint32x4_t set = vandq_u32(vreinterpretq_u32_s32(x.at[i]), vld1q_u32(bits));
        mask |= vaddvq_u32(set) << 4 * i;
    }
    return (mask16)mask;
}
#define COMPARE(VALUE)                                                                             \
    i32x16 each;                                                                                   \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) each.at[i] = vreinterpretq_s32_u32(VALUE); \
    return mask_of(each)

INLINE i32x16 i_zero(void) { EACH(i32x16, vdupq_n_s32(0)); }
INLINE i32x16 i_set1(int32_t x) { EACH(i32x16, vdupq_n_s32(x)); }
INLINE i32x16 i_load(const void *p) { EACH(i32x16, vld1q_s32((const int32_t *)p + 4 * i)); }
INLINE void i_store(void *p, i32x16 x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) vst1q_s32((int32_t *)p + 4 * i, x.at[i]);
}
INLINE void i_store_some(void *p, mask16 mask, i32x16 x) {
    int32_t all[16];
    i_store(mask == 0xffff ? p : all, x);
    if (mask == 0xffff) return;
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) ((int32_t *)p)[i] = all[i];
    }
}
INLINE i32x16 i_add(i32x16 a, i32x16 b) { EACH(i32x16, vaddq_s32(a.at[i], b.at[i])); }
INLINE i32x16 i_sub(i32x16 a, i32x16 b) { EACH(i32x16, vsubq_s32(a.at[i], b.at[i])); }
INLINE i32x16 i_and(i32x16 a, i32x16 b) { EACH(i32x16, vandq_s32(a.at[i], b.at[i])); }
INLINE i32x16 i_or(i32x16 a, i32x16 b) { EACH(i32x16, vorrq_s32(a.at[i], b.at[i])); }
INLINE i32x16 i_xor(i32x16 a, i32x16 b) { EACH(i32x16, veorq_s32(a.at[i], b.at[i])); }
INLINE i32x16 i_shl(i32x16 x, const int n) {
    EACH(i32x16, vshlq_s32(x.at[i], vdupq_n_s32(n)));
}
INLINE i32x16 i_shr(i32x16 x, const int n) {
    EACH(i32x16, vreinterpretq_s32_u32(
                     vshlq_u32(vreinterpretq_u32_s32(x.at[i]), vdupq_n_s32(-n))));
}
INLINE int32_t i_sum(i32x16 x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.at[0], x.at[1]), vaddq_s32(x.at[2], x.at[3])));
}
INLINE mask16 i_ge(i32x16 a, i32x16 b) { COMPARE(vcgeq_s32(a.at[i], b.at[i])); }
INLINE i32x16 i_keep(mask16 mask, i32x16 x) { return i_and(i_of_mask(mask), x); }
INLINE i32x16 i_select(mask16 mask, i32x16 x, i32x16 other) {
    i32x16 lanes = i_of_mask(mask);
    EACH(i32x16, vbslq_s32(vreinterpretq_u32_s32(lanes.at[i]), x.at[i], other.at[i]));
}

INLINE f32x16 f_zero(void) { EACH(f32x16, vdupq_n_f32(0)); }
INLINE f32x16 f_set1(float x) { EACH(f32x16, vdupq_n_f32(x)); }
INLINE f32x16 f_load(const void *p) { EACH(f32x16, vld1q_f32((const float *)p + 4 * i)); }
INLINE f32x16 f_load_some(mask16 mask, const void *p) {
    if (mask == 0xffff) return f_load(p);
    float all[16] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) all[i] = ((const float *)p)[i];
    }
    return f_load(all);
}
INLINE void f_store(void *p, f32x16 x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) vst1q_f32((float *)p + 4 * i, x.at[i]);
}
INLINE void f_store_some(void *p, mask16 mask, f32x16 x) { i_store_some(p, mask, i_of_bits(x)); }
INLINE f32x16 f_add(f32x16 a, f32x16 b) { EACH(f32x16, vaddq_f32(a.at[i], b.at[i])); }
INLINE f32x16 f_sub(f32x16 a, f32x16 b) { EACH(f32x16, vsubq_f32(a.at[i], b.at[i])); }
INLINE f32x16 f_mul(f32x16 a, f32x16 b) { EACH(f32x16, vmulq_f32(a.at[i], b.at[i])); }
INLINE f32x16 f_div(f32x16 a, f32x16 b) { EACH(f32x16, vdivq_f32(a.at[i], b.at[i])); }
INLINE f32x16 f_fma(f32x16 a, f32x16 b, f32x16 c) {
    EACH(f32x16, vfmaq_f32(c.at[i], a.at[i], b.at[i]));
}
INLINE f32x16 f_fnma(f32x16 a, f32x16 b, f32x16 c) {
    EACH(f32x16, vfmsq_f32(c.at[i], a.at[i], b.at[i]));
}
/* The second where either is not a number, as x86 has it; so is the second of equals. */
INLINE f32x16 f_min(f32x16 a, f32x16 b) {
    EACH(f32x16, vbslq_f32(vcltq_f32(a.at[i], b.at[i]), a.at[i], b.at[i]));
}
INLINE f32x16 f_max(f32x16 a, f32x16 b) {
    EACH(f32x16, vbslq_f32(vcgtq_f32(a.at[i], b.at[i]), a.at[i], b.at[i]));
}
INLINE f32x16 f_abs(f32x16 x) { EACH(f32x16, vabsq_f32(x.at[i])); }
INLINE f32x16 f_round(f32x16 x) { EACH(f32x16, vrndnq_f32(x.at[i])); }
/* What no int32 holds, or is no number, as the least of them. */
INLINE i32x16 i_of_f(f32x16 x) {
    const float32x4_t limit = vdupq_n_f32(2147483648.0f);
    EACH(i32x16, vbslq_s32(vcaltq_f32(x.at[i], limit), vcvtnq_s32_f32(x.at[i]),
                           vdupq_n_s32(INT32_MIN)));
}
INLINE f32x16 f_of_i(i32x16 x) { EACH(f32x16, vcvtq_f32_s32(x.at[i])); }
INLINE float f_first(f32x16 x) { return vgetq_lane_f32(x.at[0], 0); }
INLINE float f_sum(f32x16 x) {
    float32x4_t four = vaddq_f32(vaddq_f32(x.at[0], x.at[2]), vaddq_f32(x.at[1], x.at[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float f_greatest(f32x16 x) {
    float all[16], most;
    f_store(all, x);
    most = all[0];
    for (int i = 1; i < 16; i++) most = all[i] > most ? all[i] : most;
    return most;
}
INLINE mask16 f_unordered(f32x16 a, f32x16 b) {
    COMPARE(vmvnq_u32(vandq_u32(vceqq_f32(a.at[i], a.at[i]), vceqq_f32(b.at[i], b.at[i]))));
}
INLINE mask16 f_gt(f32x16 a, f32x16 b) { COMPARE(vcgtq_f32(a.at[i], b.at[i])); }
INLINE mask16 f_ge(f32x16 a, f32x16 b) { COMPARE(vcgeq_f32(a.at[i], b.at[i])); }
INLINE mask16 f_eq(f32x16 a, f32x16 b) { COMPARE(vceqq_f32(a.at[i], b.at[i])); }
#undef COMPARE
INLINE f32x16 f_keep(mask16 mask, f32x16 x) { return f_of_bits(i_keep(mask, i_of_bits(x))); }
INLINE f32x16 f_select(mask16 mask, f32x16 x, f32x16 other) {
    return f_of_bits(i_select(mask, i_of_bits(x), i_of_bits(other)));
}

INLINE f32x16 f_as_halves(f32x16 x) { EACH(f32x16, vcvt_f32_f16(vcvt_f16_f32(x.at[i]))); }
INLINE f32x16 f_load_halves(const void *p) {
    EACH(f32x16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p + 4 * i))));
}
INLINE void f_store_halves(void *p, f32x16 x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vst1_u16((uint16_t *)p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.at[i])));
    }
}
INLINE i32x16 i_load_words(const void *p) {
    EACH(i32x16, vreinterpretq_s32_u32(vmovl_u16(vld1_u16((const uint16_t *)p + 4 * i))));
}
INLINE void i_store_words(void *p, i32x16 x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vst1_u16((uint16_t *)p + 4 * i, vmovn_u32(vreinterpretq_u32_s32(x.at[i])));
    }
}
INLINE i32x16 i_load_bytes(const void *p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return (i32x16){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                     vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
INLINE void i_store_saturated_bytes(void *p, i32x16 x) {
    int16x8_t low = vcombine_s16(vqmovn_s32(x.at[0]), vqmovn_s32(x.at[1]));
    int16x8_t high = vcombine_s16(vqmovn_s32(x.at[2]), vqmovn_s32(x.at[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
#undef EACH

/* Weights + 128, and what multiplies them by four levels of a row, exactly. */
typedef i32x16 bytes_t;

INLINE bytes_t bytes_of(const int HAS_DOT, const void *p) {
    (void)HAS_DOT;
    return i_xor(i_load(p), i_set1((int32_t)0x80808080));
}

/* Of bytes that are below 128 as they are. */
INLINE bytes_t small_bytes(i32x16 x) { return x; }

INLINE i32x16 i_dot(const int HAS_DOT, i32x16 sum, bytes_t x, const int32_t *levels) {
    (void)HAS_DOT;
    int8x16_t row = vreinterpretq_s8_s32(vdupq_n_s32(*levels));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        sum.at[i] = vdotq_s32(sum.at[i], vreinterpretq_s8_s32(x.at[i]), row);
    }
    return sum;
}

INLINE void fetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
INLINE void fetch_near(const void *p) { __builtin_prefetch(p, 0, 3); }

INLINE void transpose_16(i32x16 rows[16]) {
    int32_t all[16][16], turned[16][16];
    for (int i = 0; i < 16; i++) i_store(all[i], rows[i]);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) turned[j][i] = all[i][j];
    }
    for (int i = 0; i < 16; i++) rows[i] = i_load(turned[i]);
}

#include "simd_some.h"
