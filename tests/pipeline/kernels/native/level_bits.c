/* Prints a hash of what each kernel makes of fixed numbers: the same at every level.
 *
 * level_bits [LEVEL]: the best of this processor if none is named. scripts/test_neon.sh compiles it
 * for two processors, and compares.
 */
#include "../../../../pipeline/kernels/native/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FLOATS = 1 << 17 };

static float numbers[FLOATS], out[FLOATS];
static uint16_t halves[FLOATS];
static _Alignas(64) char packed[NUM_KINDS][1 << 20];

/* About 1 each, of both signs. */
static void draw(float *to, size_t count, uint64_t seed) {
    for (size_t i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        to[i] = (float)(int32_t)(seed >> 32) / (float)(1u << 30);
    }
}

static void tell(const char *name, size_t a, size_t b, const void *data, size_t bytes) {
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %zu %zu %016llx\n", name, a, b, (unsigned long long)hash);
}

static void products(size_t num_in, size_t num_out) {
    matrix_t matrix = {STORED_F32, numbers, (ptrdiff_t)num_in, 1, num_in};
    matrix_t columns = {STORED_F16, halves, 1, (ptrdiff_t)num_out, num_in};
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        if (!holds_kind(kind)) continue;
        size_t bytes = packed_bytes(kind, num_in, num_out);
        memset(packed[kind], 0, bytes);
        kernels->pack(kind, packed[kind], &columns, (place_t){0, num_out, 0, num_in});
        tell("pack-columns", num_in, (size_t)kind, packed[kind], bytes);
        kernels->pack(kind, packed[kind], &matrix, (place_t){0, num_out, 0, num_in});
        tell("pack", num_in, (size_t)kind, packed[kind], bytes);
        weight_t weight = {kind, packed[kind], num_in, num_out};
        for (size_t rows = 1; rows <= 35; rows += rows < 20 ? 1 : 15) {
            product_t job = {.x = numbers + 77, .y = out, .bias = numbers + 5, .rows = rows,
                             .residual = rows % 2 ? numbers + 1000 : NULL,
                             .activation = (int)(rows % NUM_ACTIVATIONS)};
            kernels->linear(&weight, &job);
            tell(kind == KIND_BF16 && rounds_rows() ? "rounded-linear" : "linear", rows,
                 num_in * NUM_KINDS + (size_t)kind, out, rows * num_out * sizeof *out);
        }
    }
}

static void formats(size_t num_in, size_t count) {
    static int8_t levels[FLOATS];
    static uint16_t scales[FLOATS], found[FLOATS];
    const void *const of[] = {[STORED_F32] = numbers, [STORED_BF16] = halves, [STORED_F16] = halves};
    size_t groups = (num_in + GROUP - 1) / GROUP;
    for (int stored = 0; stored < NUM_STORED; stored++) {
        if (stored == STORED_I8) continue;
        kernels->convert(stored, of[stored], KIND_F32, out, num_in * count);
        tell("to-float32", num_in, (size_t)stored, out, num_in * count * sizeof *out);
        kernels->convert(stored, of[stored], KIND_BF16, found, num_in * count);
        tell("to-bfloat16", num_in, (size_t)stored, found, num_in * count * sizeof *found);
        matrix_t matrix = {stored, of[stored], (ptrdiff_t)num_in, 1, num_in};
        kernels->quantise(&matrix, count, levels, scales);
        tell("levels", num_in, (size_t)stored, levels, num_in * count);
        tell("scales", num_in, (size_t)stored, scales, groups * count * sizeof *scales);
        if (!holds_kind(KIND_I8)) continue;
        matrix_t int8 = {STORED_I8, levels, (ptrdiff_t)num_in, 1, num_in};
        memset(packed[KIND_I8], 0, packed_bytes(KIND_I8, num_in, count));
        kernels->pack_int8(packed[KIND_I8], &int8, scales, (ptrdiff_t)groups,
                           (place_t){0, count, 0, num_in});
        tell("pack-int8", num_in, (size_t)stored, packed[KIND_I8],
             packed_bytes(KIND_I8, num_in, count));
        static uint8_t four[FLOATS];
        static uint16_t steps[FLOATS], zeros[FLOATS];
        kernels->quantise_int4(&matrix, count, four, steps, zeros);
        tell("levels-int4", num_in, (size_t)stored, four, num_in * count);
        tell("scales-int4", num_in, (size_t)stored, steps, groups * count * sizeof *steps);
        tell("zeros-int4", num_in, (size_t)stored, zeros, groups * count * sizeof *zeros);
        if (!holds_kind(KIND_I4)) continue;
        matrix_t int4 = {STORED_I8, four, (ptrdiff_t)num_in, 1, num_in};
        memset(packed[KIND_I4], 0, packed_bytes(KIND_I4, num_in, count));
        kernels->pack_int4(packed[KIND_I4], &int4, steps, zeros, (ptrdiff_t)groups,
                           (place_t){0, count, 0, num_in});
        tell("pack-int4", num_in, (size_t)stored, packed[KIND_I4],
             packed_bytes(KIND_I4, num_in, count));
    }
    int64_t ids[20];
    for (int i = 0; i < 20; i++) ids[i] = i * 7 % (int64_t)count;
    const void *const tables[] = {numbers, halves, levels};
    for (int kind = 0; kind <= KIND_I8; kind++) {
        table_t table = {kind, tables[kind], scales, num_in};
        kernels->lookup(&table, ids, 1, 20, 0, out);
        kernels->lookup(&table, ids, 2, 10, 1, out);
        tell("lookup", num_in, (size_t)kind, out, 20 * num_in * sizeof *out);
    }
}

