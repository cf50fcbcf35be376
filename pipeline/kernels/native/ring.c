/* Y = X B in Z_2^64: products wrap, so that they are exact. B lies in blocks of LANES outputs,
 * [blocks][num_in][LANES], in 32 bits where its numbers fit, so that a row streams half as much. */
#include "simd.h"

#if defined(VEILPIPE_X86)

enum { LANES = RING_LANES, MAX_WIDTH = 5, MAX_ROWS = 4 };

typedef struct {
    const ring_t *ring;
    size_t num_blocks, num_chunks;
} ring_job_t;

/* Lanes below `count` (0..8 or more). */
INLINE __mmask8 below(size_t count) { return count >= LANES ? 0xff : (__mmask8)((1u << count) - 1); }

INLINE __m512i widened(const char *lanes, const int is_wide) {
    if (is_wide) return _mm512_loadu_si512(lanes);
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)lanes));
}

/* `rows` rows times `width` blocks; all but the job are constants wherever this is called. */
INLINE void tile(const ring_t *ring, size_t row, size_t block, const int is_wide, const int rows,
                 const int width) {
    const char *blocks[MAX_WIDTH];
    const size_t step = is_wide ? 8 * LANES : 4 * LANES;
    spread(blocks, width, (const char *)ring->packed + block * ring->num_in * step,
           ring->num_in * step);
    const uint64_t *x = ring->x + row * ring->num_in;
    __m512i sums[MAX_ROWS][MAX_WIDTH];
    for (int r = 0; r < rows; r++) {
        for (int w = 0; w < width; w++) sums[r][w] = _mm512_setzero_si512();
    }
    for (size_t k = 0; k < ring->num_in; k++) {
        __m512i lanes[MAX_WIDTH];
        for (int w = 0; w < width; w++) lanes[w] = widened(blocks[w] + k * step, is_wide);
        for (int r = 0; r < rows; r++) {
            __m512i input = _mm512_set1_epi64((int64_t)x[(size_t)r * ring->num_in + k]);
            for (int w = 0; w < width; w++) {
                __m512i product = _mm512_mullo_epi64(input, lanes[w]);
                sums[r][w] = _mm512_add_epi64(sums[r][w], product);
            }
        }
    }
    for (int w = 0; w < width; w++) {
        size_t out = (block + (size_t)w) * LANES;
        __mmask8 mask = below(ring->num_out - out);
        for (int r = 0; r < rows; r++) {
            uint64_t *y = ring->y + (row + (size_t)r) * ring->num_out + out;
            _mm512_mask_storeu_epi64(y, mask, sums[r][w]);
        }
    }
}

INLINE void rows_of(const ring_t *ring, size_t block, const int is_wide, const int width) {
    size_t row = 0;
    for (; row + MAX_ROWS <= ring->rows; row += MAX_ROWS) {
        tile(ring, row, block, is_wide, MAX_ROWS, width);
    }
    for (; row < ring->rows; row++) tile(ring, row, block, is_wide, 1, width);
}

INLINE void all_rows(const ring_t *ring, size_t block, size_t width, const int is_wide) {
    switch (width) {
    case 1: rows_of(ring, block, is_wide, 1); return;
    case 2: rows_of(ring, block, is_wide, 2); return;
    case 3: rows_of(ring, block, is_wide, 3); return;
    case 4: rows_of(ring, block, is_wide, 4); return;
    default: rows_of(ring, block, is_wide, 5); return;
    }
}

static void run_chunk(void *opaque, size_t chunk) {
    const ring_job_t *job = opaque;
    size_t end = (chunk + 1) * job->num_blocks / job->num_chunks;
    for (size_t block = chunk * job->num_blocks / job->num_chunks; block < end;) {
        size_t width = end - block < MAX_WIDTH ? end - block : MAX_WIDTH;
        if (job->ring->is_wide) all_rows(job->ring, block, width, 1);
        else all_rows(job->ring, block, width, 0);
        block += width;
    }
}

void ring_product(const ring_t *ring) {
    ring_job_t job = {.ring = ring, .num_blocks = (ring->num_out + LANES - 1) / LANES};
    job.num_chunks = pool_num_chunks((job.num_blocks + MAX_WIDTH - 1) / MAX_WIDTH);
    pool_run(run_chunk, &job, job.num_chunks);
}

END_SIMD
#endif
