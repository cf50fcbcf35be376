/* Cached attention. Scores and mixtures are tiles of a float32 product, as in linear.c:
 * keys [slot][kv_head][max_seq/16][head_dim][16] are packed weights with positions for outputs,
 * values [slot][kv_head][max_seq][head_dim] have head_dim for outputs and positions for inputs.
 *
 * A query is one head of one row. Heads that share keys and rows of one span form tiles; each query
 * has its own bounds, and positions of a tile outside them weigh exactly zero.
 */
#include "tiles.h"

#include <string.h>

#if defined(VEILPIPE_X86)

enum { QUERIES_PER_TASK = 48, SHORT_BLOCKS = 24 };

typedef struct {
    const attention_t *shape;
    size_t group; /* query heads per key head */
    float scale;
    int appends; /* attending tasks append too: every span is one row and one task */
    size_t num_chunks;
} job_t;

/* A span's part for one key head. */
typedef struct {
    const span_t *span;
    size_t kv_head, task;
    float *keys, *values;
    const float *next_keys; /* of the part this thread probably does next */
} part_t;

static size_t num_queries(const job_t *job, const span_t *span) {
    return (size_t)span->count * job->group;
}

static part_t part_of(const job_t *job, const span_t *span, size_t kv_head, size_t task) {
    const attention_t *shape = job->shape;
    size_t at = ((size_t)span->slot * shape->num_kv_heads + kv_head) * shape->max_seq *
                shape->head_dim;
    return (part_t){span, kv_head, task, shape->keys + at, shape->values + at, shape->keys + at};
}

static void append(const job_t *job, const part_t *part) {
    const attention_t *shape = job->shape;
    size_t head_dim = shape->head_dim, start = (size_t)part->span->start;
    const float *row = shape->qkv + (size_t)part->span->row_offset * shape->row_stride;
    const float *key = row + (shape->num_heads + part->kv_head) * head_dim;
    const float *value = key + shape->num_kv_heads * head_dim;
    for (size_t i = 0; i < (size_t)part->span->count; i++) {
        size_t position = start + i;
        float *to = part->keys + position / BLOCK * head_dim * BLOCK + position % BLOCK;
        for (size_t d = 0; d < head_dim; d++) to[d * BLOCK] = key[d];
        memcpy(part->values + position * head_dim, value, head_dim * sizeof(float));
        key += shape->row_stride;
        value += shape->row_stride;
    }
}

/* Queries first..first + count of a part: positions they see, and room to compute in. */
typedef struct {
    size_t first, count;
    size_t first_block, num_blocks; /* of 16 positions, seen by any of them */
    size_t stride;                  /* of scores */
    float *scores, *queries, *mixed;
} tile_t;

static size_t position_of(const job_t *job, const part_t *part, size_t query) {
    return (size_t)part->span->start + query / job->group;
}

static size_t oldest_seen(const job_t *job, size_t position) {
    size_t window = job->shape->window;
    return window && position + 1 > window ? position + 1 - window : 0;
}

/* The query's first element within a row-major [rows, stride] matrix of heads. */
static size_t offset_of(const job_t *job, const part_t *part, size_t query, size_t stride) {
    size_t row = (size_t)part->span->row_offset + query / job->group;
    return row * stride + (part->kv_head * job->group + query % job->group) * job->shape->head_dim;
}

/* Where to fetch from, in bytes behind what is read: the stream that comes next, for most are over
 * before hardware notices them; of long contexts, which it follows, a little ahead in the same. */
static ptrdiff_t ahead(const tile_t *tile, const float *next, const float *current,
                       size_t k_stride) {
    if (tile->num_blocks > SHORT_BLOCKS) return (ptrdiff_t)(AHEAD * k_stride);
    return (const char *)next - (const char *)current;
}

