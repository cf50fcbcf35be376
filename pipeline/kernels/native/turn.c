/* Rows of heads times a head's matrix: where they lie, or in another order elsewhere. */
#include "tiles.h"

#include <string.h>

#if defined(VEILPIPE_SIMD)

typedef struct {
    const turn_t *turn;
    size_t num_chunks;
} turn_job_t;

enum { TAKEN_AHEAD = 2 * MAX_ATTENTION_ROWS }; /* rows that are asked for in advance */

/* out[count][width] = rows[count][width] times a matrix. */
static void product(const float *rows, const float *matrix, size_t count, size_t width,
                    float *out) {
    size_t num_blocks = width / BLOCK;
    for (size_t b = 0, step = widest(count); b < num_blocks; b += step) {
        while (step > num_blocks - b) step /= 2;
        tile_rows(0, count, step)(out + b * BLOCK, width, BLOCK, (const char *)rows,
                                  width * sizeof(float), (const char *)(matrix + b * BLOCK),
                                  BLOCK * sizeof(float), width * sizeof(float), width, 0);
    }
}

/* Some groups of a head, which share its matrix. */
static void turn_groups(const turn_t *turn, float *rows, const float *matrix, size_t count) {
    float before[MAX_ATTENTION_ROWS * MAX_HEAD_DIM];
    size_t num_floats = count * turn->width;
    for (size_t i = 0; i < num_floats; i++) before[i] = turn->factor * rows[i];
    product(before, matrix, count, turn->width, rows);
}

static void turn_row(const turn_t *turn, float *row) {
    size_t width = turn->width;
    for (size_t head = 0; head < turn->num_heads; head++) {
        for (size_t done = 0, count; done < turn->num_groups; done += count) {
            count = turn->num_groups - done;
            if (count > MAX_ATTENTION_ROWS) count = MAX_ATTENTION_ROWS;
            turn_groups(turn, row + (head * turn->num_groups + done) * width,
                        turn->matrices + head * width * width, count);
        }
    }
}

static void turn_chunk(void *opaque, size_t chunk) {
    const turn_job_t *job = opaque;
    size_t rows = job->turn->num_rows, end = (chunk + 1) * rows / job->num_chunks;
    for (size_t row = chunk * rows / job->num_chunks; row < end; row++) {
        turn_row(job->turn, job->turn->rows + row * job->turn->row_stride);
    }
}

void turn_heads(const turn_t *turn) {
    turn_job_t job = {turn, pool_num_chunks(turn->num_rows)};
    pool_run(turn_chunk, &job, job.num_chunks);
}

static void ask_for(const float *row, size_t width) {
    for (size_t i = 0; i < width; i += BLOCK) __builtin_prefetch(row + i);
}

void take_rows(const taken_t *taken) {
    float some[MAX_ATTENTION_ROWS * MAX_HEAD_DIM];
    size_t width = taken->width, end = taken->count;
    for (size_t first = 0, count; first < end; first += count) {
        count = end - first < MAX_ATTENTION_ROWS ? end - first : MAX_ATTENTION_ROWS;
        float *out = taken->out + first * width, *to = taken->matrix ? some : out;
        for (size_t i = first; i < first + count; i++) {
            size_t ahead = i + TAKEN_AHEAD;
            if (ahead < end) ask_for(taken->rows + (size_t)taken->order[ahead] * width, width);
            memcpy(to + (i - first) * width, taken->rows + (size_t)taken->order[i] * width,
                   width * sizeof(float));
        }
        if (taken->matrix) product(some, taken->matrix, count, width, out);
    }
}

END_SIMD
#endif
