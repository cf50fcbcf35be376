/* Attention over rows that lie one after the other, with the logs of its sums: what somebody asks
 * who keeps no cache here, and has scaled his queries. */
#include "tiles.h"

#include <math.h>

#if defined(VEILPIPE_SIMD)

/* Of one query with every row, and the greatest. */
static float dot_rows(const held_rows_t *held, const float *query, const float *keys,
                      float *scores) {
    float greatest = -__builtin_inff();
    for (size_t row = 0; row < held->num_rows; row++, keys += held->width) {
        f32x16 sum = f_zero();
        for (size_t i = 0; i < held->width; i += BLOCK) {
            sum = f_fma(f_load(query + i), f_load(keys + i), sum);
        }
        float score = f_sum(sum);
        scores[row] = score;
        if (!(score <= greatest)) greatest = score; /* what is no number is not passed over */
    }
    return greatest;
}

/* Scores to unnormalised weights; returns their sum. */
static float exp_all(float *scores, size_t count, float greatest) {
    f32x16 sum = f_zero(), most = f_set1(greatest);
    for (size_t i = 0; i < count; i += BLOCK) {
        mask16 mask = lanes(count - i);
        f32x16 weight = exp_ps(f_sub(f_load_some(mask, scores + i), most));
        f_store_some(scores + i, mask, weight);
        sum = f_add(sum, f_keep(mask, weight));
    }
    return f_sum(sum);
}

/* Some queries of a head: outputs [count][width], log-sums [count]. */
static void attend_queries(const held_rows_t *held, size_t head, size_t first, size_t count,
                           float *scores) {
    size_t width = held->width, num_rows = held->num_rows, at = head * held->num_queries + first;
    const float *keys = held->keys + head * held->head_stride;
    const float *values = held->values + head * held->head_stride;
    float sums[MAX_ATTENTION_ROWS];
    for (size_t i = 0; i < count; i++) {
        float *own = scores + i * num_rows;
        float greatest = dot_rows(held, held->queries + (at + i) * width, keys, own);
        sums[i] = exp_all(own, num_rows, greatest);
        held->log_sums[at + i] = (double)greatest + log((double)sums[i]);
    }
    float *out = held->outputs + at * width;
    for (size_t b = 0, step = widest(count); b < width / BLOCK; b += step) {
        while (step > width / BLOCK - b) step /= 2;
        tile_rows(0, count, step)(out + b * BLOCK, width, BLOCK, (const char *)scores,
                                  num_rows * sizeof(float), (const char *)(values + b * BLOCK),
                                  BLOCK * sizeof(float), width * sizeof(float), num_rows, 0);
    }
    for (size_t i = 0; i < count * width; i++) out[i] /= sums[i / width];
}

void attend_rows(const held_rows_t *held) {
    float *scores = scratch(MAX_ATTENTION_ROWS * held->num_rows * sizeof(float));
    for (size_t head = 0; head < held->num_heads; head++) {
        for (size_t first = 0, count; first < held->num_queries; first += count) {
            count = held->num_queries - first;
            if (count > MAX_ATTENTION_ROWS) count = MAX_ATTENTION_ROWS;
            attend_queries(held, head, first, count, scores);
        }
    }
}

END_SIMD
#endif
