/* What attends and what appends to the cache both know of a step. */
#ifndef VEILPIPE_ATTENTION_H
#define VEILPIPE_ATTENTION_H

#include "tiles.h"

#if defined(VEILPIPE_SIMD)

typedef struct {
    const attention_t *shape;
    size_t group; /* query heads per key head */
    float scale;
    size_t cut;                            /* of single rows: the parts that heads are cut into */
    size_t number, head_bytes, block_bytes; /* of the cache: one number, a head's block, all heads' */
} step_t;

/* A span's part for one key head. */
typedef struct {
    const span_t *span;
    size_t kv_head, task;
    char *keys, *values; /* of the head's first block */
} part_t;

INLINE size_t num_queries(const step_t *job, const span_t *span) {
    return (size_t)span->count * job->group;
}

INLINE part_t part_of(const step_t *job, const span_t *span, size_t kv_head, size_t task) {
    const attention_t *shape = job->shape;
    size_t at = (size_t)span->slot * (shape->max_seq / BLOCK) * job->block_bytes +
                kv_head * job->head_bytes;
    return (part_t){span, kv_head, task, (char *)shape->keys + at, (char *)shape->values + at};
}

/* attention_cache.c: a part's new keys and values to where the cache has them */
void append_keys(const step_t *job, const part_t *part);
void append_values(const step_t *job, const part_t *part);

#endif
#endif
