/* What happens to rows between products: norms, rotary positions, gates, the greedy token. */
#include "simd.h"

#if defined(VEILPIPE_X86)

typedef struct pointwise {
    void (*run)(const struct pointwise *job, size_t row);
    const float *x, *weight, *bias;
    float *y;
    size_t rows, size, num_heads, head_dim, row_stride, num_chunks;
    float eps, alpha, limit;
} pointwise_t;

static void run_rows(void *opaque, size_t chunk) {
    const pointwise_t *job = opaque;
    size_t end = (chunk + 1) * job->rows / job->num_chunks;
    for (size_t row = chunk * job->rows / job->num_chunks; row < end; row++) job->run(job, row);
}

enum { WORTH_SHARING = 32768 }; /* elements for each further chunk */

static void run(pointwise_t job) {
    job.num_chunks = pool_num_chunks(job.rows * job.size / WORTH_SHARING + 1);
    pool_run(run_rows, &job, job.num_chunks);
}

INLINE float sum_of_squares(const float *x, size_t size, float mean) {
    __m512 sum = _mm512_setzero_ps(), center = _mm512_set1_ps(mean);
    for (size_t i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), center);
        sum = _mm512_fmadd_ps(d, d, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

static void layer_norm_row(const pointwise_t *job, size_t row) {
    const float *x = job->x + row * job->size;
    float *y = job->y + row * job->size;
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < job->size; i += 16) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(job->size - i), x + i));
    }
    float mean = _mm512_reduce_add_ps(sum) / (float)job->size;
    float variance = sum_of_squares(x, job->size, mean) / (float)job->size;
    __m512 center = _mm512_set1_ps(mean);
    __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + job->eps));
    for (size_t i = 0; i < job->size; i += 16) {
        __mmask16 mask = lanes(job->size - i);
        __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), center);
        d = _mm512_fmadd_ps(_mm512_mul_ps(d, factor),
                            _mm512_maskz_loadu_ps(mask, job->weight + i),
                            _mm512_maskz_loadu_ps(mask, job->bias + i));
        _mm512_mask_storeu_ps(y + i, mask, d);
    }
}

INLINE void rms_norm_of(const pointwise_t *job, const float *x, float *y, int adds) {
    float mean_square = sum_of_squares(x, job->size, 0) / (float)job->size;
    __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean_square + job->eps));
    for (size_t i = 0; i < job->size; i += 16) {
        __mmask16 mask = lanes(job->size - i);
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
        scaled = _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, job->weight + i));
        if (adds) scaled = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + i), scaled);
        _mm512_mask_storeu_ps(y + i, mask, scaled);
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
    run((pointwise_t){.run = layer_norm_row, .x = x, .weight = weight, .bias = bias, .y = y,
                      .rows = rows, .size = size, .eps = eps});
}

void rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t size, float eps) {
    run((pointwise_t){.run = rms_norm_row, .x = x, .weight = weight, .y = y, .rows = rows,
                      .size = size, .eps = eps});
}

void add_rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t size,
                  float eps) {
    run((pointwise_t){.run = add_rms_norm_row, .x = x, .weight = weight, .y = y, .rows = rows,
                      .size = size, .eps = eps});
}

void rms_norm_within(float *x, size_t row_stride, size_t rows, size_t count, size_t size,
                     const float *weight, float eps) {
    run((pointwise_t){.run = rms_norm_within_row, .y = x, .weight = weight, .rows = rows,
                      .size = size, .num_heads = count, .row_stride = row_stride, .eps = eps});
}

/* Here weight and bias are the cosines and the signed sines, size is how much of a head turns. */
static void rope_row(const pointwise_t *job, size_t row) {
    size_t half = job->size / 2;
    const float *cosines = job->weight + row * job->size, *sines = job->bias + row * job->size;
    for (size_t j = 0; j < half; j += 16) {
        __mmask16 mask = lanes(half - j);
        __m512 cos_a = _mm512_maskz_loadu_ps(mask, cosines + j);
        __m512 cos_b = _mm512_maskz_loadu_ps(mask, cosines + half + j);
        __m512 sin_a = _mm512_maskz_loadu_ps(mask, sines + j);
        __m512 sin_b = _mm512_maskz_loadu_ps(mask, sines + half + j);
        for (size_t head = 0; head < job->num_heads; head++) {
            float *low = job->y + row * job->row_stride + head * job->head_dim + j;
            float *high = low + half;
            __m512 a = _mm512_maskz_loadu_ps(mask, low), b = _mm512_maskz_loadu_ps(mask, high);
            _mm512_mask_storeu_ps(low, mask, _mm512_fmadd_ps(a, cos_a, _mm512_mul_ps(b, sin_a)));
            _mm512_mask_storeu_ps(high, mask, _mm512_fmadd_ps(b, cos_b, _mm512_mul_ps(a, sin_b)));
        }
    }
}

