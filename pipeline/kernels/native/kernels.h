/* What the kernels share: kinds of packed weight, the thread pool, and who implements what.
 *
 * Every kernel gives a row bit for bit the same result whatever rows, chunks or threads come with
 * it: each output is accumulated in one fixed order, and only independent outputs run side by side.
 */
#ifndef VEILPIPE_KERNELS_H
#define VEILPIPE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) && (defined(__x86_64__) || (defined(__aarch64__) && defined(__AARCH64EL__)))
#define VEILPIPE_SIMD 1
#endif

enum kind { KIND_F32, KIND_BF16, KIND_I8, KIND_I4, NUM_KINDS };
enum activation { ACT_NONE, ACT_GELU_TANH, ACT_GELU_ERF, ACT_RELU, NUM_ACTIVATIONS };
enum gate { GATE_SILU, GATE_GELU_TANH, GATE_CLAMPED, NUM_GATES };
enum { VECTOR = 64 };             /* bytes */
enum { BLOCK = 16 };              /* outputs side by side in a packed weight */
enum { GROUP = 32, SUPER = 64 }; /* int8, int4: inputs that share a scale; inputs padded to */
#define SMALLEST_SCALE 1e-30f    /* int8: groups of smaller numbers are zeros, as in quantization.py */

/* 64 inputs of 16 outputs in int8. */
typedef struct {
    uint16_t scales[SUPER / GROUP][BLOCK]; /* bf16 */
    uint8_t weights[SUPER / 4][BLOCK][4];  /* + 128 */
} super_t;

/* 64 inputs of 16 outputs in int4: (weight - zero) * scale. */
typedef struct {
    uint16_t scales[SUPER / GROUP][BLOCK], zeros[SUPER / GROUP][BLOCK]; /* IEEE halves */
    /* quads of inputs as above, of a group's eight the n-th below and the n + 4-th above */
    uint8_t weights[SUPER / GROUP][GROUP / 8][BLOCK][4];
} super4_t;

enum { MAX_THREADS = 256, MAX_CPUS = 1024 }; /* the latter: as many as a cpu_set_t holds */
/* threads.c: chunks 0..num_chunks of a job, run by the caller and whichever workers are free. */
typedef void (*chunk_fn)(void *job, size_t chunk);
void pool_set_num_threads(size_t num_threads, const int *cpus); /* NULL, or one CPU for each */
size_t pool_num_threads(void);
void pool_run(chunk_fn run, void *job, size_t num_chunks);
size_t pool_num_chunks(size_t num_units); /* a good number of chunks for that many units of work */
void *scratch(size_t bytes);              /* this thread's, 64-byte aligned, until it asks again */
void pool_wipe(void); /* zeroes what the caller and the workers keep: scratch, and stack left behind */

/* pack.c */
typedef struct {
    int kind;
    const void *packed;
    size_t num_in, num_out;
} weight_t;

size_t block_bytes(int kind, size_t num_in); /* of one block of 16 outputs */
size_t packed_bytes(int kind, size_t num_in, size_t num_out);
void unpack(const weight_t *weight, float *dst);
void gather(const weight_t *weight, const int64_t *ids, size_t count, float *dst);

/* pack_tiles.c: weights as files hold them */
enum stored { STORED_F32, STORED_BF16, STORED_I8, STORED_F16, NUM_STORED }; /* I8: levels, too */

typedef struct {
    int stored;
    const void *values;
    ptrdiff_t stride_out, stride_in; /* elements */
    size_t num_in;
} matrix_t;

/* Which outputs and inputs of a packed weight a matrix is. */
typedef struct {
    size_t first_out, num_out, first_in, whole_num_in;
} place_t;

void pack(int kind, void *dst, const matrix_t *matrix, place_t place);
void pack_int8(void *dst, const matrix_t *matrix, const uint16_t *scales, ptrdiff_t scale_stride,
               place_t place); /* what is quantised already */
void pack_int4(void *dst, const matrix_t *matrix, const uint16_t *scales, const uint16_t *zeros,
               ptrdiff_t side_stride, place_t place);
/* convert.c */
void quantise(const matrix_t *matrix, size_t count, int8_t *values, uint16_t *scales);
void quantise_int4(const matrix_t *matrix, size_t count, uint8_t *levels, uint16_t *scales,
                   uint16_t *zeros);
void convert(int stored, const void *src, int kind, void *dst, size_t count);

