/* Rows of tables by number: embeddings, learned positions, rotary angles. */
#include "simd.h"

#if defined(VEILPIPE_SIMD)

/* Up to 16 values of row `row` from column `at`, a multiple of 16. */
INLINE f32x16 values_at(const table_t *table, size_t row, size_t at) {
    mask16 mask = lanes(table->width - at);
    size_t from = row * table->width + at;
    if (table->kind == KIND_F32) {
        return f_load_some(mask, (const float *)table->values + from);
    }
    if (table->kind == KIND_BF16) {
        const uint16_t *bits = (const uint16_t *)table->values + from;
        return f_of_bits(i_shl(i_load_some_words(mask, bits), 16));
    }
    i32x16 levels = i_load_some_bytes(mask, (const int8_t *)table->values + from);
    size_t groups = (table->width + GROUP - 1) / GROUP;
    uint16_t scale = table->scales[row * groups + at / GROUP];
    return f_mul(f_of_i(levels), f_of_bits(i_set1((int32_t)((uint32_t)scale << 16))));
}

/* Rows that far ahead are on their way from memory: in no order, no processor guesses them. */
enum { ROWS_AHEAD_OF_LOOKUP = 12 };

INLINE void fetch_row(const table_t *table, size_t row) {
    size_t size = table->kind == KIND_F32 ? 4 : table->kind == KIND_BF16 ? 2 : 1;
    const char *from = (const char *)table->values + row * table->width * size;
    for (size_t at = 0; at < table->width * size; at += 64) fetch_near(from + at);
}

void lookup(const table_t *table, const int64_t *ids, size_t id_stride, size_t count, int adds,
            float *out) {
    for (size_t i = 0; i < count; i++, out += table->width) {
        if (i + ROWS_AHEAD_OF_LOOKUP < count) fetch_row(table, (size_t)ids[(i + ROWS_AHEAD_OF_LOOKUP) * id_stride]);
        for (size_t at = 0; at < table->width; at += 16) {
            mask16 mask = lanes(table->width - at);
            f32x16 values = values_at(table, (size_t)ids[i * id_stride], at);
            if (adds) values = f_add(f_load_some(mask, out + at), values);
            f_store_some(out + at, mask, values);
        }
    }
}

END_SIMD
#endif
