/* Y = X B in Z_2^64: products wrap, so that they are exact. B lies in blocks of LANES outputs,
 * [blocks][num_in][LANES], in 32 bits where its numbers fit, so that a row streams half as much. */
#include "simd.h"

#if defined(VEILPIPE_SIMD)

enum { LANES = RING_LANES, MAX_RING_WIDTH = 5, MAX_ROWS = 4 };

typedef struct {
    const ring_t *ring;
    size_t num_blocks, num_chunks;
} ring_job_t;

typedef uint64_t lanes_t __attribute__((vector_size(8 * LANES), aligned(8)));
typedef int32_t narrow_t __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE void widen_lanes(lanes_t *wide, const char *lanes, const int is_wide) {
    if (is_wide) *wide = *(const lanes_t *)lanes;
    else *wide = __builtin_convertvector(*(const narrow_t *)lanes, lanes_t);
}

/* `rows` rows times `width` blocks; all but the job are constants wherever this is called. */
INLINE void ring_tile(const ring_t *ring, size_t row, size_t block, const int is_wide, const int rows,
                 const int width) {
    const char *blocks[MAX_RING_WIDTH];
    const size_t step = is_wide ? 8 * LANES : 4 * LANES;
    spread(blocks, width, (const char *)ring->packed + block * ring->num_in * step,
           ring->num_in * step);
    const uint64_t *x = ring->x + row * ring->num_in;
    lanes_t sums[MAX_ROWS][MAX_RING_WIDTH];
    for (int r = 0; r < rows; r++) {
        for (int w = 0; w < width; w++) sums[r][w] = (lanes_t){0};
    }
    for (size_t k = 0; k < ring->num_in; k++) {
        lanes_t lanes[MAX_RING_WIDTH];
        for (int w = 0; w < width; w++) widen_lanes(&lanes[w], blocks[w] + k * step, is_wide);
        for (int r = 0; r < rows; r++) {
            uint64_t input = x[(size_t)r * ring->num_in + k];
            for (int w = 0; w < width; w++) sums[r][w] += input * lanes[w];
        }
    }
    for (int w = 0; w < width; w++) {
        size_t out = (block + (size_t)w) * LANES;
        size_t left = ring->num_out - out;
        for (int r = 0; r < rows; r++) {
            uint64_t *y = ring->y + (row + (size_t)r) * ring->num_out + out;
            __builtin_memcpy(y, &sums[r][w], (left < LANES ? left : LANES) * sizeof *y);
        }
    }
}

INLINE void ring_rows(const ring_t *ring, size_t block, const int is_wide, const int width) {
    size_t row = 0;
    for (; row + MAX_ROWS <= ring->rows; row += MAX_ROWS) {
        ring_tile(ring, row, block, is_wide, MAX_ROWS, width);
    }
    for (; row < ring->rows; row++) ring_tile(ring, row, block, is_wide, 1, width);
}

INLINE void all_rows(const ring_t *ring, size_t block, size_t width, const int is_wide) {
    switch (width) {
    case 1: ring_rows(ring, block, is_wide, 1); return;
    case 2: ring_rows(ring, block, is_wide, 2); return;
    case 3: ring_rows(ring, block, is_wide, 3); return;
    case 4: ring_rows(ring, block, is_wide, 4); return;
    default: ring_rows(ring, block, is_wide, 5); return;
    }
}

static void run_ring_chunk(void *opaque, size_t chunk) {
    const ring_job_t *job = opaque;
    size_t end = (chunk + 1) * job->num_blocks / job->num_chunks;
    for (size_t block = chunk * job->num_blocks / job->num_chunks; block < end;) {
        size_t width = end - block < MAX_RING_WIDTH ? end - block : MAX_RING_WIDTH;
        if (job->ring->is_wide) all_rows(job->ring, block, width, 1);
        else all_rows(job->ring, block, width, 0);
        block += width;
    }
}

void ring_product(const ring_t *ring) {
    ring_job_t job = {.ring = ring, .num_blocks = (ring->num_out + LANES - 1) / LANES};
    job.num_chunks = pool_num_chunks((job.num_blocks + MAX_RING_WIDTH - 1) / MAX_RING_WIDTH);
    pool_run(run_ring_chunk, &job, job.num_chunks);
}

END_SIMD
#endif
