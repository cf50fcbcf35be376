/* Cached attention. Scores and mixtures are tiles of a float32 product, as in linear.c:
 * keys [slot][max_seq/16][kv_head][head_dim][16] are packed weights with positions for outputs,
 * values [slot][max_seq/16][kv_head][16][head_dim] have head_dim for outputs and positions for
 * inputs. What a step of single rows reads of a slot lies together, in the order of reading.
 *
 * Both are float32, or IEEE halves that are widened as they are read: all sums are in float32.
 *
 * A query is one head of one row. Heads that share keys and rows of one span form tiles; each query
 * has its own bounds, and positions of a tile outside them weigh exactly zero.
 */
#include "attention.h"

#include <string.h>

#if defined(VEILPIPE_SIMD)

enum { QUERIES_PER_TASK = 48, CHUNKS_PER_THREAD = 2 };

/* Queries first..first + count of a part: positions they see, and room to compute in. */
typedef struct {
    size_t first, count;
    size_t first_block, num_blocks; /* of 16 positions, seen by any of them */
    size_t stride;                  /* of scores */
    float *scores, *queries, *mixed;
} queries_t;

static size_t position_of(const step_t *job, const part_t *part, size_t query) {
    return (size_t)part->span->start + query / job->group;
}

static size_t oldest_seen(const step_t *job, size_t position) {
    size_t window = job->shape->window;
    return window && position + 1 > window ? position + 1 - window : 0;
}

/* The query's first element within a row-major [rows, stride] matrix of heads. */
static size_t offset_of(const step_t *job, const part_t *part, size_t query, size_t stride) {
    size_t row = (size_t)part->span->row_offset + query / job->group;
    return row * stride + (part->kv_head * job->group + query % job->group) * job->shape->head_dim;
}

static void score(const step_t *job, const part_t *part, const queries_t *tile) {
    size_t head_dim = job->shape->head_dim, block_bytes = job->block_bytes;
    for (size_t i = 0; i < tile->count; i++) {
        memcpy(tile->queries + i * head_dim,
               job->shape->qkv + offset_of(job, part, tile->first + i, job->shape->row_stride),
               head_dim * sizeof(float));
    }
    const char *keys = part->keys + tile->first_block * block_bytes;
    size_t block = 0;
    for (size_t width = widest(tile->count); width > 0; width /= 2) {
        size_t step = (tile->num_blocks - block) / width; /* long streams, as in linear.c */
        for (size_t i = 0; i < step; i++) {
            rows_fn run = tile_rows(job->shape->is_half, tile->count, width);
            run(tile->scores + (block + i) * BLOCK, tile->stride, step * BLOCK,
                (const char *)tile->queries, head_dim * sizeof(float),
                keys + (block + i) * block_bytes, step * block_bytes, BLOCK * job->number, head_dim,
                0);
        }
        block += step * width;
    }
}

/* A score that no position has, as scores are before they are scaled: of a head's sink. */
static float sink_of(const step_t *job, size_t head) {
    const float *sinks = job->shape->sinks;
    if (!sinks) return -__builtin_inff();
    return sinks[head] / job->scale;
}

/* Scores of one query to unnormalised weights, zero where it does not look; returns their sum, with
 * the sink's. */
static float weigh(const step_t *job, const queries_t *tile, float *scores, size_t oldest,
                   size_t newest, float sink) {
    const f32x16 scale = f_set1(job->scale);
    static const int32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i32x16 lane = i_load(numbers);
    const i32x16 low = i_set1((int)(oldest - tile->first_block * BLOCK));
    const i32x16 high = i_set1((int)(newest - tile->first_block * BLOCK));
    f32x16 greatest = f_set1(-__builtin_inff()), sum = f_zero();
    for (size_t at = 0; at < tile->num_blocks * BLOCK; at += BLOCK) {
        i32x16 here = i_add(lane, i_set1((int)at));
        mask16 seen = i_ge(here, low) & i_ge(high, here);
        greatest = f_select(seen, f_max(greatest, f_load(scores + at)), greatest);
    }
    float most = f_greatest(greatest);
    greatest = f_set1(sink > most ? sink : most);
    for (size_t at = 0; at < tile->num_blocks * BLOCK; at += BLOCK) {
        i32x16 here = i_add(lane, i_set1((int)at));
        mask16 seen = i_ge(here, low) & i_ge(high, here);
        f32x16 weight = f_sub(f_load(scores + at), greatest);
        weight = f_keep(seen, exp_ps(f_mul(weight, scale)));
        f_store(scores + at, weight);
        sum = f_add(sum, weight);
    }
    f32x16 rest = f_sub(f_set1(sink), greatest); /* nothing beside 1 without one */
    return f_sum(sum) + f_first(exp_ps(f_mul(rest, scale)));
}

