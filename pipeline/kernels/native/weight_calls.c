/* The calls that make packed weights and tables, and read them: checks, as in calls.c. */
#include "call_checks.h"

#if defined(VEILPIPE_SIMD)

static int64_t always(const int64_t *a) { return (void)a, INT64_MAX; }

/* first_out, count, first_in and count_in of a weight of these sizes. */
static refusal_t check_place(const int64_t *a, int64_t num_in, int64_t num_out) {
    if (a[0] > num_out || a[1] > num_out - a[0]) {
        REFUSE("outputs end beyond num_out", a[0] + a[1]);
    }
    if (a[2] % SUPER) REFUSE("inputs have to begin at a multiple of 64", a[2]);
    if (a[2] >= num_in || a[3] < 1 || a[3] > num_in - a[2]) REFUSE("inputs", a[2] + a[3]);
    if (a[3] % SUPER && a[3] != num_in - a[2]) REFUSE("inputs end amid 64", a[2] + a[3]);
    return DONE;
}

static place_t place_of(const int64_t *a, int64_t num_in) {
    return (place_t){(size_t)a[0], (size_t)a[1], (size_t)a[2], (size_t)num_in};
}

static refusal_t check_floats(int64_t stored) {
    if (stored >= NUM_STORED || stored == STORED_I8) REFUSE("no such format of floats", stored);
    return DONE;
}

static refusal_t run_pack(const int64_t *a) {
    CHECK(check_weight(a[0], a[1], a[2], a[3]));
    CHECK(check_floats(a[4]));
    CHECK(check_place(a + 8, a[2], a[3]));
    matrix_t matrix = {(int)a[4], at(a[5]), (ptrdiff_t)a[6], (ptrdiff_t)a[7], (size_t)a[11]};
    kernels->pack((int)a[0], at(a[1]), &matrix, place_of(a + 8, a[2]));
    return DONE;
}
const call_t call_pack = {"npnnnsnnnnnn", run_pack, always};

static refusal_t run_pack_int8(const int64_t *a) {
    CHECK(check_weight(KIND_I8, a[0], a[1], a[2]));
    CHECK(check_place(a + 8, a[1], a[2]));
    matrix_t matrix = {STORED_I8, at(a[3]), (ptrdiff_t)a[4], (ptrdiff_t)a[5], (size_t)a[11]};
    kernels->pack_int8(at(a[0]), &matrix, at(a[6]), (ptrdiff_t)a[7], place_of(a + 8, a[1]));
    return DONE;
}
const call_t call_pack_int8 = {"pnnsnnsnnnnn", run_pack_int8, always};

static refusal_t run_pack_int4(const int64_t *a) {
    CHECK(check_weight(KIND_I4, a[0], a[1], a[2]));
    CHECK(check_place(a + 9, a[1], a[2]));
    matrix_t matrix = {STORED_I8, at(a[3]), (ptrdiff_t)a[4], (ptrdiff_t)a[5], (size_t)a[12]};
    kernels->pack_int4(at(a[0]), &matrix, at(a[6]), at(a[7]), (ptrdiff_t)a[8], place_of(a + 9, a[1]));
    return DONE;
}
const call_t call_pack_int4 = {"pnnsnnssnnnnn", run_pack_int4, always};

static refusal_t check_floats_to_quantise(const int64_t *a) {
    CHECK(check_floats(a[0]));
    if (a[4] < 1 || a[4] > LARGEST) REFUSE("num_in", a[4]);
    if (a[5] > LARGEST) REFUSE("count", a[5]);
    return DONE;
}

static refusal_t run_quantise(const int64_t *a) {
    CHECK(check_floats_to_quantise(a));
    matrix_t matrix = {(int)a[0], at(a[1]), (ptrdiff_t)a[2], (ptrdiff_t)a[3], (size_t)a[4]};
    kernels->quantise(&matrix, (size_t)a[5], at(a[6]), at(a[7]));
    return DONE;
}
const call_t call_quantise = {"nsnnnnpp", run_quantise, always};

static refusal_t run_quantise_int4(const int64_t *a) {
    CHECK(check_floats_to_quantise(a));
    matrix_t matrix = {(int)a[0], at(a[1]), (ptrdiff_t)a[2], (ptrdiff_t)a[3], (size_t)a[4]};
    kernels->quantise_int4(&matrix, (size_t)a[5], at(a[6]), at(a[7]), at(a[8]));
    return DONE;
}
const call_t call_quantise_int4 = {"nsnnnnppp", run_quantise_int4, always};

static refusal_t run_convert(const int64_t *a) {
    CHECK(check_floats(a[0]));
    if (a[2] != KIND_F32 && a[2] != KIND_BF16) REFUSE("no such format to convert to", a[2]);
    kernels->convert((int)a[0], at(a[1]), (int)a[2], at(a[3]), (size_t)a[4]);
    return DONE;
}
const call_t call_convert = {"npnpn", run_convert, always};

static refusal_t run_unpack(const int64_t *a) {
    CHECK(check_weight(a[0], a[1], a[2], a[3]));
    weight_t weight = {(int)a[0], at(a[1]), (size_t)a[2], (size_t)a[3]};
    unpack(&weight, at(a[4]));
    return DONE;
}
const call_t call_unpack = {"npnnp", run_unpack, NULL};

static refusal_t run_gather(const int64_t *a) {
    CHECK(check_weight(a[0], a[1], a[2], a[3]));
    CHECK(check_ids(at(a[4]), 1, a[5], a[3]));
    weight_t weight = {(int)a[0], at(a[1]), (size_t)a[2], (size_t)a[3]};
    gather(&weight, at(a[4]), (size_t)a[5], at(a[6]));
    return DONE;
}
const call_t call_gather = {"npnnpnp", run_gather, NULL};

static refusal_t run_lookup(const int64_t *a) {
    if (a[0] > KIND_I8) REFUSE("no such kind of table", a[0]);
    if (a[4] < 1 || a[4] > LARGEST) REFUSE("width", a[4]);
    CHECK(check_ids(at(a[5]), a[6], a[7], a[3]));
    table_t table = {(int)a[0], at(a[1]), at(a[2]), (size_t)a[4]};
    kernels->lookup(&table, at(a[5]), (size_t)a[6], (size_t)a[7], a[8] != 0, at(a[9]));
    return DONE;
}
const call_t call_lookup = {"nppnnsnnnp", run_lookup, NULL};

static refusal_t run_copy(const int64_t *a) {
    memcpy(at(a[1]), at(a[0]), (size_t)a[2]);
    return DONE;
}
const call_t call_copy = {"ppn", run_copy, NULL};

static refusal_t run_widen(const int64_t *a) {
    const uint32_t *from = at(a[0]);
    int64_t *to = at(a[1]);
    for (int64_t i = 0; i < a[2]; i++) to[i] = from[i];
    return DONE;
}
const call_t call_widen = {"ppn", run_widen, NULL};

static refusal_t run_narrow(const int64_t *a) {
    const int64_t *from = at(a[0]);
    uint32_t *to = at(a[1]);
    for (int64_t i = 0; i < a[2]; i++) to[i] = (uint32_t)from[i];
    return DONE;
}
const call_t call_narrow = {"ppn", run_narrow, NULL};

#endif
