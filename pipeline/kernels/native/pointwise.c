/* What happens to rows between products: norms, rotary positions, gates, the greedy token. */
#include "simd.h"

#if defined(VEILPIPE_SIMD)

typedef struct pointwise {
    void (*run)(const struct pointwise *job, size_t row);
    const float *x, *weight, *bias;
    float *y;
    size_t rows, size, num_heads, head_dim, row_stride, num_chunks;
    float eps, alpha, limit;
} pointwise_t;

static void run_rows_of(void *opaque, size_t chunk) {
    const pointwise_t *job = opaque;
    size_t end = (chunk + 1) * job->rows / job->num_chunks;
    for (size_t row = chunk * job->rows / job->num_chunks; row < end; row++) job->run(job, row);
}

enum { WORTH_SHARING = 32768 }; /* elements for each further chunk */

static void share(pointwise_t job) {
    job.num_chunks = pool_num_chunks(job.rows * job.size / WORTH_SHARING + 1);
    pool_run(run_rows_of, &job, job.num_chunks);
}

INLINE float sum_of_squares(const float *x, size_t size, float mean) {
    f32x16 sum = f_zero(), center = f_set1(mean);
    for (size_t i = 0; i < size; i += 16) {
        mask16 mask = lanes(size - i);
        f32x16 d = f_keep(mask, f_sub(f_load_some(mask, x + i), center));
        sum = f_fma(d, d, sum);
    }
    return f_sum(sum);
}

static void layer_norm_row(const pointwise_t *job, size_t row) {
    const float *x = job->x + row * job->size;
    float *y = job->y + row * job->size;
    f32x16 sum = f_zero();
    for (size_t i = 0; i < job->size; i += 16) {
        sum = f_add(sum, f_load_some(lanes(job->size - i), x + i));
    }
    float mean = f_sum(sum) / (float)job->size;
    float variance = sum_of_squares(x, job->size, mean) / (float)job->size;
    f32x16 center = f_set1(mean);
    f32x16 factor = f_set1(1.0f / __builtin_sqrtf(variance + job->eps));
    for (size_t i = 0; i < job->size; i += 16) {
        mask16 mask = lanes(job->size - i);
        f32x16 d = f_sub(f_load_some(mask, x + i), center);
        d = f_fma(f_mul(d, factor),
                            f_load_some(mask, job->weight + i),
                            f_load_some(mask, job->bias + i));
        f_store_some(y + i, mask, d);
    }
}

INLINE void rms_norm_of(const pointwise_t *job, const float *x, float *y, int adds) {
    float mean_square = sum_of_squares(x, job->size, 0) / (float)job->size;
    f32x16 factor = f_set1(1.0f / __builtin_sqrtf(mean_square + job->eps));
    for (size_t i = 0; i < job->size; i += 16) {
        mask16 mask = lanes(job->size - i);
        f32x16 scaled = f_mul(f_load_some(mask, x + i), factor);
        scaled = f_mul(scaled, f_load_some(mask, job->weight + i));
        if (adds) scaled = f_add(f_load_some(mask, y + i), scaled);
        f_store_some(y + i, mask, scaled);
    }
}

static void rms_norm_row(const pointwise_t *job, size_t row) {
    rms_norm_of(job, job->x + row * job->size, job->y + row * job->size, 0);
}

static void add_rms_norm_row(const pointwise_t *job, size_t row) {
    rms_norm_of(job, job->x + row * job->size, job->y + row * job->size, 1);
}

static void rms_norm_within_row(const pointwise_t *job, size_t row) {
    for (size_t i = 0; i < job->num_heads; i++) {
        float *x = job->y + row * job->row_stride + i * job->size;
        rms_norm_of(job, x, x, 0);
    }
}

void layer_norm(const float *x, const float *weight, const float *bias, float *y, size_t rows,
                size_t size, float eps) {
    share((pointwise_t){.run = layer_norm_row, .x = x, .weight = weight, .bias = bias, .y = y,
                      .rows = rows, .size = size, .eps = eps});
}

void rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t size, float eps) {
    share((pointwise_t){.run = rms_norm_row, .x = x, .weight = weight, .y = y, .rows = rows,
                      .size = size, .eps = eps});
}

void add_rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t size,
                  float eps) {
    share((pointwise_t){.run = add_rms_norm_row, .x = x, .weight = weight, .y = y, .rows = rows,
                      .size = size, .eps = eps});
}

void rms_norm_within(float *x, size_t row_stride, size_t rows, size_t count, size_t size,
                     const float *weight, float eps) {
    share((pointwise_t){.run = rms_norm_within_row, .y = x, .weight = weight, .rows = rows,
                      .size = size, .num_heads = count, .row_stride = row_stride, .eps = eps});
}