static void rows_of(size_t size) {
    static float x[FLOATS];
    const size_t rows = 5, bytes = rows * size * sizeof *out;
    memcpy(x, numbers, sizeof x);
    kernels->layer_norm(x, x + 9, x + 99, out, rows, size, 1e-5f);
    tell("layer_norm", size, 0, out, bytes);
    kernels->rms_norm(x, x + 9, out, rows, size, 1e-5f);
    kernels->add_rms_norm(x + 3, x + 9, out, rows, size, 1e-5f);
    tell("rms_norm", size, 0, out, bytes);
    kernels->silu_mul(x, out, rows, size);
    tell("silu_mul", size, 0, out, bytes);
    for (size_t i = 0; i < rows * size; i++) x[i] *= 20; /* also to where e^x is none */
    kernels->gelu_mul(x, out, rows, size);
    tell("gelu_mul", size, 0, out, bytes);
    kernels->clamped_mul(x, out, rows, size, 1.702f, 7.0f);
    tell("clamped_mul", size, 0, out, bytes);
    for (size_t i = 0; i < rows * size; i++) x[i] *= 5;
    kernels->silu_mul(x, out, rows, size);
    tell("silu_mul", size, 1, out, bytes);
    kernels->scale(out, rows * size, 0.3f);
    tell("scale", size, 0, out, bytes);
    int64_t found[5];
    x[3 * size / 2] = __builtin_nanf("");
    x[3 * size + size / 2] = __builtin_inff();
    kernels->argmax(x, rows, size, found);
    tell("argmax", size, 0, found, sizeof found);
    memcpy(out, numbers, 5 * 128 * sizeof *out);
    size_t dims = size < 62 ? size / 2 * 2 : 62;
    kernels->rope(out, 128, rows, 2, 64, dims, numbers + 50, numbers + 70);
    kernels->rms_norm_within(out, 128, rows, 2, 64, numbers, 1e-6f);
    tell("rope", size, 0, out, 5 * 128 * sizeof *out);
}

static void attention(int is_half, size_t group, size_t window) {
    enum { SLOTS = 2, MAX_SEQ = 64, HEADS = 2, DIM = 48 };
    static char keys[SLOTS * MAX_SEQ * HEADS * DIM * 4], values[sizeof keys];
    memset(keys, 0, sizeof keys);
    memset(values, 0, sizeof values);
    size_t stride = (group + 2) * HEADS * DIM, width = group * HEADS * DIM;
    span_t steps[][2] = {{{0, 0, 19, 0}, {1, 19, 7, 0}}, {{0, 0, 1, 19}, {1, 1, 1, 7}},
                         {{1, 0, 9, 8}, {0, 9, 1, 20}}};
    for (size_t i = 0; i < 3; i++) {
        size_t rows = (size_t)(steps[i][0].count + steps[i][1].count);
        attention_t job = {.qkv = numbers + 31 * i, .row_stride = stride, .out = out, .keys = keys,
                           .values = values, .is_half = is_half, .spans = steps[i], .num_spans = 2,
                           .num_heads = HEADS * group, .num_kv_heads = HEADS, .head_dim = DIM,
                           .max_seq = MAX_SEQ, .window = window};
        for (int has_sinks = 0; has_sinks < 2; has_sinks++) {
            job.sinks = has_sinks ? numbers + 700 : NULL;
            kernels->attend(&job);
            tell(has_sinks ? "attend-sinks" : "attend", group * 100 + window,
                 i * 2 + (size_t)is_half, out, rows * width * sizeof *out);
        }
    }
    slide_t job = {keys, values, is_half, HEADS, DIM, 2, 5, 21, numbers, numbers + 64};
    kernels->slide(&job);
    tell("slide", group, (size_t)is_half, keys, sizeof keys);
}

