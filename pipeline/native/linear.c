/* y = activation(x W^T + bias) + residual, cut into tiles of rows x blocks of 16 outputs. */
#include "simd.h"

#if defined(VEILPIPE_X86)

typedef struct {
    const weight_t *weight;
    const product_t *product;
    const char *x;        /* as the tiles want it: float, rounded to bf16, or quantised */
    size_t x_row_bytes;   /* of it */
    size_t num_k, k_step; /* inputs (I8: 64s of them), and how many a pass takes */
    size_t k_x_bytes, k_w_bytes; /* of one of them, two for BF16 weights halved */
    tile_fn (*find_tile)(size_t rows, size_t blocks);
    size_t width;                /* blocks a tile covers */
    size_t num_blocks, num_chunks;
} job_t;

enum { VECTOR = 64 };                        /* bytes */
/* A pass's weights and sums stay in the L2 cache. Sums over 256 inputs, then over passes, have half
 * the rounding error of one long sum. */
enum { PASS_ROWS = 96, PASS_INPUTS = 256 };

/* Bias, activation and residual of rows x blocks of sums. */
static void finish(const job_t *job, const float *acc, size_t acc_stride, size_t first_row,
                   size_t rows, size_t first_block, size_t step, size_t blocks) {
    const product_t *product = job->product;
    size_t num_out = job->weight->num_out;
    for (size_t b = 0; b < blocks; b++) {
        size_t out = (first_block + b * step) * BLOCK;
        __mmask16 mask = lanes(num_out - out);
        __m512 bias = product->bias ? _mm512_maskz_loadu_ps(mask, product->bias + out)
                                    : _mm512_setzero_ps();
        for (size_t row = 0; row < rows; row++) {
            size_t at = (first_row + row) * num_out + out;
            __m512 y = _mm512_add_ps(_mm512_loadu_ps(acc + row * acc_stride + b * BLOCK), bias);
            y = activate_ps(y, product->activation);
            if (product->residual) {
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, product->residual + at));
            }
            _mm512_mask_storeu_ps(product->y + at, mask, y);
        }
    }
}

/* Up to PASS_ROWS rows of up to `width` blocks. */
static void run_pass(const job_t *job, size_t first_row, size_t rows, size_t block, size_t step,
                     size_t blocks) {
    _Alignas(64) float acc[PASS_ROWS * 4 * BLOCK];
    size_t acc_stride = blocks * BLOCK, bytes = block_bytes(job->weight->kind, job->weight->num_in);
    size_t num_tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    const char *w = (const char *)job->weight->packed + block * bytes;
    for (size_t k = 0; k < job->num_k; k += job->k_step) {
        size_t num_k = job->num_k - k < job->k_step ? job->num_k - k : job->k_step;
        for (size_t tile = 0; tile < num_tiles; tile++) {
            size_t row = tile * rows / num_tiles, end = (tile + 1) * rows / num_tiles;
            const char *x = job->x + (first_row + row) * job->x_row_bytes + k * job->k_x_bytes;
            job->find_tile(end - row, blocks)(
                acc + row * acc_stride, acc_stride, BLOCK, x, job->x_row_bytes,
                w + k * job->k_w_bytes, step * bytes, VECTOR, num_k, k > 0);
        }
    }
    finish(job, acc, acc_stride, first_row, rows, block, step, blocks);
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
            for (size_t row = 0; row < job->product->rows; row += PASS_ROWS) {
                size_t left = job->product->rows - row;
                run_pass(job, row, left < PASS_ROWS ? left : PASS_ROWS, block + i, step, width);
            }
        }
        block += step * width;
    }
}

typedef struct {
    const product_t *product;
    size_t num_in, row_bytes;
    void (*prepare_row)(const float *x, size_t num_in, void *prepared);
    char *prepared;
    size_t num_chunks;
} prepare_job_t;

static void prepare_chunk(void *opaque, size_t chunk) {
    const prepare_job_t *job = opaque;
    size_t rows = job->product->rows, end = (chunk + 1) * rows / job->num_chunks;
    for (size_t row = chunk * rows / job->num_chunks; row < end; row++) {
        job->prepare_row(job->product->x + row * job->num_in, job->num_in,
                         job->prepared + row * job->row_bytes);
    }
}

/* All rows of x as these tiles take them, in this thread's scratch memory. */
static void prepare(job_t *job, size_t row_bytes,
                    void (*prepare_row)(const float *, size_t, void *)) {
    size_t rows = job->product->rows;
    prepare_job_t rows_job = {
        .product = job->product, .num_in = job->weight->num_in, .row_bytes = row_bytes,
        .prepare_row = prepare_row, .prepared = scratch(rows * row_bytes),
        .num_chunks = pool_num_chunks(rows / 16 + 1),
    };
    pool_run(prepare_chunk, &rows_job, rows_job.num_chunks);
    job->x = rows_job.prepared;
    job->x_row_bytes = row_bytes;
}

/* Blocks a tile covers: enough sums that none waits for itself, and no more streams of weights than
 * memory serves best. */
static size_t tile_width(int kind, size_t rows) {
    if (kind == KIND_I8) return 2;
    return rows == 1 ? 8 : 4;
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
        .width = tile_width(weight->kind, product->rows),
        .num_blocks = (weight->num_out + BLOCK - 1) / BLOCK,
    };
    if (weight->kind == KIND_I8) {
        prepare(&job, quantised_bytes(num_in), quantise_row);
        job.num_k = job.k_step = (num_in + SUPER - 1) / SUPER;
        job.find_tile = tile_i8;
    } else if (weight->kind == KIND_BF16 && has_bf16_dot()) {
        prepare(&job, rounded_bytes(num_in), round_row);
        job.k_x_bytes = sizeof(uint16_t);
        job.find_tile = tile_bf16_dot;
    }
    job.num_chunks = pool_num_chunks((job.num_blocks + job.width - 1) / job.width);
    pool_run(run_chunk, &job, job.num_chunks);
}

END_SIMD
#endif
