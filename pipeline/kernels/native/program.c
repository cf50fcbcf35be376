/* Calls from Python, one by one or as a program: recorded once, then made with a single call.
 *
 * A program is the arguments of its calls, as they were when it was recorded. Between two runs only
 * the memory behind its addresses changes, so every run checks again what is read from there. It
 * keeps the arrays it was given. A decode step is one that is connected: its rows come in as bytes,
 * go to the slots of a batch, and leave as bytes.
 */
#include "calls.h"

#include <string.h>
#include <time.h>

#if defined(VEILPIPE_X86)

#define WORTH_RELEASING (1 << 23) /* multiplications after which other threads should get a turn */

typedef struct {
    const call_t *call;
    int64_t args[MAX_ARGS];
} entry_t;

typedef struct {
    PyObject_HEAD
    entry_t *entries;
    size_t num_entries, room;
    PyObject *kept; /* a list */
    /* of a decode step: a span for each row, and what goes in and out */
    span_t *spans;
    char *inputs, *outputs;
    int64_t num_rows, input_bytes, output_bytes;
} program_t;

static _Thread_local program_t *recording;

PyObject *refuse(refusal_t refusal) {
    return PyErr_Format(PyExc_ValueError, "%s: %lld", refusal.what, (long long)refusal.value);
}

/* An int as it is, None as 0, an array as its address; -1 with an exception. */
static int64_t address_of(PyObject *arg, int flags) {
    if (PyLong_CheckExact(arg)) return PyLong_AsLongLong(arg);
    if (arg == Py_None) return 0;
    Py_buffer view;
    if (PyObject_GetBuffer(arg, &view, flags)) return -1;
    int64_t address = (int64_t)(uintptr_t)view.buf;
    PyBuffer_Release(&view); /* whoever called holds the array */
    return address;
}

static int is_address(char kind) { return kind == 'p' || kind == 's'; }

/* Sets an exception and returns 0 for what the call does not take. */
static int read_args(const call_t *call, PyObject *const *args, Py_ssize_t given, int64_t *into) {
    Py_ssize_t expected = (Py_ssize_t)strlen(call->signature);
    if (!has_avx512()) {
        PyErr_SetString(PyExc_ValueError, "this CPU lacks what features() would name");
        return 0;
    }
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, not %zd", expected, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < expected; i++) {
        if (call->signature[i] == 'f') {
            double value = PyFloat_AsDouble(args[i]);
            memcpy(into + i, &value, sizeof value);
            if (PyErr_Occurred()) return 0;
            continue;
        }
        char kind = call->signature[i];
        int flags = kind == 's' ? PyBUF_STRIDES : PyBUF_SIMPLE; /* the latter refuses gaps */
        into[i] = is_address(kind) ? address_of(args[i], flags) : PyLong_AsLongLong(args[i]);
        if (into[i] >= 0) continue;
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "argument %zd is negative: %lld", i + 1, into[i]);
        }
        return 0;
    }
    return 1;
}

/* Keeps the arrays among the arguments of a call. Returns 0 with an exception. */
static int keep(program_t *program, const char *signature, PyObject *const *args) {
    for (size_t i = 0; signature[i]; i++) {
        int is_array = is_address(signature[i]) && !PyLong_CheckExact(args[i]) && args[i] != Py_None;
        if (is_array && PyList_Append(program->kept, args[i])) return 0;
    }
    return 1;
}

static PyObject *record(program_t *program, const entry_t *entry, PyObject *const *args) {
    if (program->num_entries == program->room) {
        size_t room = program->room ? 2 * program->room : 64;
        entry_t *entries = PyMem_Realloc(program->entries, room * sizeof *entries);
        if (!entries) return PyErr_NoMemory();
        program->entries = entries;
        program->room = room;
    }
    if (!keep(program, entry->call->signature, args)) return NULL;
    program->entries[program->num_entries++] = *entry;
    Py_RETURN_NONE;
}

PyObject *make_call(const call_t *call, PyObject *const *args, Py_ssize_t given) {
    entry_t entry = {.call = call};
    if (!read_args(call, args, given, entry.args)) return NULL;
    if (recording) return record(recording, &entry, args);
    int is_long = call->work && call->work(entry.args) > WORTH_RELEASING;
    PyThreadState *released = is_long ? PyEval_SaveThread() : NULL;
    refusal_t refusal = call->run(entry.args);
    if (released) PyEval_RestoreThread(released);
    if (refusal.what) return refuse(refusal);
    Py_RETURN_NONE;
}

static PyObject *program_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    if (PyTuple_GET_SIZE(args) || (kwargs && PyDict_GET_SIZE(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "a program starts empty: no arguments");
        return NULL;
    }
    program_t *program = (program_t *)type->tp_alloc(type, 0);
    if (program && !(program->kept = PyList_New(0))) Py_CLEAR(program);
    return (PyObject *)program;
}

