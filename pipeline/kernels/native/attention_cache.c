/* Keys and values into the cache and about in it, in the layout and the numbers attention.c reads. */
#include "attention.h"

#include <string.h>

#if defined(VEILPIPE_SIMD)

/* Where the row `i` of a span belongs, from a head's first block; `step` is that of positions. */
static size_t row_place(const step_t *job, const part_t *part, size_t i, size_t step) {
    size_t position = (size_t)part->span->start + i;
    return position / BLOCK * job->block_bytes + position % BLOCK * step * job->number;
}

/* The key of row `i` of a span; its value follows those of all heads. */
static const float *key_of(const step_t *job, const part_t *part, size_t i) {
    const attention_t *shape = job->shape;
    return shape->qkv + ((size_t)part->span->row_offset + i) * shape->row_stride +
           (shape->num_heads + part->kv_head) * shape->head_dim;
}

/* The greatest halves there are instead of infinities; what is no number stays so. */
INLINE f32x16 within_halves(f32x16 x) {
    const f32x16 most = f_set1(65504.0f), least = f_set1(-65504.0f);
    return f_max(least, f_min(most, x));
}

void append_keys(const step_t *job, const part_t *part) {
    for (size_t i = 0; i < (size_t)part->span->count; i++) {
        const float *key = key_of(job, part, i);
        char *to = part->keys + row_place(job, part, i, 1);
        for (size_t d = 0; d < job->shape->head_dim; d += BLOCK) {
            uint16_t halves[BLOCK];
            if (job->shape->is_half) f_store_halves(halves, within_halves(f_load(key + d)));
            for (size_t j = 0; j < BLOCK; j++) {
                size_t at = (d + j) * BLOCK;
                if (job->shape->is_half) ((uint16_t *)to)[at] = halves[j];
                else ((float *)to)[at] = key[d + j];
            }
        }
    }
}

void append_values(const step_t *job, const part_t *part) {
    size_t head_dim = job->shape->head_dim;
    for (size_t i = 0; i < (size_t)part->span->count; i++) {
        const float *value = key_of(job, part, i) + job->shape->num_kv_heads * head_dim;
        char *to = part->values + row_place(job, part, i, head_dim);
        if (!job->shape->is_half) {
            memcpy(to, value, head_dim * sizeof(float));
            continue;
        }
        for (size_t d = 0; d < head_dim; d += BLOCK) {
            f_store_halves(to + d * job->number, within_halves(f_load(value + d)));
        }
    }
}

/* Turns the keys of a few rows of one block, [head_dim, BLOCK], on their way to another place. */
INLINE void turn(const slide_t *job, const char *from, char *to, size_t count, int is_half) {
    const size_t half = job->head_dim / 2, step = BLOCK * (is_half ? 2 : 4);
    const mask16 mask = lanes(count);
    for (size_t j = 0; j < half; j++) {
        const size_t at[] = {j * step, (j + half) * step};
        const f32x16 cosine = f_set1(job->cosines[j]), sine = f_set1(job->sines[j]);
        f32x16 x[2], y[2];
        for (int i = 0; i < 2; i++) {
            x[i] = is_half ? f_load_some_halves(mask, from + at[i])
                           : f_load_some(mask, from + at[i]);
        }
        y[0] = f_fma(x[0], cosine, f_mul(x[1], sine));
        y[1] = f_fnma(x[0], sine, f_mul(x[1], cosine));
        for (int i = 0; i < 2; i++) {
            if (is_half) f_store_some_halves(to + at[i], mask, within_halves(y[i]));
            else f_store_some(to + at[i], mask, y[i]);
        }
    }
}

/* One head's rows, downwards and in ascending order, so that none is overwritten before its turn. */
static void slide_head(void *data, size_t head) {
    const slide_t *job = data;
    const size_t number = job->is_half ? 2 : 4, row = job->head_dim * number, block = BLOCK * row;
    char *keys = (char *)job->keys + head * block, *values = (char *)job->values + head * block;
    for (size_t to = job->kept, last = job->held - job->dropped, count; to < last; to += count) {
        const size_t from = to + job->dropped, in_to = to % BLOCK, in_from = from % BLOCK;
        const size_t at_to = to / BLOCK * job->num_kv_heads * block;
        const size_t at_from = from / BLOCK * job->num_kv_heads * block;
        count = BLOCK - (in_to > in_from ? in_to : in_from);
        if (count > last - to) count = last - to;
        char *keys_to = keys + at_to + in_to * number, *keys_from = keys + at_from + in_from * number;
        if (job->is_half) turn(job, keys_from, keys_to, count, 1);
        else turn(job, keys_from, keys_to, count, 0);
        memmove(values + at_to + in_to * row, values + at_from + in_from * row, count * row);
    }
}

void slide(const slide_t *job) { pool_run(slide_head, (void *)job, job->num_kv_heads); }

END_SIMD
#endif
