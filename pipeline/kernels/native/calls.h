/* The kernels as Python calls them: each takes numbers, checks them, and computes or refuses. */
#ifndef VEILPIPE_CALLS_H
#define VEILPIPE_CALLS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

enum { MAX_ARGS = 15 };

/* Why sizes cannot be, and the one to blame; `what` is NULL for a call that was computed. */
typedef struct {
    const char *what;
    int64_t value;
} refusal_t;

typedef struct {
    /* an argument each: n is a number >= 0, p an address (an int, a C-contiguous
     * array or None), s the same of an array with strides, f a float */
    const char *signature;
    refusal_t (*run)(const int64_t *args);
    int64_t (*work)(const int64_t *args); /* multiplications, about; NULL: few */
} call_t;

#define CALLS(X)                                                                                  \
    X(pack) X(pack_int8) X(pack_int4) X(quantise) X(quantise_int4) X(convert) X(unpack)            \
    X(gather) X(lookup) X(copy) X(linear)                                                         \
    X(layer_norm) X(rms_norm) X(add_rms_norm) X(rms_norm_within) X(rope) X(silu_mul) X(gelu_mul)  \
    X(clamped_mul) X(scale) X(turn_heads) X(take_rows) X(experts) X(attend) X(attend_rows) X(slide) \
    X(argmax) X(widen) X(narrow) X(ring_product)
#define DECLARE(NAME) extern const call_t call_##NAME;
CALLS(DECLARE)

refusal_t check_weight(int64_t kind, int64_t packed, int64_t num_in, int64_t num_out);

/* program.c */
PyObject *refuse(refusal_t refusal); /* raises ValueError */
/* Makes the call, or adds it to the program that this thread records. */
PyObject *make_call(const call_t *call, PyObject *const *args, Py_ssize_t given);
/* The same for a callable without arguments. */
PyObject *make_python_call(PyObject *callable);
extern PyTypeObject program_type;

#endif