/* Here weight and bias are the cosines and the signed sines, size is how much of a head turns. */
static void rope_row(const pointwise_t *job, size_t row) {
    size_t half = job->size / 2;
    const float *cosines = job->weight + row * job->size, *sines = job->bias + row * job->size;
    for (size_t j = 0; j < half; j += 16) {
        mask16 mask = lanes(half - j);
        f32x16 cos_a = f_load_some(mask, cosines + j);
        f32x16 cos_b = f_load_some(mask, cosines + half + j);
        f32x16 sin_a = f_load_some(mask, sines + j);
        f32x16 sin_b = f_load_some(mask, sines + half + j);
        for (size_t head = 0; head < job->num_heads; head++) {
            float *low = job->y + row * job->row_stride + head * job->head_dim + j;
            float *high = low + half;
            f32x16 a = f_load_some(mask, low), b = f_load_some(mask, high);
            f_store_some(low, mask, f_fma(a, cos_a, f_mul(b, sin_a)));
            f_store_some(high, mask, f_fma(b, cos_b, f_mul(a, sin_b)));
        }
    }
}

void rope(float *x, size_t row_stride, size_t rows, size_t num_heads, size_t head_dim,
          size_t num_dims, const float *cosines, const float *signed_sines) {
    share((pointwise_t){.run = rope_row, .y = x, .weight = cosines, .bias = signed_sines,
                      .rows = rows, .size = num_dims, .num_heads = num_heads,
                      .head_dim = head_dim, .row_stride = row_stride});
}

INLINE void gated_row(const pointwise_t *job, size_t row, int is_gelu) {
    const float *gate = job->x + row * 2 * job->size, *up = gate + job->size;
    float *y = job->y + row * job->size;
    for (size_t i = 0; i < job->size; i += 16) {
        mask16 mask = lanes(job->size - i);
        f32x16 g = f_load_some(mask, gate + i);
        g = is_gelu ? gelu_tanh_ps(g) : silu_ps(g);
        f_store_some(y + i, mask,
                              f_mul(g, f_load_some(mask, up + i)));
    }
}

static void silu_mul_row(const pointwise_t *job, size_t row) { gated_row(job, row, 0); }

static void gelu_mul_row(const pointwise_t *job, size_t row) { gated_row(job, row, 1); }

void silu_mul(const float *gate_up, float *y, size_t rows, size_t inner) {
    share((pointwise_t){.run = silu_mul_row, .x = gate_up, .y = y, .rows = rows, .size = inner});
}

void gelu_mul(const float *gate_up, float *y, size_t rows, size_t inner) {
    share((pointwise_t){.run = gelu_mul_row, .x = gate_up, .y = y, .rows = rows, .size = inner});
}

/* g sigmoid(alpha g) (1 + u), of g up to the limit, and u within it on both sides. */
static void clamped_mul_row(const pointwise_t *job, size_t row) {
    const float *gate = job->x + row * 2 * job->size, *up = gate + job->size;
    float *y = job->y + row * job->size;
    const f32x16 alpha = f_set1(job->alpha), inverse = f_set1(1 / job->alpha);
    const f32x16 most = f_set1(job->limit), least = f_set1(-job->limit);
    for (size_t i = 0; i < job->size; i += 16) {
        mask16 mask = lanes(job->size - i);
        /* the second where one is no number */
        f32x16 g = f_min(most, f_load_some(mask, gate + i));
        f32x16 u = f_min(most, f_load_some(mask, up + i));
        u = f_max(least, u);
        g = f_mul(silu_ps(f_mul(g, alpha)), inverse);
        f_store_some(y + i, mask, f_fma(g, u, g));
    }
}

void clamped_mul(const float *gate_up, float *y, size_t rows, size_t inner, float alpha,
                 float limit) {
    share((pointwise_t){.run = clamped_mul_row, .x = gate_up, .y = y, .rows = rows, .size = inner,
                        .alpha = alpha, .limit = limit});
}

void scale(float *x, size_t count, float factor) {
    const f32x16 by = f_set1(factor);
    for (size_t i = 0; i < count; i += 16) {
        mask16 mask = lanes(count - i);
        f_store_some(x + i, mask, f_mul(f_load_some(mask, x + i), by));
    }
}

void argmax(const float *x, size_t rows, size_t n, int64_t *out) {
    for (size_t row = 0; row < rows; row++, x += n) {
        f32x16 best = f_set1(-__builtin_inff());
        mask16 nans = 0; /* a greatest value does not show them */
        for (size_t i = 0; i < n; i += 16) {
            mask16 mask = lanes(n - i);
            f32x16 values = f_load_some(mask, x + i);
            best = f_select(mask, f_max(best, values), best);
            nans |= f_unordered(values, values);
        }
        float most = f_greatest(best);
        f32x16 greatest = f_set1(most);
        out[row] = -1;
        if (nans || !__builtin_isfinite(most)) continue;
        for (size_t i = 0; i < n; i += 16) {
            mask16 mask = lanes(n - i);
            mask16 found = mask & f_eq(f_load_some(mask, x + i), greatest);
            if (found) {
                out[row] = (int64_t)i + __builtin_ctz(found);
                break;
            }
        }
    }
}

END_SIMD
#endif