/* linear.c, tiles_f32.c, tiles_bf16.c, tiles_i8.c, tiles_i4.c */
typedef struct {
    const float *x; /* [rows, num_in] */
    float *y;       /* [rows, num_out] */
    const float *bias, *residual;
    size_t rows;
    int activation;
} product_t;

/* acc[R rows][B blocks of 16] (+)= x[R rows][num_k] * w[num_k][B blocks]; acc's strides in
 * elements, block_stride in bytes. Each sum starts at zero, k ascending, and then replaces what acc
 * holds or adds to it. The rows of x come interleaved, R numbers of each input together (of BF16
 * pairs of inputs, R pairs); I8 and I4 have a layout of their own, their num_k counts 64 inputs,
 * their sums go on from what acc holds, and tiles of many rows fetch their share of the weights that
 * come next, FETCHES or FETCHES_I4 times for 64 inputs. */
typedef struct {
    const char *from;
    size_t step; /* bytes from one to the next, no more than a vector */
} share_t;
enum { FETCHES = 18, FETCHES_I4 = 10 };
typedef void (*tile_fn)(float *acc, size_t acc_stride, size_t acc_block, const char *x,
                        const char *w, size_t block_stride, size_t num_k, int adds, share_t next);

tile_fn tile_f32(size_t rows, size_t blocks);
tile_fn tile_bf16(size_t rows, size_t blocks);
tile_fn tile_i8(size_t rows, size_t blocks);
int has_bf16_dot(void); /* whether the next three, which AVX-512 alone has, may be called */
tile_fn tile_bf16_dot(size_t rows, size_t blocks);
size_t rounded_bytes(size_t num_in); /* of one row of x, as the next writes all of a tile's */
void round_rows(const float *x, size_t num_in, size_t rows, void *panel);
size_t quantised_bytes(size_t num_in);
void quantise_rows(const float *x, size_t num_in, size_t rows, void *panel);
tile_fn tile_i4(size_t rows, size_t blocks);
void sum_rows(const float *x, size_t num_in, size_t rows, void *panel); /* as I4 takes them */
enum { WIDE_SUPER = 1280 }; /* bytes of 64 inputs of a block, widened once for many tiles */
void widen_i4(const char *w, size_t num_supers, void *wide);
tile_fn tile_wide_i4(size_t rows, size_t blocks);
void interleave(const float *x, size_t num_in, size_t rows, void *panel);

/* The same in float32 of rows that follow each other every x_stride bytes, inputs of weights every
 * k_stride, for attention; weights in float32 or as IEEE halves, widened exactly on the way. A sum
 * starts at zero or goes on from what acc holds. */
typedef void (*rows_fn)(float *acc, size_t acc_stride, size_t acc_block, const char *x,
                        size_t x_stride, const char *w, size_t block_stride, size_t k_stride,
                        size_t num_k, int adds);
enum { MAX_ATTENTION_ROWS = 6 };
rows_fn tile_rows(int is_half, size_t rows, size_t blocks);

void linear(const weight_t *weight, const product_t *product);

/* experts.c */
typedef struct {
    const void *gate_up, *down; /* packed: [2 * inner, hidden], [hidden, inner] */
    const float *gate_up_bias, *down_bias; /* or NULL */
} expert_t;

typedef struct {
    int kind;
    const expert_t *experts;
    size_t num_experts, num_chosen;
    int are_normalised; /* whether shares of those chosen add up to 1 */
    int gate;
    float alpha, limit; /* GATE_CLAMPED's */
    const float *x, *logits;     /* [rows, hidden], [rows, num_experts] */
    size_t rows, hidden, inner;
    float *out;            /* [rows, hidden] */
    const float *residual; /* may be `out`, or NULL */
} experts_t;

int experts(const experts_t *job); /* 0 where there is no memory for what lies between */

/* attention.c, attention_cache.c */
enum { MAX_HEAD_DIM = 512 };

typedef struct {
    int64_t slot, row_offset, count, start;
} span_t;

typedef struct {
    const float *qkv;
    size_t row_stride;
    float *out;
    void *keys, *values;
    int is_half; /* keys and values: IEEE halves, else float32 */
    const span_t *spans;
    size_t num_spans, num_heads, num_kv_heads, head_dim, max_seq, window;
    const float *sinks; /* a score of each head that takes its share and gives nothing, or NULL */
} attention_t;

void attend(const attention_t *attention);

