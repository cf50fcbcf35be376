/* pipeline.kernels._native: what Python sees of the kernels. Described in pipeline/kernels/_native.pyi. */
#include "calls.h"

#if defined(VEILPIPE_SIMD)

static int64_t number(PyObject *arg) {
    int64_t value = PyLong_AsLongLong(arg);
    if (value >= 0 || PyErr_Occurred()) return value;
    PyErr_Format(PyExc_ValueError, "argument is negative: %lld", (long long)value);
    return -1;
}

static PyObject *py_set_num_threads(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    if (given < 1) return PyErr_Format(PyExc_TypeError, "expected a number of threads, and CPUs");
    int64_t num_threads = number(args[0]);
    if (num_threads < 0) return NULL;
    if (num_threads < 1 || num_threads > MAX_THREADS) return refuse((refusal_t){"num_threads", num_threads});
    if (given > 1 && given - 1 != num_threads) return refuse((refusal_t){"CPUs", given - 1});
    int cpus[MAX_THREADS];
    for (Py_ssize_t i = 0; i < given - 1; i++) {
        int64_t cpu = number(args[1 + i]);
        if (cpu < 0) return NULL;
        if (cpu >= MAX_CPUS) return refuse((refusal_t){"CPU", cpu});
        cpus[i] = (int)cpu;
    }
    pool_set_num_threads((size_t)num_threads, given > 1 ? cpus : NULL);
    Py_RETURN_NONE;
}

static PyObject *py_wipe(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    Py_BEGIN_ALLOW_THREADS
    pool_wipe();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_packed_bytes(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    int64_t a[3];
    if (given != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, not %zd", given);
    for (int i = 0; i < 3; i++) {
        if ((a[i] = number(args[i])) < 0) return NULL;
    }
    refusal_t refusal = check_weight(a[0], 0, a[1], a[2]);
    if (refusal.what) return refuse(refusal);
    return PyLong_FromSize_t(packed_bytes((int)a[0], (size_t)a[1], (size_t)a[2]));
}

/* Adds a string. Returns 0 with an exception. */
static int add_name(PyObject *list, const char *name) {
    PyObject *string = PyUnicode_FromString(name);
    int added = string != NULL && PyList_Append(list, string) == 0;
    Py_XDECREF(string);
    return added;
}

/* A tuple in place of a list, or NULL in place of one that could not be filled. */
static PyObject *frozen(PyObject *list, int is_filled) {
    PyObject *tuple = is_filled ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

static PyObject *py_levels(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    PyObject *names = PyList_New(0);
    int is_filled = names != NULL;
    for (size_t i = 0; is_filled && level_name(i); i++) is_filled = add_name(names, level_name(i));
    return frozen(names, is_filled);
}

static PyObject *py_use_level(PyObject *self, PyObject *name) {
    (void)self;
    const char *text = PyUnicode_AsUTF8(name);
    if (!text) return NULL;
    if (!use_level(text)) return PyErr_Format(PyExc_ValueError, "no level of this CPU: %s", text);
    Py_RETURN_NONE;
}

static PyObject *py_features(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    static const char *const kinds[NUM_KINDS] = {"float32", "bfloat16", "int8", "int4"};
    PyObject *names = PyList_New(0);
    int is_filled = names != NULL;
    if (is_filled && current_level()) is_filled = add_name(names, current_level());
    for (int kind = 0; is_filled && kind < NUM_KINDS; kind++) {
        if (holds_kind(kind)) is_filled = add_name(names, kinds[kind]);
    }
    if (is_filled && current_level() && rounds_rows()) is_filled = add_name(names, "bf16_dot");
    return frozen(names, is_filled);
}

#define FUNCTION(NAME)                                                                            \
    static PyObject *py_##NAME(PyObject *self, PyObject *const *args, Py_ssize_t given) {         \
        (void)self;                                                                               \
        return make_call(&call_##NAME, args, given);                                              \
    }
CALLS(FUNCTION)

static PyObject *py_call(PyObject *self, PyObject *callable) {
    (void)self;
    return make_python_call(callable);
}

#define FAST(NAME) {#NAME, (PyCFunction)(void (*)(void))py_##NAME, METH_FASTCALL, NULL},
static PyMethodDef methods[] = {
    {"features", py_features, METH_NOARGS, NULL},
    {"levels", py_levels, METH_NOARGS, NULL},
    {"use_level", py_use_level, METH_O, NULL},
    {"wipe", py_wipe, METH_NOARGS, NULL},
    {"call", py_call, METH_O, NULL},
    FAST(set_num_threads)
    FAST(packed_bytes)
    CALLS(FAST) {NULL, NULL, 0, NULL},
};

#else

static PyObject *py_nothing(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyTuple_New(0);
}

static PyMethodDef methods[] = {{"features", py_nothing, METH_NOARGS, NULL},
                                {"levels", py_nothing, METH_NOARGS, NULL},
                                {NULL, NULL, 0, NULL}};
#endif

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "pipeline.kernels._native",
                                    "Kernels in C; see pipeline/kernels/_native.pyi.", -1, methods,
                                    NULL, NULL, NULL, NULL};

static int add_members(PyObject *native) {
#if defined(VEILPIPE_SIMD)
    if (PyModule_AddType(native, &program_type)) return -1;
#endif
    return PyModule_AddIntConstant(native, "F32", KIND_F32) ||
           PyModule_AddIntConstant(native, "BF16", KIND_BF16) ||
           PyModule_AddIntConstant(native, "I8", KIND_I8) ||
           PyModule_AddIntConstant(native, "I4", KIND_I4) ||
           PyModule_AddIntConstant(native, "STORED_F32", STORED_F32) ||
           PyModule_AddIntConstant(native, "STORED_BF16", STORED_BF16) ||
           PyModule_AddIntConstant(native, "STORED_F16", STORED_F16) ||
           PyModule_AddIntConstant(native, "MAX_THREADS", MAX_THREADS) ||
           PyModule_AddIntConstant(native, "MAX_CPUS", MAX_CPUS);
}

PyMODINIT_FUNC PyInit__native(void) {
#if defined(VEILPIPE_SIMD)
    current_level(); /* decides for the best */
#endif
    PyObject *native = PyModule_Create(&module);
    if (native != NULL && add_members(native)) Py_CLEAR(native);
    return native;
}