static void held(size_t width) {
    enum { HEADS = 2, QUERIES = 5, ROWS = 9 };
    double log_sums[HEADS * QUERIES];
    held_rows_t job = {numbers, numbers + 3000, numbers + 6000, ROWS * width, HEADS, QUERIES, ROWS,
                       width, out, log_sums};
    kernels->attend_rows(&job);
    tell("attend_rows", width, 0, out, HEADS * QUERIES * width * sizeof *out);
    tell("attend_rows-sums", width, 0, log_sums, sizeof log_sums);
    static float rows[ROWS * 2 * 3 * 64];
    memcpy(rows, numbers, sizeof rows);
    turn_t turned = {rows, 6 * width, ROWS, 2, 3, width, numbers + 100, 0.7f};
    kernels->turn_heads(&turned);
    tell("turn_heads", width, 0, rows, ROWS * 6 * width * sizeof *rows);
    static const int64_t order[] = {3, 0, 8, 3, 5};
    for (int has_matrix = 0; has_matrix < 2; has_matrix++) {
        taken_t taken = {numbers, order, 5, width, has_matrix ? numbers + 900 : NULL, out};
        kernels->take_rows(&taken);
        tell("take_rows", width, (size_t)has_matrix, out, 5 * width * sizeof *out);
    }
}

static void routed(void) {
    enum { NUM = 3, HIDDEN = 40, INNER = 24, ROWS = 7 };
    static _Alignas(64) char weights[2 * NUM][1 << 13];
    expert_t table[NUM];
    for (size_t i = 0; i < NUM; i++) {
        matrix_t up = {STORED_F32, numbers + i * 100, HIDDEN, 1, HIDDEN};
        matrix_t down = {STORED_F32, numbers + i * 300, INNER, 1, INNER};
        kernels->pack(KIND_F32, weights[2 * i], &up, (place_t){0, 2 * INNER, 0, HIDDEN});
        kernels->pack(KIND_F32, weights[2 * i + 1], &down, (place_t){0, HIDDEN, 0, INNER});
        table[i] = (expert_t){weights[2 * i], weights[2 * i + 1], numbers + i * 50,
                              numbers + i * 70};
    }
    for (int gate = 0; gate < NUM_GATES; gate++) {
        experts_t job = {.kind = KIND_F32, .experts = table, .num_experts = NUM, .num_chosen = 2,
                         .are_normalised = 1, .gate = gate, .alpha = 1.702f, .limit = 7.0f,
                         .x = numbers, .logits = numbers + 500, .rows = ROWS, .hidden = HIDDEN,
                         .inner = INNER, .out = out};
        if (!kernels->experts(&job)) exit(1);
        tell("experts", NUM, (size_t)gate, out, ROWS * HIDDEN * sizeof *out);
    }
}

static void ring(int is_wide) {
    enum { ROWS = 6, NUM_IN = 33, NUM_OUT = 45 };
    uint64_t y[ROWS * NUM_OUT];
    ring_t job = {is_wide, numbers + 2000, (const uint64_t *)numbers, y, ROWS, NUM_IN, NUM_OUT};
    kernels->ring_product(&job);
    tell("ring_product", (size_t)is_wide, 0, y, sizeof y);
}

int main(int argc, char **argv) {
    if (!current_level() || (argc > 1 && !use_level(argv[1]))) {
        fprintf(stderr, "this processor lacks %s\n", argc > 1 ? argv[1] : "all levels");
        return 1;
    }
    draw(numbers, FLOATS, 1);
    for (size_t i = 0; i < FLOATS; i++) {
        halves[i] = (uint16_t)(0x3800 + (i * 2654435761u >> 20) % 1024 + (i % 3 ? 0 : 0x8000));
    }
    static const size_t sizes[][2] = {{1, 1}, {33, 17}, {64, 32}, {200, 100}, {600, 70}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        products(sizes[i][0], sizes[i][1]);
        formats(sizes[i][0], sizes[i][1]);
        rows_of(sizes[i][0] + 1);
    }
    for (int is_half = 0; is_half < 2; is_half++) {
        attention(is_half, 1, 0);
        attention(is_half, 3, 6);
        attention(is_half, 8, 0);
        ring(is_half);
    }
    held(16);
    held(64);
    routed();
    return 0;
}
