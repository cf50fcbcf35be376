/* pipeline._native: checks arguments and calls the kernels. Described in pipeline/_native.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#if defined(VEILPIPE_X86)

#define ALIGNMENT 64
#define LARGEST ((int64_t)1 << 28) /* of any size: bytes of a weight fit 63 bits, so do products of two */
#define WORTH_RELEASING (1 << 23)  /* multiplications after which other threads should get a turn */

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}

static int has_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

/* Reads ints >= 0 that fit 63 bits; sets an exception and returns 0 otherwise. */
static int read_ints(PyObject *const *args, Py_ssize_t given, Py_ssize_t expected, int64_t *ints) {
    if (!has_avx512()) {
        PyErr_SetString(PyExc_ValueError, "this CPU lacks what features() would name");
        return 0;
    }
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, not %zd", expected, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < expected; i++) {
        ints[i] = PyLong_AsLongLong(args[i]);
        if (ints[i] >= 0) continue;
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "argument %zd is negative: %lld", i + 1, ints[i]);
        }
        return 0;
    }
    return 1;
}

static PyObject *bad_value(const char *what, int64_t value) {
    return PyErr_Format(PyExc_ValueError, "%s: %lld", what, (long long)value);
}

static float *floats(int64_t address) { return (float *)(uintptr_t)address; }

/* A kind that runs here and sizes that can be; sets an exception and returns 0 otherwise. */
static int check_weight(int64_t kind, int64_t packed, int64_t num_in, int64_t num_out) {
    if (kind >= NUM_KINDS || (kind == KIND_I8 && !has_vnni())) {
        bad_value("no such kind of weight on this CPU", kind);
    } else if (num_in < 1 || num_in > LARGEST) {
        bad_value("num_in", num_in);
    } else if (num_out < 1 || num_out > LARGEST) {
        bad_value("num_out", num_out);
    } else if (packed % ALIGNMENT) {
        bad_value("packed weights have to be aligned to 64 bytes", packed);
    } else {
        return 1;
    }
    return 0;
}

static PyObject *py_set_num_threads(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t num_threads;
    if (!read_ints(args, given, 1, &num_threads)) return NULL;
    if (num_threads < 1) return bad_value("num_threads", num_threads);
    pool_set_num_threads((size_t)num_threads);
    Py_RETURN_NONE;
}

static PyObject *py_packed_bytes(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[3];
    if (!read_ints(args, given, 3, a) || !check_weight(a[0], 0, a[1], a[2])) return NULL;
    return PyLong_FromSize_t(packed_bytes((int)a[0], (size_t)a[1], (size_t)a[2]));
}