typedef struct {
    void *keys, *values; /* of one slot, as above */
    int is_half;
    size_t num_kv_heads, head_dim;
    size_t kept, dropped, held;    /* behind the first `kept` rows so many are dropped of `held` */
    const float *cosines, *sines;  /* [head_dim / 2], by which keys are turned back */
} slide_t;

void slide(const slide_t *job); /* the rest moves down */

/* attend_rows.c */
typedef struct {
    const float *queries, *keys, *values; /* [num_heads][num_queries][width]; of a head num_rows */
    size_t head_stride;                   /* of keys and of values, elements */
    size_t num_heads, num_queries, num_rows, width;
    float *outputs; /* as queries */
    double *log_sums;
} held_rows_t;

void attend_rows(const held_rows_t *held);

/* turn.c: of each row [num_heads][num_groups][width], times `factor`, times the head's matrix */
typedef struct {
    float *rows;
    size_t row_stride, num_rows, num_heads, num_groups, width;
    const float *matrices; /* [num_heads][width][width] */
    float factor;
} turn_t;

void turn_heads(const turn_t *turn);

/* out[i] = rows[order[i]], times a matrix where there is one */
typedef struct {
    const float *rows; /* [.][width] */
    const int64_t *order;
    size_t count, width;
    const float *matrix; /* [width][width] or NULL */
    float *out;          /* [count][width] */
} taken_t;

void take_rows(const taken_t *taken);

/* pointwise.c */
void layer_norm(const float *x, const float *weight, const float *bias, float *y, size_t rows,
                size_t size, float eps);
void rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t size, float eps);
void add_rms_norm(const float *x, const float *weight, float *y, size_t rows, size_t size,
                  float eps); /* y += */
void rms_norm_within(float *x, size_t row_stride, size_t rows, size_t count, size_t size,
                     const float *weight, float eps);
void rope(float *x, size_t row_stride, size_t rows, size_t num_heads, size_t head_dim,
          size_t num_dims, const float *cosines, const float *signed_sines);
void silu_mul(const float *gate_up, float *y, size_t rows, size_t inner);
void gelu_mul(const float *gate_up, float *y, size_t rows, size_t inner);
void clamped_mul(const float *gate_up, float *y, size_t rows, size_t inner, float alpha,
                 float limit);
void scale(float *x, size_t count, float factor);
void argmax(const float *x, size_t rows, size_t n, int64_t *out);

/* ring.c: y[rows, num_out] = x[rows, num_in] B, in Z_2^64 */
enum { RING_LANES = 8 };

typedef struct {
    int is_wide;        /* whether B is in 64 bits; else in 32, with a sign */
    const void *packed; /* B: [num_out / RING_LANES rounded up][num_in][RING_LANES] */
    const uint64_t *x;
    uint64_t *y;
    size_t rows, num_in, num_out;
} ring_t;

void ring_product(const ring_t *ring);

/* lookup.c */
typedef struct {
    int kind;
    const void *values;     /* row-major; I8 in int8 */
    const uint16_t *scales; /* I8: bf16, one for each GROUP of a row's values */
    size_t width;
} table_t;

/* out[i] (+)= table[ids[i * id_stride]] */
void lookup(const table_t *table, const int64_t *ids, size_t id_stride, size_t count, int adds,
            float *out);

/* levels.c: a level is a set of vector instructions for which all of these are compiled. */
#define KERNELS(X)                                                                                 \
    X(pack) X(pack_int8) X(pack_int4) X(quantise) X(quantise_int4) X(convert) X(linear)            \
    X(experts) X(attend) X(attend_rows) X(slide) X(layer_norm) X(rms_norm) X(add_rms_norm)         \
    X(rms_norm_within) X(rope) X(silu_mul) X(gelu_mul) X(clamped_mul) X(scale) X(turn_heads)       \
    X(take_rows) X(argmax) X(ring_product) X(lookup)
#define POINTER(NAME) __typeof__(NAME) *NAME;
typedef struct {
    KERNELS(POINTER)
} kernels_t;

extern const kernels_t *kernels; /* those in use; NULL where no level is this CPU's */
extern const kernels_t avx2_kernels;
extern int has_byte_dot; /* AVX2: whether AVX-VNNI multiplies bytes */

const char *level_name(size_t number); /* of those of this CPU, best first; NULL behind the last */
const char *current_level(void);       /* the best at first */
int use_level(const char *name);       /* 0 for none of this CPU */
int holds_kind(int kind);              /* whether the current one computes with it */
int rounds_rows(void);                 /* whether it multiplies BF16 by rows rounded to bf16 */

#endif
