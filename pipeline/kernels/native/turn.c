/* Heads of rows, each times a matrix of its own, where they lie. */
#include "kernels.h"

#include <string.h>

#if defined(VEILPIPE_SIMD)

typedef struct {
    const turn_t *turn;
    size_t num_chunks;
} turn_job_t;

/* Some groups of a head, which share its matrix. */
static void turn_groups(const turn_t *turn, float *rows, const float *matrix, size_t count) {
    float before[MAX_ATTENTION_ROWS * MAX_HEAD_DIM];
    size_t width = turn->width, num_blocks = width / BLOCK;
    for (size_t i = 0; i < count * width; i++) before[i] = turn->factor * rows[i];
    for (size_t b = 0, step = 4; b < num_blocks; b += step) {
        while (step > num_blocks - b) step /= 2;
        tile_rows(0, count, step)(rows + b * BLOCK, width, BLOCK, (const char *)before,
                                  width * sizeof(float), (const char *)(matrix + b * BLOCK),
                                  BLOCK * sizeof(float), width * sizeof(float), width, 0);
    }
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

#endif
