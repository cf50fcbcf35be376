/* Keys and values into the cache, in the layout and the numbers that attention.c reads. */
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
INLINE __m256i to_halves(const float *from) {
    const __m512 most = _mm512_set1_ps(65504.0f), least = _mm512_set1_ps(-65504.0f);
    __m512 x = _mm512_max_ps(least, _mm512_min_ps(most, _mm512_loadu_ps(from)));
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

void append_keys(const job_t *job, const part_t *part) {
    for (size_t i = 0; i < (size_t)part->span->count; i++) {
        const float *key = key_of(job, part, i);
        char *to = part->keys + place_of(job, part, i, 1);
        for (size_t d = 0; d < job->shape->head_dim; d += BLOCK) {
            uint16_t halves[BLOCK];
            if (job->shape->is_half) _mm256_storeu_si256((__m256i *)halves, to_halves(key + d));
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
            _mm256_storeu_si256((__m256i *)(to + d * job->number), to_halves(value + d));
        }
    }
}

END_SIMD
#endif
