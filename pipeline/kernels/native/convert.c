/* Weights in another format that stay in rows: tables, and what is written to files. */
#include "int4_tiles.h"

#if defined(VEILPIPE_SIMD)

typedef struct {
    matrix_t matrix;
    size_t count;
    int8_t *values;
    uint16_t *scales, *zeros; /* zeros: of int4 only */
} quantise_job_t;

/* A number for each group of a block's outputs, to where the first one's are. */
static void store_sides(const source_t *source, const i32x16 *found, size_t num_groups,
                        uint16_t *to) {
    for (size_t group = 0; group < SUPER / GROUP && group * GROUP < source->num_in; group++) {
        uint16_t each[BLOCK];
        i_store_words(each, found[group]);
        for (size_t out = 0; out < source->end; out++) to[out * num_groups + group] = each[out];
    }
}

/* As it would be packed, then in rows again. */
INLINE void quantise_block(const int STORED, const quantise_job_t *job, size_t block) {
    size_t num_in = job->matrix.num_in, num_groups = (num_in + GROUP - 1) / GROUP;
    source_t source = source_of(&job->matrix, 0, job->count, block);
    int8_t *values = job->values + block * BLOCK * num_in;
    size_t side = block * BLOCK * num_groups;
    do {
        tile_t tile;
        quads_t quads;
        i32x16 rows[16];
        sides_t sides;
        load(STORED, &source, &tile);
        if (job->zeros) quantise_tile_int4(&tile, &quads, &sides);
        else quantise_tile(&tile, &quads, sides.scales);
        for (size_t i = 0; i < 16; i++) rows[i] = i_load(quads.words[i]);
        transpose_16(rows);
        for (size_t out = 0; out < source.end; out++) {
            i_store_first_bytes(values + out * num_in, source.num_in, rows[out]);
        }
        store_sides(&source, sides.scales, num_groups, job->scales + side);
        if (job->zeros) store_sides(&source, sides.zeros, num_groups, job->zeros + side);
        values += SUPER;
        side += SUPER / GROUP;
    } while (advance(&source));
}

static void quantise_chunk(void *opaque, size_t block) {
    const quantise_job_t *job = opaque;
    switch (job->matrix.stored) {
    case STORED_F32: quantise_block(STORED_F32, job, block); break;
    case STORED_BF16: quantise_block(STORED_BF16, job, block); break;
    default: quantise_block(STORED_F16, job, block);
    }
}

void quantise(const matrix_t *matrix, size_t count, int8_t *values, uint16_t *scales) {
    quantise_job_t job = {*matrix, count, values, scales, NULL};
    pool_run(quantise_chunk, &job, (count + BLOCK - 1) / BLOCK);
}

void quantise_int4(const matrix_t *matrix, size_t count, uint8_t *levels, uint16_t *scales,
                   uint16_t *zeros) {
    quantise_job_t job = {*matrix, count, (int8_t *)levels, scales, zeros};
    pool_run(quantise_chunk, &job, (count + BLOCK - 1) / BLOCK);
}

enum { CONVERTED = 1 << 16 }; /* numbers of a chunk: what a core's nearer cache holds */

typedef struct {
    int stored, kind;
    const char *src;
    char *dst;
    size_t count;
} convert_job_t;

INLINE void convert_run(const int STORED, const int KIND, const convert_job_t *job, size_t first,
                        size_t end) {
    const size_t size = STORED == STORED_F32 ? sizeof(float) : sizeof(uint16_t);
    for (size_t i = first; i < end; i += 16) {
        mask16 mask = lanes(end - i);
        f32x16 values = floats_at(STORED, job->src + i * size, mask);
        if (KIND == KIND_F32) {
            f_store_some(job->dst + i * sizeof(float), mask, values);
        } else {
            i_store_some_words(job->dst + i * sizeof(uint16_t), mask, rounded(STORED, values));
        }
    }
}

static void convert_chunk(void *opaque, size_t chunk) {
    const convert_job_t *job = opaque;
    size_t first = chunk * CONVERTED, end = first + CONVERTED;
    if (end > job->count) end = job->count;
#define TO_BOTH(STORED)                                                                            \
    if (job->stored == STORED) {                                                                   \
        if (job->kind == KIND_F32) convert_run(STORED, KIND_F32, job, first, end);                 \
        else convert_run(STORED, KIND_BF16, job, first, end);                                      \
    }
    TO_BOTH(STORED_F32)
    TO_BOTH(STORED_BF16)
    TO_BOTH(STORED_F16)
}

void convert(int stored, const void *src, int kind, void *dst, size_t count) {
    convert_job_t job = {stored, kind, src, dst, count};
    pool_run(convert_chunk, &job, (count + CONVERTED - 1) / CONVERTED);
}

END_SIMD
#endif
