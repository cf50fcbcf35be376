/* Calls from Python, one by one or as a program: recorded once, then made with a single call.
 *
 * A program is the arguments of its calls, as they were when it was recorded. Between two runs only
 * the memory behind its addresses changes, so every run checks again what is read from there. It
 * keeps the arrays it was given. Among its calls may be some of Python's. A decode step is one that is connected: its rows come in as bytes,
 * go to the slots of a batch, and leave as bytes.
 */
#include "program.h"

#include <string.h>

#if defined(VEILPIPE_SIMD)

#define WORTH_RELEASING (1 << 23) /* multiplications after which other threads should get a turn */

static _Thread_local program_t *recording;

#define RAISED ((refusal_t){"an exception", 0})

PyObject *refuse(refusal_t refusal) {
    if (PyErr_Occurred()) return NULL; /* whoever was called has said why */
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
    if (!current_level()) {
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

/* Returns 0 with an exception. */
static int append(program_t *program, const entry_t *entry) {
    if (program->num_entries == program->room) {
        size_t room = program->room ? 2 * program->room : 64;
        entry_t *entries = PyMem_Realloc(program->entries, room * sizeof *entries);
        if (!entries) {
            PyErr_NoMemory();
            return 0;
        }
        program->entries = entries;
        program->room = room;
    }
    program->entries[program->num_entries++] = *entry;
    return 1;
}

static PyObject *record(program_t *program, const entry_t *entry, PyObject *const *args) {
    if (!keep(program, entry->call->signature, args) || !append(program, entry)) return NULL;
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

PyObject *make_python_call(PyObject *callable) {
    if (!recording) return PyObject_CallNoArgs(callable);
    entry_t entry = {.args = {(int64_t)(uintptr_t)callable}};
    if (PyList_Append(recording->kept, callable) || !append(recording, &entry)) return NULL;
    Py_RETURN_NONE;
}

static refusal_t run_entry(const entry_t *entry) {
    if (entry->call) return entry->call->run(entry->args);
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *result = PyObject_CallNoArgs((PyObject *)(uintptr_t)entry->args[0]);
    Py_XDECREF(result);
    PyGILState_Release(state);
    return result ? (refusal_t){NULL, 0} : RAISED;
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

refusal_t make_calls(const program_t *program) {
    refusal_t refusal = {NULL, 0};
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < program->num_entries && !refusal.what; i++) {
        refusal = run_entry(program->entries + i);
    }
    Py_END_ALLOW_THREADS
    return refusal;
}

int may_run(void) {
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