static PyObject *py_pack(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[9];
    if (!read_ints(args, given, 9, a) || !check_weight(a[0], a[1], a[2], a[3])) return NULL;
    if (a[7] > a[3] || a[8] > a[3] - a[7]) {
        return bad_value("outputs end beyond num_out", a[7] + a[8]);
    }
    Py_BEGIN_ALLOW_THREADS
    pack((int)a[0], floats(a[1]), (size_t)a[2], floats(a[4]), (ptrdiff_t)a[5], (ptrdiff_t)a[6],
         (size_t)a[7], (size_t)a[8]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_pack_int8(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[10];
    if (!read_ints(args, given, 10, a) || !check_weight(KIND_I8, a[0], a[1], a[2])) return NULL;
    if (a[8] > a[2] || a[9] > a[2] - a[8]) return bad_value("outputs end beyond num_out", a[8] + a[9]);
    Py_BEGIN_ALLOW_THREADS
    pack_int8(floats(a[0]), (size_t)a[1], (const int8_t *)(uintptr_t)a[3], (ptrdiff_t)a[4],
              (ptrdiff_t)a[5], (const uint16_t *)(uintptr_t)a[6], (ptrdiff_t)a[7], (size_t)a[8],
              (size_t)a[9]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_unpack(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[5];
    if (!read_ints(args, given, 5, a) || !check_weight(a[0], a[1], a[2], a[3])) return NULL;
    weight_t weight = {(int)a[0], floats(a[1]), (size_t)a[2], (size_t)a[3]};
    unpack(&weight, floats(a[4]));
    Py_RETURN_NONE;
}

static PyObject *py_gather(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[7];
    if (!read_ints(args, given, 7, a) || !check_weight(a[0], a[1], a[2], a[3])) return NULL;
    weight_t weight = {(int)a[0], floats(a[1]), (size_t)a[2], (size_t)a[3]};
    const int64_t *ids = (const int64_t *)(uintptr_t)a[4];
    for (int64_t i = 0; i < a[5]; i++) {
        if (ids[i] < 0 || ids[i] >= a[3]) return bad_value("no such row", ids[i]);
    }
    gather(&weight, ids, (size_t)a[5], floats(a[6]));
    Py_RETURN_NONE;
}

static PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[10];
    if (!read_ints(args, given, 10, a) || !check_weight(a[0], a[1], a[6], a[7])) return NULL;
    if (a[8] >= NUM_ACTIVATIONS) return bad_value("activation", a[8]);
    weight_t weight = {(int)a[0], floats(a[1]), (size_t)a[6], (size_t)a[7]};
    product_t product = {floats(a[3]), floats(a[4]), floats(a[2]), floats(a[9]), (size_t)a[5],
                         (int)a[8]};
    if (a[5] == 0) Py_RETURN_NONE;
    PyThreadState *released =
        a[6] * a[7] > WORTH_RELEASING / a[5] ? PyEval_SaveThread() : NULL;
    linear(&weight, &product);
    if (released) PyEval_RestoreThread(released);
    Py_RETURN_NONE;
}

/* Reads `expected` ints and then a float. */
static int read_norm(PyObject *const *args, Py_ssize_t given, Py_ssize_t expected, int64_t *ints,
                     float *eps) {
    if (!read_ints(args, given - 1, expected, ints)) return 0;
    *eps = (float)PyFloat_AsDouble(args[expected]);
    if (PyErr_Occurred()) return 0;
    if (ints[expected - 1] < 1) bad_value("size", ints[expected - 1]);
    return ints[expected - 1] >= 1;
}

static PyObject *py_layer_norm(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[6];
    float eps;
    if (!read_norm(args, given, 6, a, &eps)) return NULL;
    layer_norm(floats(a[0]), floats(a[1]), floats(a[2]), floats(a[3]), (size_t)a[4], (size_t)a[5],
               eps);
    Py_RETURN_NONE;
}

static PyObject *py_rms_norm(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[5];
    float eps;
    if (!read_norm(args, given, 5, a, &eps)) return NULL;
    rms_norm(floats(a[0]), floats(a[1]), floats(a[2]), (size_t)a[3], (size_t)a[4], eps);
    Py_RETURN_NONE;
}

static PyObject *py_rope(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[7];
    if (!read_ints(args, given, 7, a)) return NULL;
    if (a[4] % 2 || a[4] == 0) return bad_value("head_dim is even", a[4]);
    if (a[3] > a[1] / a[4]) return bad_value("heads exceed a row", a[3]);
    rope(floats(a[0]), (size_t)a[1], (size_t)a[2], (size_t)a[3], (size_t)a[4], floats(a[5]),
         floats(a[6]));
    Py_RETURN_NONE;
}

static PyObject *py_silu_mul(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[4];
    if (!read_ints(args, given, 4, a)) return NULL;
    silu_mul(floats(a[0]), floats(a[1]), (size_t)a[2], (size_t)a[3]);
    Py_RETURN_NONE;
}

/* Sets an exception and returns 0 for shapes or spans that cannot be. */
static int check_attention(const int64_t *a, const span_t *spans) {
    int64_t heads = a[7], kv_heads = a[8], head_dim = a[9], max_seq = a[10];
    if (kv_heads < 1 || heads < kv_heads || heads % kv_heads || heads > LARGEST) {
        bad_value("heads are not a multiple of kv_heads", heads);
    } else if (head_dim < BLOCK || head_dim % BLOCK || head_dim > MAX_HEAD_DIM) {
        bad_value("head_dim is a multiple of 16 up to 512", head_dim);
    } else if (max_seq < BLOCK || max_seq % BLOCK || max_seq > INT32_MAX) {
        bad_value("max_seq is a multiple of 16", max_seq);
    } else if (a[1] < (heads + 2 * kv_heads) * head_dim) {
        bad_value("a row of qkv is shorter than its heads", a[1]);
    } else {
        for (int64_t i = 0; i < a[6]; i++) {
            const span_t *span = spans + i;
            if (span->slot < 0 || span->row_offset < 0 || span->count < 1 || span->start < 0 ||
                span->count > max_seq || span->start > max_seq - span->count) {
                bad_value("a span leaves the context; its start", span->start);
                return 0;
            }
        }
        return 1;
    }
    return 0;
}

static PyObject *py_attend(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[12];
    if (!read_ints(args, given, 12, a)) return NULL;
    const span_t *spans = (const span_t *)(uintptr_t)a[5];
    if (!check_attention(a, spans)) return NULL;
    attention_t shape = {
        .qkv = floats(a[0]), .row_stride = (size_t)a[1], .out = floats(a[2]),
        .keys = floats(a[3]), .values = floats(a[4]), .spans = spans, .num_spans = (size_t)a[6],
        .num_heads = (size_t)a[7], .num_kv_heads = (size_t)a[8], .head_dim = (size_t)a[9],
        .max_seq = (size_t)a[10], .window = (size_t)a[11],
    };
    int64_t work = 0;
    for (int64_t i = 0; i < a[6]; i++) {
        work += spans[i].count * (spans[i].start + spans[i].count) * a[7] * a[9];
    }
    PyThreadState *released = work > WORTH_RELEASING ? PyEval_SaveThread() : NULL;
    attend(&shape);
    if (released) PyEval_RestoreThread(released);
    Py_RETURN_NONE;
}

static PyObject *py_argmax(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[4];
    if (!read_ints(args, given, 4, a)) return NULL;
    if (a[2] < 1) return bad_value("n", a[2]);
    argmax(floats(a[0]), (size_t)a[1], (size_t)a[2], (int64_t *)(uintptr_t)a[3]);
    Py_RETURN_NONE;
}

static PyObject *py_features(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    if (!has_avx512()) return PyTuple_New(0);
    const char *names[] = {"avx512", "bf16", NULL, NULL};
    Py_ssize_t count = 2;
    if (has_bf16_dot()) names[count++] = "bf16_dot";
    if (has_vnni()) names[count++] = "vnni";
    PyObject *features = PyTuple_New(count);
    for (Py_ssize_t i = 0; features != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL) Py_CLEAR(features);
        else PyTuple_SET_ITEM(features, i, name);
    }
    return features;
}

#define FAST(NAME) {#NAME, (PyCFunction)(void (*)(void))py_##NAME, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    {"features", py_features, METH_NOARGS, NULL},
    FAST(set_num_threads), FAST(packed_bytes), FAST(pack), FAST(pack_int8), FAST(unpack),
    FAST(gather), FAST(linear), FAST(layer_norm), FAST(rms_norm), FAST(rope), FAST(silu_mul),
    FAST(attend), FAST(argmax), {NULL, NULL, 0, NULL},
};

#else

static PyObject *py_features(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyTuple_New(0);
}

static PyMethodDef methods[] = {{"features", py_features, METH_NOARGS, NULL},
                                {NULL, NULL, 0, NULL}};
#endif

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "pipeline._native",
                                    "Kernels in C; see pipeline/_native.pyi.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *native = PyModule_Create(&module);
    if (native == NULL || PyModule_AddIntConstant(native, "F32", KIND_F32) ||
        PyModule_AddIntConstant(native, "BF16", KIND_BF16) ||
        PyModule_AddIntConstant(native, "I8", KIND_I8)) {
        Py_XDECREF(native);
        return NULL;
    }
    return native;
}
