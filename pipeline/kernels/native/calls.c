/* Checks of each kernel's arguments, and the way from plain numbers to what the kernel takes. */
#include "call_checks.h"

#if defined(VEILPIPE_SIMD)

/* A kind that runs here and sizes that can be. */
refusal_t check_weight(int64_t kind, int64_t packed, int64_t num_in, int64_t num_out) {
    if (kind >= NUM_KINDS || !holds_kind((int)kind)) {
        REFUSE("no such kind of weight on this CPU", kind);
    }
    if (num_in < 1 || num_in > LARGEST) REFUSE("num_in", num_in);
    if (num_out < 1 || num_out > LARGEST) REFUSE("num_out", num_out);
    if (packed % ALIGNMENT) REFUSE("packed weights have to be aligned to 64 bytes", packed);
    return DONE;
}

refusal_t check_ids(const int64_t *ids, int64_t stride, int64_t count, int64_t num_rows) {
    for (int64_t i = 0; i < count; i++) {
        int64_t id = ids[i * stride];
        if (id < 0 || id >= num_rows) REFUSE("no such row", id);
    }
    return DONE;
}

static refusal_t run_linear(const int64_t *a) {
    CHECK(check_weight(a[0], a[1], a[6], a[7]));
    if (a[8] >= NUM_ACTIVATIONS) REFUSE("activation", a[8]);
    if (a[5] == 0) return DONE;
    weight_t weight = {(int)a[0], at(a[1]), (size_t)a[6], (size_t)a[7]};
    product_t product = {at(a[3]), at(a[4]), at(a[2]), at(a[9]), (size_t)a[5], (int)a[8]};
    kernels->linear(&weight, &product);
    return DONE;
}

static int64_t product_work(int64_t rows, int64_t num_in, int64_t num_out) {
    int64_t size = num_in < LARGEST && num_out < LARGEST ? num_in * num_out : INT64_MAX;
    return rows > 0 && size > INT64_MAX / rows ? INT64_MAX : size * rows;
}

static int64_t linear_work(const int64_t *a) { return product_work(a[5], a[6], a[7]); }
const call_t call_linear = {"nppppnnnnp", run_linear, linear_work};

static refusal_t run_experts(const int64_t *a) {
    const expert_t *table = at(a[1]);
    if (a[2] < 1 || a[2] > LARGEST) REFUSE("experts", a[2]);
    if (a[3] < 1 || a[3] > a[2]) REFUSE("experts chosen", a[3]);
    if (a[5] >= NUM_GATES) REFUSE("gate", a[5]);
    if (a[12] > LARGEST / 2) REFUSE("inner", a[12]);
    for (int64_t i = 0; i < a[2]; i++) {
        CHECK(check_weight(a[0], (int64_t)(uintptr_t)table[i].gate_up, a[11], 2 * a[12]));
        CHECK(check_weight(a[0], (int64_t)(uintptr_t)table[i].down, a[12], a[11]));
    }
    if (a[10] == 0) return DONE;
    experts_t job = {
        .kind = (int)a[0], .experts = table, .num_experts = (size_t)a[2],
        .num_chosen = (size_t)a[3], .are_normalised = a[4] != 0, .gate = (int)a[5],
        .alpha = float_of(a[6]), .limit = float_of(a[7]), .x = at(a[8]), .logits = at(a[9]),
        .rows = (size_t)a[10], .hidden = (size_t)a[11], .inner = (size_t)a[12],
        .out = at(a[13]), .residual = at(a[14]),
    };
    if (!kernels->experts(&job)) REFUSE("rows, for which there is no memory", a[10]);
    return DONE;
}

static int64_t experts_work(const int64_t *a) {
    int64_t one = product_work(a[3], a[11], a[12]);
    return one > INT64_MAX / 3 ? INT64_MAX : product_work(a[10], one, 3);
}
const call_t call_experts = {"npnnnnffppnnnpp", run_experts, experts_work};

static refusal_t run_layer_norm(const int64_t *a) {
    if (a[5] < 1) REFUSE("size", a[5]);
    kernels->layer_norm(at(a[0]), at(a[1]), at(a[2]), at(a[3]), (size_t)a[4], (size_t)a[5], float_of(a[6]));
    return DONE;
}
const call_t call_layer_norm = {"ppppnnf", run_layer_norm, NULL};

static refusal_t run_rms_norm(const int64_t *a) {
    if (a[4] < 1) REFUSE("size", a[4]);
    kernels->rms_norm(at(a[0]), at(a[1]), at(a[2]), (size_t)a[3], (size_t)a[4], float_of(a[5]));
    return DONE;
}
const call_t call_rms_norm = {"pppnnf", run_rms_norm, NULL};

static refusal_t run_add_rms_norm(const int64_t *a) {
    if (a[4] < 1) REFUSE("size", a[4]);
    kernels->add_rms_norm(at(a[0]), at(a[1]), at(a[2]), (size_t)a[3], (size_t)a[4], float_of(a[5]));
    return DONE;
}
const call_t call_add_rms_norm = {"pppnnf", run_add_rms_norm, NULL};