/* mixed[count][head_dim] (+)= one block's weights times its values, of positions first..end. */
static void mix_block(const step_t *job, size_t count, float *mixed, const float *weights,
                      size_t stride, const char *values, size_t first, size_t end, int adds) {
    size_t head_dim = job->shape->head_dim, step = BLOCK * job->number;
    for (size_t b = 0, width = widest(count); b < head_dim / BLOCK; b += width) {
        while (width > head_dim / BLOCK - b) width /= 2;
        rows_fn run = tile_rows(job->shape->is_half, count, width);
        run(mixed + b * BLOCK, head_dim, BLOCK, (const char *)(weights + first),
            stride * sizeof(float), values + first * head_dim * job->number + b * step, step,
            head_dim * job->number, end - first, adds);
    }
}

/* mixed[count][head_dim] = weights times values, from the oldest that any of the queries sees. */
static void mix(const step_t *job, const part_t *part, const queries_t *tile) {
    size_t oldest = oldest_seen(job, position_of(job, part, tile->first));
    size_t newest = position_of(job, part, tile->first + tile->count - 1);
    for (size_t i = 0; i < tile->num_blocks; i++) {
        size_t block = tile->first_block + i, left = newest + 1 - block * BLOCK;
        mix_block(job, tile->count, tile->mixed, tile->scores + i * BLOCK, tile->stride,
                  part->values + block * job->block_bytes, i ? 0 : oldest % BLOCK,
                  left < BLOCK ? left : BLOCK, i > 0);
    }
}

static int has_nan(const float *mixed, size_t count) {
    mask16 found = 0;
    for (size_t i = 0; i < count; i += BLOCK) {
        f32x16 each = f_load(mixed + i);
        found |= f_unordered(each, each);
    }
    return found != 0;
}

static void put(const float *mixed, float sum, size_t head_dim, float *out) {
    f32x16 factor = f_set1(1.0f / sum);
    for (size_t d = 0; d < head_dim; d += BLOCK) {
        f_store(out + d, f_mul(f_load(mixed + d), factor));
    }
}

static void attend_tile(const step_t *job, const part_t *part, queries_t tile) {
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
                        position,
                        sink_of(job, part->kv_head * job->group + (tile.first + i) % job->group));
    }
    mix(job, part, &tile);
    if (tile.count > 1 && has_nan(tile.mixed, tile.count * head_dim)) {
        /* weighing nothing is not enough where values are infinite: see only one's own */
        for (size_t i = 0; i < tile.count; i++) {
            queries_t single = tile;
            single.first += i;
            single.count = 1;
            attend_tile(job, part, single);
        }
        return;
    }
    for (size_t i = 0; i < tile.count; i++) {
        put(tile.mixed + i * head_dim, sums[i], head_dim,
            out + offset_of(job, part, tile.first + i, job->shape->num_heads * head_dim));
    }
}

static void attend_part(const step_t *job, const part_t *part) {
    float queries[MAX_ATTENTION_ROWS * MAX_HEAD_DIM], mixed[MAX_ATTENTION_ROWS * MAX_HEAD_DIM];
    size_t first = part->task * QUERIES_PER_TASK, end = first + QUERIES_PER_TASK;
    size_t limit = num_queries(job, part->span);
    end = end < limit ? end : limit;
    size_t num_tiles = (end - first + MAX_ATTENTION_ROWS - 1) / MAX_ATTENTION_ROWS;
    size_t stride = ((size_t)(part->span->start + part->span->count) / BLOCK + 1) * BLOCK;
    queries_t tile = {.queries = queries, .mixed = mixed, .stride = stride,
                   .scores = scratch(MAX_ATTENTION_ROWS * stride * sizeof(float))};
    for (size_t i = 0; i < num_tiles; i++) {
        tile.first = first + i * (end - first) / num_tiles;
        tile.count = first + (i + 1) * (end - first) / num_tiles - tile.first;
        attend_tile(job, part, tile);
    }
}

static size_t num_tasks(const step_t *job, const span_t *span) {
    return (num_queries(job, span) + QUERIES_PER_TASK - 1) / QUERIES_PER_TASK;
}

static part_t part_of_chunk(const step_t *job, size_t chunk) {
    const span_t *span = job->shape->spans;
    size_t kv_heads = job->shape->num_kv_heads;
    while (chunk >= num_tasks(job, span) * kv_heads) {
        chunk -= num_tasks(job, span) * kv_heads;
        span++;
    }
    return part_of(job, span, chunk % kv_heads, chunk / kv_heads);
}

static void attend_chunk(void *opaque, size_t chunk) {
    const step_t *job = opaque;
    part_t part = part_of_chunk(job, chunk);
    attend_part(job, &part);
}

static void append_chunk(void *opaque, size_t chunk) {
    const step_t *job = opaque;
    size_t kv_heads = job->shape->num_kv_heads;
    part_t part = part_of(job, job->shape->spans + chunk / kv_heads, chunk % kv_heads, 0);
    append_keys(job, &part);
    append_values(job, &part);
}

/* Some heads of the only row of a span, from that of `part` on. They go through blocks of positions
 * together, as these lie in memory; keys and values are appended just before they are read. */
