/* A program of calls, for the files that run one. */
#ifndef VEILPIPE_PROGRAM_H
#define VEILPIPE_PROGRAM_H

#include "calls.h"

#if defined(VEILPIPE_SIMD)

typedef struct {
    const call_t *call; /* NULL for the callable at args[0], which is kept */
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

/* program.c */
int may_run(void); /* returns 0 with an exception where calls are recorded now */
refusal_t make_calls(const program_t *program); /* all, other Python threads running meanwhile; a
                                                 * callable may leave an exception and its refusal */

/* frame_step.c */
PyObject *program_serve(PyObject *self, PyObject *const *args, Py_ssize_t given);

#endif
#endif