static refusal_t run_rms_norm_within(const int64_t *a) {
    if (a[4] < 1) REFUSE("size", a[4]);
    if (a[3] > a[1] / a[4]) REFUSE("what is normed exceeds a row", a[3]);
    kernels->rms_norm_within(at(a[0]), (size_t)a[1], (size_t)a[2], (size_t)a[3], (size_t)a[4], at(a[5]),
                    float_of(a[6]));
    return DONE;
}
const call_t call_rms_norm_within = {"snnnnpf", run_rms_norm_within, NULL};

static refusal_t run_rope(const int64_t *a) {
    if (a[4] == 0 || a[3] > a[1] / a[4]) REFUSE("heads exceed a row", a[3]);
    if (a[5] % 2 || a[5] == 0 || a[5] > a[4]) REFUSE("turned dimensions are pairs of a head", a[5]);
    kernels->rope(at(a[0]), (size_t)a[1], (size_t)a[2], (size_t)a[3], (size_t)a[4], (size_t)a[5], at(a[6]),
         at(a[7]));
    return DONE;
}
const call_t call_rope = {"pnnnnnpp", run_rope, NULL};

static refusal_t run_silu_mul(const int64_t *a) {
    kernels->silu_mul(at(a[0]), at(a[1]), (size_t)a[2], (size_t)a[3]);
    return DONE;
}
const call_t call_silu_mul = {"ppnn", run_silu_mul, NULL};

static refusal_t run_gelu_mul(const int64_t *a) {
    kernels->gelu_mul(at(a[0]), at(a[1]), (size_t)a[2], (size_t)a[3]);
    return DONE;
}
const call_t call_gelu_mul = {"ppnn", run_gelu_mul, NULL};

static refusal_t run_clamped_mul(const int64_t *a) {
    kernels->clamped_mul(at(a[0]), at(a[1]), (size_t)a[2], (size_t)a[3], float_of(a[4]),
                         float_of(a[5]));
    return DONE;
}
const call_t call_clamped_mul = {"ppnnff", run_clamped_mul, NULL};

static refusal_t run_scale(const int64_t *a) {
    kernels->scale(at(a[0]), (size_t)a[1], float_of(a[2]));
    return DONE;
}
const call_t call_scale = {"pnf", run_scale, NULL};

static refusal_t run_turn_heads(const int64_t *a) {
    if (a[5] < BLOCK || a[5] % BLOCK || a[5] > MAX_HEAD_DIM) {
        REFUSE("width is a multiple of 16 up to 512", a[5]);
    }
    if (a[3] < 1 || a[3] > LARGEST) REFUSE("heads", a[3]);
    if (a[4] < 1 || a[4] > a[1] / a[5] / a[3]) REFUSE("heads exceed a row", a[4]);
    if (a[2] == 0) return DONE;
    turn_t job = {at(a[0]), (size_t)a[1], (size_t)a[2], (size_t)a[3], (size_t)a[4], (size_t)a[5],
                  at(a[6]), float_of(a[7])};
    kernels->turn_heads(&job);
    return DONE;
}

static int64_t turn_heads_work(const int64_t *a) {
    int64_t one = product_work(a[5], a[3], a[4]);
    return one > INT64_MAX / LARGEST ? INT64_MAX : product_work(a[2], one, a[5]);
}
const call_t call_turn_heads = {"snnnnnpf", run_turn_heads, turn_heads_work};

static refusal_t run_take_rows(const int64_t *a) {
    if (a[4] < BLOCK || a[4] % BLOCK || a[4] > MAX_HEAD_DIM) {
        REFUSE("width is a multiple of 16 up to 512", a[4]);
    }
    CHECK(check_ids(at(a[2]), 1, a[3], a[1]));
    taken_t taken = {at(a[0]), at(a[2]), (size_t)a[3], (size_t)a[4], at(a[5]), at(a[6])};
    kernels->take_rows(&taken);
    return DONE;
}

static int64_t take_rows_work(const int64_t *a) { return product_work(a[3], a[4], a[4]); }
const call_t call_take_rows = {"pnpnnpp", run_take_rows, take_rows_work};

/* Shapes and spans that can be. */
static refusal_t check_attention(const int64_t *a, const span_t *spans) {
    int64_t heads = a[7], kv_heads = a[8], head_dim = a[9], max_seq = a[10];
    if (kv_heads < 1 || heads < kv_heads || heads % kv_heads || heads > LARGEST) {
        REFUSE("heads are not a multiple of kv_heads", heads);
    }
    if (head_dim < BLOCK || head_dim % BLOCK || head_dim > MAX_HEAD_DIM) {
        REFUSE("head_dim is a multiple of 16 up to 512", head_dim);
    }
    if (max_seq < BLOCK || max_seq % BLOCK || max_seq > INT32_MAX) {
        REFUSE("max_seq is a multiple of 16", max_seq);
    }
    if (a[1] < (heads + 2 * kv_heads) * head_dim) {
        REFUSE("a row of qkv is shorter than its heads", a[1]);
    }
    if (a[12] != sizeof(float) && a[12] != sizeof(uint16_t)) {
        REFUSE("numbers of the cache take 4 bytes or 2", a[12]);
    }
    for (int64_t i = 0; i < a[6]; i++) {
        const span_t *span = spans + i;
        if (span->slot < 0 || span->row_offset < 0 || span->count < 1 || span->start < 0 ||
            span->count > max_seq || span->start > max_seq - span->count) {
            REFUSE("a span leaves the context; its start", span->start);
        }
    }
    return DONE;
}

