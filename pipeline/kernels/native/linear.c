/* y = activation(x W^T + bias) + residual, cut into tiles of rows x blocks of 16 outputs. */
#include "tiles.h"

#if defined(VEILPIPE_SIMD)

typedef struct {
    const weight_t *weight;
    const product_t *product;
    const char *x;      /* as the tiles want it: panels of float, bf16 or quantised rows */
    size_t x_row_bytes; /* of it */
    size_t num_k, k_step; /* inputs (I8, I4: 64s of them), and how many a pass takes */
    size_t k_x_bytes, k_w_bytes; /* of one of them, two for BF16 weights halved */
    tile_fn (*find_tile)(size_t rows, size_t blocks);
    size_t num_tiles;            /* that all rows are cut into */
    size_t width;                /* blocks a tile covers */
    size_t num_blocks, num_chunks;
    int is_wide; /* I4: whether a pass's weights are widened for all of its tiles */
} job_t;

/* A pass's weights and sums stay in the caches. Sums over 256 inputs, then over passes, have half
 * the rounding error of one long sum. */
enum { PASS_TILES = 16, PASS_INPUTS = 256, PASS_SUPERS = 16 };

/* Of an I8 or I4 weight. */
static size_t fetched_at_once(const job_t *job) {
    return job->weight->kind == KIND_I4 ? sizeof(super4_t) / FETCHES_I4 : sizeof(super_t) / FETCHES;
}

static size_t first_row_of(const job_t *job, size_t tile) {
    return tile * job->product->rows / job->num_tiles;
}

/* Bias, activation and residual of rows x blocks of sums. */
static void finish(const job_t *job, const float *acc, size_t acc_stride, size_t first_row,
                   size_t rows, size_t first_block, size_t step, size_t blocks) {
    const product_t *product = job->product;
    size_t num_out = job->weight->num_out;
    for (size_t b = 0; b < blocks; b++) {
        size_t out = (first_block + b * step) * BLOCK;
        mask16 mask = lanes(num_out - out);
        f32x16 bias = product->bias ? f_load_some(mask, product->bias + out)
                                    : f_zero();
        for (size_t row = 0; row < rows; row++) {
            size_t at = (first_row + row) * num_out + out;
            f32x16 y = f_add(f_load(acc + row * acc_stride + b * BLOCK), bias);
            y = activate_ps(y, product->activation);
            if (product->residual) {
                y = f_add(y, f_load_some(mask, product->residual + at));
            }
            f_store_some(product->y + at, mask, y);
        }
    }
}

/* Tiles first..end, up to PASS_TILES, of `blocks` blocks. */
static void run_pass(const job_t *job, size_t first, size_t end, size_t block, size_t step,
                     size_t blocks) {
    _Alignas(64) float acc[PASS_TILES * MAX_SUMS * BLOCK];
    _Alignas(64) char wide[PASS_SUPERS * WIDE_SUPER];
    size_t acc_stride = blocks * BLOCK, bytes = block_bytes(job->weight->kind, job->weight->num_in);
    size_t first_row = first_row_of(job, first), end_row = first_row_of(job, end);
    const char *w = (const char *)job->weight->packed + block * bytes;
    for (size_t k = 0; k < job->num_k; k += job->k_step) {
        size_t num_k = job->num_k - k < job->k_step ? job->num_k - k : job->k_step;
        size_t ahead = end - first > 1 ? num_k : SUPERS_AHEAD;
        share_t next = {w + (k + ahead) * job->k_w_bytes,
                        fetched_at_once(job) / (end - first) + 1};
        const char *from = w + k * job->k_w_bytes;
        if (job->is_wide) {
            widen_i4(from, num_k, wide);
            from = wide;
        }
        for (size_t tile = first; tile < end; tile++) {
            size_t row = first_row_of(job, tile), rows = first_row_of(job, tile + 1) - row;
            const char *x = job->x + row * job->x_row_bytes + k * rows * job->k_x_bytes;
            job->find_tile(rows, blocks)(acc + (row - first_row) * acc_stride, acc_stride, BLOCK, x,
                                         from, step * bytes, num_k, k > 0, next);
            next.from += num_k * job->k_w_bytes / (end - first);
        }
    }
    finish(job, acc, acc_stride, first_row, end_row - first_row, block, step, blocks);
}

static void run_chunk(void *opaque, size_t chunk) {
    const job_t *job = opaque;
    size_t num_units = (job->num_blocks + job->width - 1) / job->width;
    size_t block = chunk * num_units / job->num_chunks * job->width;
    size_t end = (chunk + 1) * num_units / job->num_chunks * job->width;
    end = end < job->num_blocks ? end : job->num_blocks;
    for (size_t width = job->width; width > 0; width /= 2) {
        /* each of a tile's blocks from a part of its own: few, long streams through memory */
        size_t step = (end - block) / width;
        for (size_t i = 0; i < step; i++) {
            for (size_t tile = 0; tile < job->num_tiles; tile += PASS_TILES) {
                size_t left = job->num_tiles - tile;
                run_pass(job, tile, tile + (left < PASS_TILES ? left : PASS_TILES), block + i, step,
                         width);
            }
        }
        block += step * width;
    }
}