void rope(float *x, size_t row_stride, size_t rows, size_t num_heads, size_t head_dim,
          size_t num_dims, const float *cosines, const float *signed_sines) {
    run((pointwise_t){.run = rope_row, .y = x, .weight = cosines, .bias = signed_sines,
                      .rows = rows, .size = num_dims, .num_heads = num_heads,
                      .head_dim = head_dim, .row_stride = row_stride});
}

INLINE void gated_row(const pointwise_t *job, size_t row, int is_gelu) {
    const float *gate = job->x + row * 2 * job->size, *up = gate + job->size;
    float *y = job->y + row * job->size;
    for (size_t i = 0; i < job->size; i += 16) {
        __mmask16 mask = lanes(job->size - i);
        __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        g = is_gelu ? gelu_tanh_ps(g) : silu_ps(g);
        _mm512_mask_storeu_ps(y + i, mask,
                              _mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}

static void silu_mul_row(const pointwise_t *job, size_t row) { gated_row(job, row, 0); }

static void gelu_mul_row(const pointwise_t *job, size_t row) { gated_row(job, row, 1); }

void silu_mul(const float *gate_up, float *y, size_t rows, size_t inner) {
    run((pointwise_t){.run = silu_mul_row, .x = gate_up, .y = y, .rows = rows, .size = inner});
}

void gelu_mul(const float *gate_up, float *y, size_t rows, size_t inner) {
    run((pointwise_t){.run = gelu_mul_row, .x = gate_up, .y = y, .rows = rows, .size = inner});
}

/* g sigmoid(alpha g) (1 + u), of g up to the limit, and u within it on both sides. */
static void clamped_mul_row(const pointwise_t *job, size_t row) {
    const float *gate = job->x + row * 2 * job->size, *up = gate + job->size;
    float *y = job->y + row * job->size;
    const __m512 alpha = _mm512_set1_ps(job->alpha), inverse = _mm512_set1_ps(1 / job->alpha);
    const __m512 most = _mm512_set1_ps(job->limit), least = _mm512_set1_ps(-job->limit);
    for (size_t i = 0; i < job->size; i += 16) {
        __mmask16 mask = lanes(job->size - i);
        /* the second where one is no number */
        __m512 g = _mm512_min_ps(most, _mm512_maskz_loadu_ps(mask, gate + i));
        __m512 u = _mm512_min_ps(most, _mm512_maskz_loadu_ps(mask, up + i));
        u = _mm512_max_ps(least, u);
        g = _mm512_mul_ps(silu_ps(_mm512_mul_ps(g, alpha)), inverse);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_fmadd_ps(g, u, g));
    }
}

void clamped_mul(const float *gate_up, float *y, size_t rows, size_t inner, float alpha,
                 float limit) {
    run((pointwise_t){.run = clamped_mul_row, .x = gate_up, .y = y, .rows = rows, .size = inner,
                      .alpha = alpha, .limit = limit});
}

void scale(float *x, size_t count, float factor) {
    const __m512 by = _mm512_set1_ps(factor);
    for (size_t i = 0; i < count; i += 16) {
        __mmask16 mask = lanes(count - i);
        _mm512_mask_storeu_ps(x + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), by));
    }
}

void argmax(const float *x, size_t rows, size_t n, int64_t *out) {
    for (size_t row = 0; row < rows; row++, x += n) {
        __m512 best = _mm512_set1_ps(-__builtin_inff());
        __mmask16 nans = 0; /* a greatest value does not show them */
        for (size_t i = 0; i < n; i += 16) {
            __mmask16 mask = lanes(n - i);
            __m512 values = _mm512_maskz_loadu_ps(mask, x + i);
            best = _mm512_mask_max_ps(best, mask, best, values);
            nans |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        }
        float most = _mm512_reduce_max_ps(best);
        __m512 greatest = _mm512_set1_ps(most);
        out[row] = -1;
        if (nans || !__builtin_isfinite(most)) continue;
        for (size_t i = 0; i < n; i += 16) {
            __mmask16 mask = lanes(n - i);
            __mmask16 found = _mm512_mask_cmp_ps_mask(
                mask, _mm512_maskz_loadu_ps(mask, x + i), greatest, _CMP_EQ_OQ);
            if (found) {
                out[row] = (int64_t)i + __builtin_ctz(found);
                break;
            }
        }
    }
}

END_SIMD
#endif