static refusal_t run_attend(const int64_t *a) {
    const span_t *spans = at(a[5]);
    CHECK(check_attention(a, spans));
    attention_t shape = {
        .qkv = at(a[0]), .row_stride = (size_t)a[1], .out = at(a[2]), .keys = at(a[3]),
        .values = at(a[4]), .spans = spans, .num_spans = (size_t)a[6],
        .num_heads = (size_t)a[7], .num_kv_heads = (size_t)a[8], .head_dim = (size_t)a[9],
        .max_seq = (size_t)a[10], .window = (size_t)a[11], .is_half = a[12] == sizeof(uint16_t),
        .sinks = at(a[13]),
    };
    kernels->attend(&shape);
    return DONE;
}

static int64_t attend_work(const int64_t *a) {
    const span_t *spans = at(a[5]);
    if (check_attention(a, spans).what) return 0;
    int64_t work = 0;
    for (int64_t i = 0; i < a[6]; i++) {
        work += spans[i].count * (spans[i].start + spans[i].count) * a[7] * a[9];
    }
    return work;
}
const call_t call_attend = {"pnppppnnnnnnnp", run_attend, attend_work};

static refusal_t run_attend_rows(const int64_t *a) {
    if (a[7] < BLOCK || a[7] % BLOCK || a[7] > MAX_HEAD_DIM) {
        REFUSE("width is a multiple of 16 up to 512", a[7]);
    }
    if (a[6] < 1 || a[6] > LARGEST) REFUSE("rows", a[6]);
    if (a[3] < a[6] * a[7]) REFUSE("rows exceed a head", a[6]);
    held_rows_t held = {at(a[0]), at(a[1]), at(a[2]), (size_t)a[3], (size_t)a[4], (size_t)a[5],
                        (size_t)a[6], (size_t)a[7], at(a[8]), at(a[9])};
    kernels->attend_rows(&held);
    return DONE;
}

static int64_t attend_rows_work(const int64_t *a) {
    return product_work(a[4], a[5], a[6] < LARGEST && a[7] < LARGEST ? a[6] * a[7] : INT64_MAX);
}
const call_t call_attend_rows = {"pssnnnnnpp", run_attend_rows, attend_rows_work};

static refusal_t run_slide(const int64_t *a) {
    int64_t max_seq = a[5], kept = a[6], dropped = a[7], held = a[8];
    if (a[2] != sizeof(float) && a[2] != sizeof(uint16_t)) {
        REFUSE("numbers of the cache take 4 bytes or 2", a[2]);
    }
    if (a[4] < BLOCK || a[4] % BLOCK || a[4] > MAX_HEAD_DIM) {
        REFUSE("head_dim is a multiple of 16 up to 512", a[4]);
    }
    if (max_seq % BLOCK || held > max_seq) REFUSE("more rows than there are", held);
    if (kept > held || dropped > held - kept) REFUSE("more rows dropped than held", dropped);
    slide_t job = {at(a[0]), at(a[1]), a[2] == sizeof(uint16_t), (size_t)a[3], (size_t)a[4],
                   (size_t)kept, (size_t)dropped, (size_t)held, at(a[9]), at(a[10])};
    kernels->slide(&job);
    return DONE;
}
const call_t call_slide = {"ppnnnnnnnpp", run_slide, NULL};

static refusal_t run_argmax(const int64_t *a) {
    if (a[2] < 1) REFUSE("n", a[2]);
    kernels->argmax(at(a[0]), (size_t)a[1], (size_t)a[2], at(a[3]));
    return DONE;
}
const call_t call_argmax = {"pnnp", run_argmax, NULL};

static refusal_t run_ring_product(const int64_t *a) {
    if (a[0] != sizeof(uint32_t) && a[0] != sizeof(uint64_t)) {
        REFUSE("numbers of a matrix take 4 bytes or 8", a[0]);
    }
    if (a[5] < 1 || a[5] > LARGEST) REFUSE("num_in", a[5]);
    if (a[6] < 1 || a[6] > LARGEST) REFUSE("num_out", a[6]);
    ring_t ring = {a[0] == sizeof(uint64_t), at(a[1]), at(a[2]), at(a[3]),
                   (size_t)a[4], (size_t)a[5], (size_t)a[6]};
    kernels->ring_product(&ring);
    return DONE;
}

static int64_t ring_product_work(const int64_t *a) { return product_work(a[4], a[5], a[6]); }
const call_t call_ring_product = {"npppnnn", run_ring_product, ring_product_work};

#endif