typedef void (*prepare_fn)(const float *x, size_t num_in, size_t rows, void *panel);

typedef struct {
    const job_t *product;
    prepare_fn prepare;
    char *panels;
    size_t num_chunks;
} prepare_job_t;

static void prepare_chunk(void *opaque, size_t chunk) {
    const prepare_job_t *job = opaque;
    const job_t *product = job->product;
    size_t num_in = product->weight->num_in;
    size_t end = (chunk + 1) * product->num_tiles / job->num_chunks;
    for (size_t tile = chunk * product->num_tiles / job->num_chunks; tile < end; tile++) {
        size_t row = first_row_of(product, tile), rows = first_row_of(product, tile + 1) - row;
        job->prepare(product->product->x + row * num_in, num_in, rows,
                     job->panels + row * product->x_row_bytes);
    }
}

/* All rows of x as these tiles take them, in this thread's scratch memory. */
static void prepare(job_t *job, prepare_fn prepare) {
    prepare_job_t panels = {
        .product = job, .prepare = prepare, .panels = scratch(job->product->rows * job->x_row_bytes),
        .num_chunks = pool_num_chunks(job->num_tiles),
    };
    pool_run(prepare_chunk, &panels, panels.num_chunks);
    job->x = panels.panels;
}

/* Blocks a tile of so many rows covers: enough sums that none waits for itself, and no more streams
 * of weights than memory serves best. */
static size_t tile_width(int kind, size_t rows) {
    if (kind == KIND_I8 || kind == KIND_I4) return rows > MAX_I8_SUMS / 2 ? 1 : 2;
    if (rows == 1) return MAX_WIDTH;
    return rows > MAX_SUMS / 2 ? 1 : rows > MAX_SUMS / 4 ? 2 : 4;
}

/* Into tiles of about equally many rows, and chunks. As many rows as a tile has are one, which reads
 * weights once; of more, wide tiles read rows less often. */
static void cut(job_t *job) {
    size_t rows = job->product->rows;
    int kind = job->weight->kind;
    size_t max_tile_rows = rows <= MAX_TILE_ROWS ? MAX_TILE_ROWS : WIDE_TILE_ROWS;
    if (kind == KIND_I8 || kind == KIND_I4) max_tile_rows = MAX_I8_SUMS;
    job->num_tiles = (rows + max_tile_rows - 1) / max_tile_rows;
    job->width = tile_width(kind, (rows + job->num_tiles - 1) / job->num_tiles);
    job->num_chunks = pool_num_chunks((job->num_blocks + job->width - 1) / job->width);
}

void linear(const weight_t *weight, const product_t *product) {
    size_t num_in = weight->num_in;
    job_t job = {
        .weight = weight,
        .product = product,
        .x = (const char *)product->x,
        .x_row_bytes = num_in * sizeof(float),
        .num_k = num_in,
        .k_step = PASS_INPUTS,
        .k_x_bytes = sizeof(float),
        .k_w_bytes = weight->kind == KIND_BF16 ? BLOCK * 2 : BLOCK * 4,
        .find_tile = weight->kind == KIND_BF16 ? tile_bf16 : tile_f32,
        .num_blocks = (weight->num_out + BLOCK - 1) / BLOCK,
    };
    cut(&job);
    if (weight->kind == KIND_I8) {
        job.num_k = (num_in + SUPER - 1) / SUPER;
        job.k_step = PASS_SUPERS;
        job.k_x_bytes = quantised_bytes(SUPER);
        job.k_w_bytes = sizeof(super_t);
        job.x_row_bytes = quantised_bytes(num_in);
        job.find_tile = tile_i8;
        prepare(&job, quantise_rows);
    } else if (weight->kind == KIND_I4) {
        job.num_k = (num_in + SUPER - 1) / SUPER;
        job.k_step = PASS_SUPERS;
        job.k_x_bytes = quantised_bytes(SUPER);
        job.k_w_bytes = sizeof(super4_t);
        job.x_row_bytes = quantised_bytes(num_in);
        job.is_wide = job.num_tiles > 1;
        job.find_tile = job.is_wide ? tile_wide_i4 : tile_i4;
        prepare(&job, sum_rows);
#if defined(LEVEL_AVX512)
    } else if (weight->kind == KIND_BF16 && has_bf16_dot()) {
        job.k_x_bytes = sizeof(uint16_t);
        job.x_row_bytes = rounded_bytes(num_in);
        job.find_tile = tile_bf16_dot;
        prepare(&job, round_rows);
#endif
    } else if (product->rows > 1) {
        prepare(&job, interleave);
    }
    pool_run(run_chunk, &job, job.num_chunks);
}

END_SIMD
#endif