static void program_dealloc(PyObject *self) {
    program_t *program = (program_t *)self;
    PyMem_Free(program->entries);
    Py_XDECREF(program->kept);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *program_enter(PyObject *self, PyObject *none) {
    (void)none;
    if (recording || ((program_t *)self)->num_entries) {
        PyErr_SetString(PyExc_RuntimeError, "a program is recorded once, and one at a time");
        return NULL;
    }
    recording = (program_t *)self; /* the with statement keeps it */
    return Py_NewRef(self);
}

static PyObject *program_exit(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self, (void)args, (void)given;
    recording = NULL;
    Py_RETURN_NONE;
}

static refusal_t make_calls(const program_t *program) {
    refusal_t refusal = {NULL, 0};
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < program->num_entries && !refusal.what; i++) {
        refusal = program->entries[i].call->run(program->entries[i].args);
    }
    Py_END_ALLOW_THREADS
    return refusal;
}

/* Returns 0 with an exception where calls are recorded now. */
static int may_run(void) {
    if (!recording) return 1;
    PyErr_SetString(PyExc_RuntimeError, "a program cannot run while one is recorded");
    return 0;
}

/* Makes all calls; returns 0 with an exception if one is refused. */
static int run(const program_t *program) {
    if (!may_run()) return 0;
    refusal_t refusal = make_calls(program);
    if (refusal.what) refuse(refusal);
    return !refusal.what;
}

