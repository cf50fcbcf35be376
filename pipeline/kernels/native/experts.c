/* MLPs side by side, of which each row passes through those that its router's logits choose.
 *
 * Rows of an expert are multiplied together. What each makes of a row is added up in their order,
 * so a row's result does not depend on the rows beside it.
 */
#include "simd.h"

#include <stdlib.h>
#include <string.h>

#if defined(VEILPIPE_SIMD)

typedef struct {
    float *shares, *x, *wide, *inner, *y;
    size_t *rows;
    uint8_t *is_chosen; /* [rows, experts] */
} room_t;

/* In one piece, beginning at `shares`; 0 where there is none. */
static int take_room(const experts_t *job, room_t *room) {
    size_t floats = job->num_experts + 2 * job->hidden + 3 * job->inner;
    size_t bytes = job->rows * (floats * sizeof(float) + sizeof(size_t) + job->num_experts);
    char *memory = malloc(bytes);
    if (!memory) return 0;
    room->rows = (size_t *)memory;
    room->shares = (float *)(room->rows + job->rows);
    room->x = room->shares + job->rows * job->num_experts;
    room->wide = room->x + job->rows * job->hidden;
    room->inner = room->wide + job->rows * 2 * job->inner;
    room->y = room->inner + job->rows * job->inner;
    room->is_chosen = (uint8_t *)(room->y + job->rows * job->hidden);
    memset(room->is_chosen, 0, job->rows * job->num_experts);
    return 1;
}

/* The first of the greatest that are left; any where none is a number. */
static size_t next_of(const experts_t *job, const float *logits, const uint8_t *is_chosen) {
    size_t best = job->num_experts;
    for (size_t i = 0; i < job->num_experts; i++) {
        if (is_chosen[i]) continue;
        if (best == job->num_experts || logits[i] > logits[best]) best = i;
    }
    return best;
}

static void choose(const experts_t *job, const float *logits, float *shares, uint8_t *is_chosen) {
    const f32x16 greatest = f_set1(logits[next_of(job, logits, is_chosen)]);
    float all = 0, chosen = 0;
    for (size_t i = 0; i < job->num_experts; i += 16) {
        mask16 mask = lanes(job->num_experts - i);
        f32x16 each = exp_ps(f_sub(f_load_some(mask, logits + i), greatest));
        f_store_some(shares + i, mask, each);
        all += f_sum(f_keep(mask, each));
    }
    for (size_t i = 0; i < job->num_chosen; i++) {
        size_t best = next_of(job, logits, is_chosen);
        is_chosen[best] = 1;
        chosen += shares[best];
    }
    for (size_t i = 0; i < job->num_experts; i++) {
        shares[i] /= job->are_normalised ? chosen : all;
    }
}

static void gather_rows(const experts_t *job, const room_t *room, size_t count) {
    for (size_t i = 0; i < count; i++) {
        memcpy(room->x + i * job->hidden, job->x + room->rows[i] * job->hidden,
               job->hidden * sizeof(float));
    }
}

/* What an expert makes of some rows, times their shares, to the others' . */
static void add_rows(const experts_t *job, const room_t *room, size_t expert, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const float *from = room->y + i * job->hidden;
        float *to = job->out + room->rows[i] * job->hidden;
        f32x16 share = f_set1(room->shares[room->rows[i] * job->num_experts + expert]);
        for (size_t at = 0; at < job->hidden; at += 16) {
            mask16 mask = lanes(job->hidden - at);
            f32x16 sum = f_fma(f_load_some(mask, from + at), share,
                                         f_load_some(mask, to + at));
            f_store_some(to + at, mask, sum);
        }
    }
}

static void let_through(const experts_t *job, const room_t *room, size_t count) {
    switch (job->gate) {
    case GATE_GELU_TANH: gelu_mul(room->wide, room->inner, count, job->inner); break;
    case GATE_CLAMPED:
        clamped_mul(room->wide, room->inner, count, job->inner, job->alpha, job->limit);
        break;
    default: silu_mul(room->wide, room->inner, count, job->inner);
    }
}

static void pass(const experts_t *job, const room_t *room, size_t expert) {
    size_t count = 0;
    for (size_t row = 0; row < job->rows; row++) {
        if (room->is_chosen[row * job->num_experts + expert]) room->rows[count++] = row;
    }
    if (!count) return;
    gather_rows(job, room, count);
    weight_t gate_up = {job->kind, job->experts[expert].gate_up, job->hidden, 2 * job->inner};
    linear(&gate_up, &(product_t){.x = room->x, .y = room->wide, .rows = count,
                                  .bias = job->experts[expert].gate_up_bias});
    let_through(job, room, count);
    weight_t down = {job->kind, job->experts[expert].down, job->inner, job->hidden};
    linear(&down, &(product_t){.x = room->inner, .y = room->y, .rows = count,
                               .bias = job->experts[expert].down_bias});
    add_rows(job, room, expert, count);
}

int experts(const experts_t *job) {
    room_t room;
    if (!take_room(job, &room)) return 0;
    for (size_t row = 0; row < job->rows; row++) {
        size_t at = row * job->num_experts;
        choose(job, job->logits + at, room.shares + at, room.is_chosen + at);
    }
    size_t bytes = job->rows * job->hidden * sizeof(float);
    if (!job->residual) memset(job->out, 0, bytes);
    else if (job->residual != job->out) memcpy(job->out, job->residual, bytes);
    for (size_t expert = 0; expert < job->num_experts; expert++) pass(job, &room, expert);
    free(room.rows);
    return 1;
}

END_SIMD
#endif
