/* Rows of tables by number: embeddings, learned positions, rotary angles. */
#include "simd.h"

#if defined(VEILPIPE_X86)

INLINE __m512 widened(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

/* Up to 16 values of row `row` from column `at`, a multiple of 16. */
INLINE __m512 values_at(const table_t *table, size_t row, size_t at) {
    __mmask16 mask = lanes(table->width - at);
    size_t from = row * table->width + at;
    if (table->kind == KIND_F32) {
        return _mm512_maskz_loadu_ps(mask, (const float *)table->values + from);
    }
    if (table->kind == KIND_BF16) {
        return widened(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)table->values + from));
    }
    __m128i levels = _mm_maskz_loadu_epi8(mask, (const int8_t *)table->values + from);
    size_t groups = (table->width + GROUP - 1) / GROUP;
    uint16_t scale = table->scales[row * groups + at / GROUP];
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels)),
                         widened(_mm256_set1_epi16((int16_t)scale)));
}

/* Rows that far ahead are on their way from memory: in no order, no processor guesses them. */
#define AHEAD 12

INLINE void fetch_row(const table_t *table, size_t row) {
    size_t size = table->kind == KIND_F32 ? 4 : table->kind == KIND_BF16 ? 2 : 1;
    const char *from = (const char *)table->values + row * table->width * size;
    for (size_t at = 0; at < table->width * size; at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
}

void lookup(const table_t *table, const int64_t *ids, size_t id_stride, size_t count, int adds,
            float *out) {
    for (size_t i = 0; i < count; i++, out += table->width) {
        if (i + AHEAD < count) fetch_row(table, (size_t)ids[(i + AHEAD) * id_stride]);
        for (size_t at = 0; at < table->width; at += 16) {
            __mmask16 mask = lanes(table->width - at);
            __m512 values = values_at(table, (size_t)ids[i * id_stride], at);
            if (adds) values = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + at), values);
            _mm512_mask_storeu_ps(out + at, mask, values);
        }
    }
}

END_SIMD
#endif