static void score_row(const step_t *job, part_t part, const queries_t *tile, size_t num_heads) {
    size_t head_dim = job->shape->head_dim, last = tile->num_blocks - 1;
    const float *queries = job->shape->qkv + offset_of(job, &part, 0, job->shape->row_stride);
    const char *keys = part.keys + tile->first_block * job->block_bytes;
    rows_fn run = tile_rows(job->shape->is_half, job->group, 1);
    for (size_t i = 0; i <= last; i++, keys += job->block_bytes) {
        for (size_t head = 0; head < num_heads; head++) {
            part_t own = part_of(job, part.span, part.kv_head + head, 0);
            if (i == last) append_keys(job, &own);
            size_t query = head * job->group;
            run(tile->scores + query * tile->stride + i * BLOCK, tile->stride, BLOCK,
                (const char *)(queries + query * head_dim), head_dim * sizeof(float),
                keys + head * job->head_bytes, 0, BLOCK * job->number, head_dim, 0);
        }
    }
}

static void mix_row(const step_t *job, part_t part, const queries_t *tile, size_t num_heads) {
    size_t head_dim = job->shape->head_dim, last = tile->num_blocks - 1;
    size_t newest = position_of(job, &part, 0), oldest = oldest_seen(job, newest);
    const char *values = part.values + tile->first_block * job->block_bytes;
    for (size_t i = 0; i <= last; i++, values += job->block_bytes) {
        for (size_t head = 0; head < num_heads; head++) {
            part_t own = part_of(job, part.span, part.kv_head + head, 0);
            if (i == last) append_values(job, &own);
            size_t query = head * job->group;
            mix_block(job, job->group, tile->mixed + query * head_dim,
                      tile->scores + query * tile->stride + i * BLOCK, tile->stride,
                      values + head * job->head_bytes, i ? 0 : oldest % BLOCK,
                      i == last ? newest % BLOCK + 1 : BLOCK, i > 0);
        }
    }
}

static void attend_row(const step_t *job, part_t part, size_t num_heads) {
    size_t head_dim = job->shape->head_dim, num_queries = num_heads * job->group;
    size_t newest = position_of(job, &part, 0), oldest = oldest_seen(job, newest);
    queries_t tile = {.first_block = oldest / BLOCK};
    tile.num_blocks = newest / BLOCK + 1 - tile.first_block;
    tile.stride = tile.num_blocks * BLOCK;
    tile.scores = scratch(num_queries * (tile.stride + head_dim + 1) * sizeof(float));
    tile.mixed = tile.scores + num_queries * tile.stride;
    float *sums = tile.mixed + num_queries * head_dim;
    score_row(job, part, &tile, num_heads);
    for (size_t i = 0; i < num_queries; i++) {
        sums[i] = weigh(job, &tile, tile.scores + i * tile.stride, oldest, newest,
                        sink_of(job, part.kv_head * job->group + i));
    }
    mix_row(job, part, &tile, num_heads);
    float *out = job->shape->out + offset_of(job, &part, 0, job->shape->num_heads * head_dim);
    for (size_t i = 0; i < num_queries; i++) {
        put(tile.mixed + i * head_dim, sums[i], head_dim, out + i * head_dim);
    }
}

static void row_chunk(void *opaque, size_t chunk) {
    const step_t *job = opaque;
    size_t heads = job->shape->num_kv_heads, at = chunk % job->cut;
    size_t first = at * heads / job->cut, end = (at + 1) * heads / job->cut;
    attend_row(job, part_of(job, job->shape->spans + chunk / job->cut, first, 0), end - first);
}

void attend(const attention_t *shape) {
    step_t job = {.shape = shape, .group = shape->num_heads / shape->num_kv_heads,
                 .scale = 1.0f / __builtin_sqrtf((float)shape->head_dim),
                 .number = shape->is_half ? sizeof(uint16_t) : sizeof(float)};
    job.head_bytes = shape->head_dim * BLOCK * job.number;
    job.block_bytes = shape->num_kv_heads * job.head_bytes;
    size_t tasks = 0, heads = shape->num_kv_heads;
    int are_rows = job.group <= MAX_ATTENTION_ROWS;
    for (size_t i = 0; i < shape->num_spans; i++) {
        if (shape->spans[i].count > 1) are_rows = 0;
        tasks += num_tasks(&job, shape->spans + i);
    }
    if (are_rows) {
        size_t wanted = pool_num_threads() == 1 ? 1 : CHUNKS_PER_THREAD * pool_num_threads();
        job.cut = (wanted + shape->num_spans - 1) / shape->num_spans;
        job.cut = job.cut < heads ? job.cut : heads;
        pool_run(row_chunk, &job, shape->num_spans * job.cut);
    } else {
        pool_run(append_chunk, &job, shape->num_spans * heads);
        pool_run(attend_chunk, &job, tasks * heads);
    }
}

END_SIMD
#endif