static PyObject *program_run(PyObject *self, PyObject *none) {
    (void)none;
    if (!run((program_t *)self)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *program_connect(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    program_t *program = (program_t *)self;
    static const call_t connect = {"pnpnpn", NULL, NULL};
    int64_t a[MAX_ARGS];
    if (!read_args(&connect, args, given, a) || !keep(program, connect.signature, args)) return NULL;
    program->spans = (span_t *)(uintptr_t)a[0];
    program->num_rows = a[1];
    program->inputs = (char *)(uintptr_t)a[2];
    program->input_bytes = a[3];
    program->outputs = (char *)(uintptr_t)a[4];
    program->output_bytes = a[5];
    Py_RETURN_NONE;
}

/* An attribute that is an int; -1 with an exception. */
static int64_t int_of(PyObject *object, PyObject *name) {
    PyObject *attribute = PyObject_GetAttr(object, name);
    if (!attribute) return -1;
    int64_t value = PyLong_AsLongLong(attribute);
    Py_DECREF(attribute);
    return value;
}

/* Where each segment's row belongs. Returns 0 with an exception. */
static int place(const program_t *program, PyObject *batch) {
    static PyObject *slot, *position;
    if (!slot && !(slot = PyUnicode_InternFromString("slot"))) return 0;
    if (!position && !(position = PyUnicode_InternFromString("position"))) return 0;
    PyObject *segments = PySequence_Fast(batch, "a batch is a sequence of segments");
    if (!segments) return 0;
    int64_t count = PySequence_Fast_GET_SIZE(segments);
    if (count != program->num_rows) refuse((refusal_t){"segments", count});
    for (int64_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *segment = PySequence_Fast_GET_ITEM(segments, i);
        program->spans[i].slot = int_of(segment, slot);
        program->spans[i].start = int_of(segment, position);
    }
    Py_DECREF(segments);
    return !PyErr_Occurred();
}

static PyObject *program_step(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    program_t *program = (program_t *)self;
    if (given != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, not %zd", given);
    Py_buffer rows;
    if (PyObject_GetBuffer(args[1], &rows, PyBUF_SIMPLE)) return NULL;
    int is_fit = rows.len == program->input_bytes;
    if (is_fit) memcpy(program->inputs, rows.buf, (size_t)rows.len);
    PyBuffer_Release(&rows);
    if (!is_fit) return refuse((refusal_t){"bytes of rows", rows.len});
    if (!place(program, args[0]) || !run(program)) return NULL;
    return PyByteArray_FromStringAndSize(program->outputs, program->output_bytes);
}

/* A data frame of a decode step, as pipeline.protocol.messages has its header and transport.frames the rest:
 * what is fixed is compared with a form of the same size, or lies in it already. */
typedef struct {
    Py_buffer memory;
    Py_ssize_t header, rows; /* where they start */
} frame_t;

enum { FIXED_BYTES = 8, TIMINGS_AT = 4, SEGMENTS_AT = 16, SEGMENT_BYTES = 16, TIMING_BYTES = 24 };

static uint32_t u32_at(const char *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static Py_ssize_t header_bytes(const program_t *program, const frame_t *form) {
    uint16_t num_timings;
    memcpy(&num_timings, (char *)form->memory.buf + form->header + TIMINGS_AT, sizeof num_timings);
    return SEGMENTS_AT + SEGMENT_BYTES * program->num_rows + TIMING_BYTES * num_timings;
}

static int is_form(const program_t *program, const frame_t *form, int64_t num_row_bytes) {
    Py_ssize_t size = form->memory.len;
    return form->header >= 0 && form->header <= size - SEGMENTS_AT && form->rows <= size &&
           header_bytes(program, form) <= form->rows - form->header &&
           size - form->rows == num_row_bytes;
}

/* Whether a segment of one token may want this: nothing, or its only row as a token, as logits or as
 * it is. All else comes with a tensor of its own. */
static int is_want(uint32_t want) {
    return !want || (want >> 16 == 1 && (want & 0xffff) - 1 < 3);
}

/* Whether each segment is of one token that its slot has room for next, and wants what it may. The
 * ids that a want scores are counted above its slot, so that no slot is as high as both. */
static int read_segments(const program_t *program, const char *at, PyObject *lengths,
                         int64_t max_length, int64_t only_want) {
    for (int64_t i = 0; i < program->num_rows; i++, at += SEGMENT_BYTES) {
        uint32_t slot = u32_at(at), position = u32_at(at + 4), want = u32_at(at + 12);
        if (u32_at(at + 8) != 1 || slot >= PyList_GET_SIZE(lengths)) return 0;
        if (!is_want(want) || (only_want && want != only_want)) return 0;
        if (position >= max_length) return 0;
        if (PyLong_AsLongLong(PyList_GET_ITEM(lengths, slot)) != position) return 0;
        for (int64_t j = 0; j < i; j++) {
            if (program->spans[j].slot == slot) return 0;
        }
        program->spans[i].slot = slot;
        program->spans[i].start = position;
    }
    return 1;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Serves a frame; the nanoseconds computed, -1 for one that is not plainly such a step. */
static int64_t serve(program_t *program, const Py_buffer *frame, const frame_t *in,
                     const frame_t *out, PyObject *lengths, const int64_t *numbers) {
    const char *from = frame->buf, *form = in->memory.buf;
    Py_ssize_t size = header_bytes(program, in), end = in->header + size;
    if (frame->len != in->memory.len || memcmp(from, form, in->header + FIXED_BYTES) ||
        memcmp(from + end, form + end, in->rows - end) ||
        !read_segments(program, from + in->header + SEGMENTS_AT, lengths, numbers[0], numbers[1])) {
        return -1;
    }
    memcpy(program->inputs, from + in->rows, program->input_bytes);
    int64_t started = now_ns();
    if (make_calls(program).what) return -1;
    int64_t timing[] = {now_ns() - started, numbers[2], numbers[3]};
    char *header = (char *)out->memory.buf + out->header;
    memcpy(header + FIXED_BYTES, from + in->header + FIXED_BYTES, size - FIXED_BYTES);
    memcpy(header + size, timing, sizeof timing);
    memcpy((char *)out->memory.buf + out->rows, program->outputs, program->output_bytes);
    return timing[0];
}

static PyObject *program_serve(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    program_t *program = (program_t *)self;
    Py_buffer frame = {0};
    frame_t in = {0}, out = {0};
    int64_t numbers[4] = {0}, spent = -1;
    if (given != 12 || !PyList_CheckExact(args[6])) {
        return PyErr_Format(PyExc_TypeError, "expected two forms, lengths, two numbers, a frame, two numbers");
    }
    in.header = PyLong_AsSsize_t(args[1]), in.rows = PyLong_AsSsize_t(args[2]);
    out.header = PyLong_AsSsize_t(args[4]), out.rows = PyLong_AsSsize_t(args[5]);
    for (int i = 0; i < 4; i++) numbers[i] = PyLong_AsLongLong(args[i < 2 ? 7 + i : 8 + i]);
    if (may_run() && !PyErr_Occurred() && !PyObject_GetBuffer(args[9], &frame, PyBUF_SIMPLE) &&
        !PyObject_GetBuffer(args[0], &in.memory, PyBUF_SIMPLE) &&
        !PyObject_GetBuffer(args[3], &out.memory, PyBUF_WRITABLE)) {
        int fits = is_form(program, &in, program->input_bytes) &&
                   is_form(program, &out, program->output_bytes) &&
                   header_bytes(program, &out) == header_bytes(program, &in) + TIMING_BYTES;
        if (fits) spent = serve(program, &frame, &in, &out, args[6], numbers);
        else PyErr_SetString(PyExc_ValueError, "these are not the forms of this step's frames");
    }
    PyBuffer_Release(&frame);
    PyBuffer_Release(&in.memory);
    PyBuffer_Release(&out.memory);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(spent);
}

static PyMethodDef program_methods[] = {
    {"__enter__", program_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))program_exit, METH_FASTCALL, NULL},
    {"run", program_run, METH_NOARGS, NULL},
    {"connect", (PyCFunction)(void (*)(void))program_connect, METH_FASTCALL, NULL},
    {"serve", (PyCFunction)(void (*)(void))program_serve, METH_FASTCALL, NULL},
    {"step", (PyCFunction)(void (*)(void))program_step, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject program_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "pipeline.kernels._native.Program",
    .tp_basicsize = sizeof(program_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = program_new,
    .tp_dealloc = program_dealloc,
    .tp_methods = program_methods,
};

#endif