static void score(const job_t *job, const part_t *part, const tile_t *tile) {
    size_t head_dim = job->shape->head_dim, block_size = head_dim * BLOCK * sizeof(float);
    for (size_t i = 0; i < tile->count; i++) {
        memcpy(tile->queries + i * head_dim,
               job->shape->qkv + offset_of(job, part, tile->first + i, job->shape->row_stride),
               head_dim * sizeof(float));
    }
    const char *keys = (const char *)part->keys + tile->first_block * block_size;
    size_t block = 0;
    for (size_t width = 4; width > 0; width /= 2) {
        size_t step = (tile->num_blocks - block) / width; /* long streams, as in linear.c */
        for (size_t i = 0; i < step; i++) {
            tile_rows(tile->count, width)(tile->scores + (block + i) * BLOCK, tile->stride,
                                         step * BLOCK, (const char *)tile->queries,
                                         head_dim * sizeof(float), keys + (block + i) * block_size,
                                         step * block_size, BLOCK * sizeof(float), head_dim,
                                         ahead(tile, part->values, part->keys, VECTOR));
        }
        block += step * width;
    }
}

/* Scores of one query to unnormalised weights, zero where it does not look; returns their sum. */
static float weigh(const job_t *job, const tile_t *tile, float *scores, size_t oldest,
                   size_t newest) {
    const __m512 scale = _mm512_set1_ps(job->scale);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_set1_epi32((int)(oldest - tile->first_block * BLOCK));
    const __m512i high = _mm512_set1_epi32((int)(newest - tile->first_block * BLOCK));
    __m512 greatest = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (size_t at = 0; at < tile->num_blocks * BLOCK; at += BLOCK) {
        __m512i here = _mm512_add_epi32(lane, _mm512_set1_epi32((int)at));
        __mmask16 seen = _mm512_cmpge_epi32_mask(here, low) & _mm512_cmple_epi32_mask(here, high);
        greatest = _mm512_mask_max_ps(greatest, seen, greatest, _mm512_loadu_ps(scores + at));
    }
    greatest = _mm512_set1_ps(_mm512_reduce_max_ps(greatest));
    for (size_t at = 0; at < tile->num_blocks * BLOCK; at += BLOCK) {
        __m512i here = _mm512_add_epi32(lane, _mm512_set1_epi32((int)at));
        __mmask16 seen = _mm512_cmpge_epi32_mask(here, low) & _mm512_cmple_epi32_mask(here, high);
        __m512 weight = _mm512_sub_ps(_mm512_loadu_ps(scores + at), greatest);
        weight = _mm512_maskz_mov_ps(seen, exp_ps(_mm512_mul_ps(weight, scale)));
        _mm512_storeu_ps(scores + at, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
}

/* mixed[count][head_dim] = weights times values, from the oldest that any of the queries sees. */
static void mix(const job_t *job, const part_t *part, const tile_t *tile) {
    size_t head_dim = job->shape->head_dim;
    size_t oldest = oldest_seen(job, position_of(job, part, tile->first));
    size_t newest = position_of(job, part, tile->first + tile->count - 1);
    const char *values = (const char *)(part->values + oldest * head_dim);
    const char *weights = (const char *)(tile->scores + oldest - tile->first_block * BLOCK);
    for (size_t b = 0, width = 4; b < head_dim / BLOCK; b += width) {
        while (width > head_dim / BLOCK - b) width /= 2;
        tile_rows(tile->count, width)(tile->mixed + b * BLOCK, head_dim, BLOCK, weights,
                                      tile->stride * sizeof(float),
                                      values + b * BLOCK * sizeof(float), BLOCK * sizeof(float),
                                      head_dim * sizeof(float), newest + 1 - oldest,
                                      ahead(tile, part->next_keys, part->values,
                                            head_dim * sizeof(float)));
    }
}

static int has_nan(const float *mixed, size_t count) {
    __mmask16 found = 0;
    for (size_t i = 0; i < count; i += BLOCK) {
        __m512 each = _mm512_loadu_ps(mixed + i);
        found |= _mm512_cmp_ps_mask(each, each, _CMP_UNORD_Q);
    }
    return found != 0;
}

static void attend_tile(const job_t *job, const part_t *part, tile_t tile) {
    size_t head_dim = job->shape->head_dim;
    float *out = job->shape->out;
    tile.first_block = oldest_seen(job, position_of(job, part, tile.first)) / BLOCK;
    size_t newest = position_of(job, part, tile.first + tile.count - 1);
    tile.num_blocks = newest / BLOCK + 1 - tile.first_block;
    score(job, part, &tile);
    float sums[MAX_ATTENTION_ROWS];
    for (size_t i = 0; i < tile.count; i++) {
        size_t position = position_of(job, part, tile.first + i);
        sums[i] = weigh(job, &tile, tile.scores + i * tile.stride, oldest_seen(job, position),
                        position);
    }
    mix(job, part, &tile);
    if (tile.count > 1 && has_nan(tile.mixed, tile.count * head_dim)) {
        /* weighing nothing is not enough where values are infinite: see only one's own */
        for (size_t i = 0; i < tile.count; i++) {
            tile_t single = tile;
            single.first += i;
            single.count = 1;
            attend_tile(job, part, single);
        }
        return;
    }
    for (size_t i = 0; i < tile.count; i++) {
        float *to = out + offset_of(job, part, tile.first + i, job->shape->num_heads * head_dim);
        __m512 factor = _mm512_set1_ps(1.0f / sums[i]);
        for (size_t d = 0; d < head_dim; d += BLOCK) {
            __m512 mixed = _mm512_loadu_ps(tile.mixed + i * head_dim + d);
            _mm512_storeu_ps(to + d, _mm512_mul_ps(mixed, factor));
        }
    }
}

static void attend_part(const job_t *job, const part_t *part) {
    float queries[MAX_ATTENTION_ROWS * MAX_HEAD_DIM], mixed[MAX_ATTENTION_ROWS * MAX_HEAD_DIM];
    if (job->appends) append(job, part);
    size_t first = part->task * QUERIES_PER_TASK, end = first + QUERIES_PER_TASK;
    size_t limit = num_queries(job, part->span);
    end = end < limit ? end : limit;
    size_t num_tiles = (end - first + MAX_ATTENTION_ROWS - 1) / MAX_ATTENTION_ROWS;
    size_t stride = ((size_t)(part->span->start + part->span->count) / BLOCK + 1) * BLOCK;
    tile_t tile = {.queries = queries, .mixed = mixed, .stride = stride,
                   .scores = scratch(MAX_ATTENTION_ROWS * stride * sizeof(float))};
    for (size_t i = 0; i < num_tiles; i++) {
        tile.first = first + i * (end - first) / num_tiles;
        tile.count = first + (i + 1) * (end - first) / num_tiles - tile.first;
        attend_tile(job, part, tile);
    }
}

static size_t num_tasks(const job_t *job, const span_t *span) {
    return (num_queries(job, span) + QUERIES_PER_TASK - 1) / QUERIES_PER_TASK;
}

static part_t part_of_chunk(const job_t *job, size_t chunk) {
    const span_t *span = job->shape->spans;
    size_t kv_heads = job->shape->num_kv_heads;
    while (chunk >= num_tasks(job, span) * kv_heads) {
        chunk -= num_tasks(job, span) * kv_heads;
        span++;
    }
    return part_of(job, span, chunk % kv_heads, chunk / kv_heads);
}

static void attend_chunk(void *opaque, size_t chunk) {
    const job_t *job = opaque;
    part_t part = part_of_chunk(job, chunk);
    size_t next = chunk + pool_num_threads();
    if (next < job->num_chunks) part.next_keys = part_of_chunk(job, next).keys;
    attend_part(job, &part);
}

static void append_chunk(void *opaque, size_t chunk) {
    const job_t *job = opaque;
    size_t kv_heads = job->shape->num_kv_heads;
    part_t part = part_of(job, job->shape->spans + chunk / kv_heads, chunk % kv_heads, 0);
    append(job, &part);
}

void attend(const attention_t *shape) {
    job_t job = {.shape = shape, .group = shape->num_heads / shape->num_kv_heads, .appends = 1,
                 .scale = 1.0f / __builtin_sqrtf((float)shape->head_dim)};
    size_t tasks = 0;
    for (size_t i = 0; i < shape->num_spans; i++) {
        if (shape->spans[i].count > 1 || num_tasks(&job, shape->spans + i) > 1) job.appends = 0;
        tasks += num_tasks(&job, shape->spans + i);
    }
    if (!job.appends) pool_run(append_chunk, &job, shape->num_spans * shape->num_kv_heads);
    job.num_chunks = tasks * shape->num_kv_heads;
    pool_run(attend_chunk, &job, job.num_chunks);
}

END_SIMD
#endif
