/* Keys and values into the cache and about in it, in the layout and the numbers attention.c reads. */
#include "attention.h"

#include <string.h>

#if defined(VEILPIPE_X86)

/* Where the row `i` of a span belongs, from a head's first block; `step` is that of positions. */
static size_t place_of(const job_t *job, const part_t *part, size_t i, size_t step) {
    size_t position = (size_t)part->span->start + i;
    return position / BLOCK * job->block_bytes + position % BLOCK * step * job->number;
}

/* The key of row `i` of a span; its value follows those of all heads. */
static const float *key_of(const job_t *job, const part_t *part, size_t i) {
    const attention_t *shape = job->shape;
    return shape->qkv + ((size_t)part->span->row_offset + i) * shape->row_stride +
           (shape->num_heads + part->kv_head) * shape->head_dim;
}

/* The nearest halves, the greatest there are instead of infinities; what is no number stays so. */
INLINE __m256i to_halves(__m512 x) {
    const __m512 most = _mm512_set1_ps(65504.0f), least = _mm512_set1_ps(-65504.0f);
    x = _mm512_max_ps(least, _mm512_min_ps(most, x));
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

void append_keys(const job_t *job, const part_t *part) {
    for (size_t i = 0; i < (size_t)part->span->count; i++) {
        const float *key = key_of(job, part, i);
        char *to = part->keys + place_of(job, part, i, 1);
        for (size_t d = 0; d < job->shape->head_dim; d += BLOCK) {
            uint16_t halves[BLOCK];
            if (job->shape->is_half) {
                _mm256_storeu_si256((__m256i *)halves, to_halves(_mm512_loadu_ps(key + d)));
            }
            for (size_t j = 0; j < BLOCK; j++) {
                size_t at = (d + j) * BLOCK;
                if (job->shape->is_half) ((uint16_t *)to)[at] = halves[j];
                else ((float *)to)[at] = key[d + j];
            }
        }
    }
}

void append_values(const job_t *job, const part_t *part) {
    size_t head_dim = job->shape->head_dim;
    for (size_t i = 0; i < (size_t)part->span->count; i++) {
        const float *value = key_of(job, part, i) + job->shape->num_kv_heads * head_dim;
        char *to = part->values + place_of(job, part, i, head_dim);
        if (!job->shape->is_half) {
            memcpy(to, value, head_dim * sizeof(float));
            continue;
        }
        for (size_t d = 0; d < head_dim; d += BLOCK) {
            __m256i halves = to_halves(_mm512_loadu_ps(value + d));
            _mm256_storeu_si256((__m256i *)(to + d * job->number), halves);
        }
    }
}

/* Turns the keys of a few rows of one block, [head_dim, BLOCK], on their way to another place. */
INLINE void turn(const slide_t *job, const char *from, char *to, size_t count, int is_half) {
    const size_t half = job->head_dim / 2, step = BLOCK * (is_half ? 2 : 4);
    const __mmask16 mask = lanes(count);
    for (size_t j = 0; j < half; j++) {
        const size_t at[] = {j * step, (j + half) * step};
        const __m512 cosine = _mm512_set1_ps(job->cosines[j]), sine = _mm512_set1_ps(job->sines[j]);
        __m512 x[2], y[2];
        for (int i = 0; i < 2; i++) {
            x[i] = is_half ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + at[i]))
                           : _mm512_maskz_loadu_ps(mask, from + at[i]);
        }
        y[0] = _mm512_fmadd_ps(x[0], cosine, _mm512_mul_ps(x[1], sine));
        y[1] = _mm512_fnmadd_ps(x[0], sine, _mm512_mul_ps(x[1], cosine));
        for (int i = 0; i < 2; i++) {
            if (is_half) _mm256_mask_storeu_epi16(to + at[i], mask, to_halves(y[i]));
            else _mm512_mask_storeu_ps(to + at[i], mask, y[i]);
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
