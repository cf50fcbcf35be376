/* A decode step from frame to frame: what a data frame says is checked here, and nowhere else in C.
 *
 * A frame's header is as pipeline.protocol.messages has it, the rest as transport.tensor_frames
 * does: what is fixed is compared with a form of the same size, or lies in it already. Whatever is
 * not plainly such a step is left as it came.
 */
#include "program.h"

#include <string.h>
#include <time.h>

#if defined(VEILPIPE_SIMD)

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
 * ids that a want scores are counted above its slot, so that no slot is as high as both. Of a slot's
 * `lengths` tokens `num_rows` lie in memory, which without a window is the same list; all steps' may
 * lie below `reach`. */
static int read_segments(const program_t *program, const char *at, PyObject *lengths,
                         PyObject *num_rows, PyObject *reach, int64_t only_want) {
    int64_t max_rows = PyList_GET_SIZE(reach) == 1 ? PyLong_AsLongLong(PyList_GET_ITEM(reach, 0)) : 0;
    for (int64_t i = 0; i < program->num_rows; i++, at += SEGMENT_BYTES) {
        uint32_t slot = u32_at(at), position = u32_at(at + 4), want = u32_at(at + 12);
        if (u32_at(at + 8) != 1 || slot >= PyList_GET_SIZE(lengths)) return 0;
        if (!is_want(want) || (only_want && want != only_want)) return 0;
        if (PyLong_AsLongLong(PyList_GET_ITEM(lengths, slot)) != position) return 0;
        int64_t row = PyLong_AsLongLong(PyList_GET_ITEM(num_rows, slot));
        if (row < 0 || row >= max_rows) return 0;
        for (int64_t j = 0; j < i; j++) {
            if (program->spans[j].slot == slot) return 0;
        }
        program->spans[i].slot = slot;
        program->spans[i].start = row;
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
                     const frame_t *out, PyObject *const *lists, const int64_t *numbers) {
    const char *from = frame->buf, *form = in->memory.buf;
    Py_ssize_t size = header_bytes(program, in), end = in->header + size;
    if (frame->len != in->memory.len || memcmp(from, form, in->header + FIXED_BYTES) ||
        memcmp(from + end, form + end, in->rows - end) ||
        !read_segments(program, from + in->header + SEGMENTS_AT, lists[0], lists[1], lists[2],
                       numbers[0])) {
        return -1;
    }
    memcpy(program->inputs, from + in->rows, program->input_bytes);
    int64_t started = now_ns();
    if (make_calls(program).what) return -1;
    int64_t timing[] = {now_ns() - started, numbers[1], numbers[2]};
    char *header = (char *)out->memory.buf + out->header;
    memcpy(header + FIXED_BYTES, from + in->header + FIXED_BYTES, size - FIXED_BYTES);
    memcpy(header + size, timing, sizeof timing);
    memcpy((char *)out->memory.buf + out->rows, program->outputs, program->output_bytes);
    return timing[0];
}

PyObject *program_serve(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    program_t *program = (program_t *)self;
    Py_buffer frame = {0};
    frame_t in = {0}, out = {0};
    int64_t numbers[3] = {0}, spent = -1;
    if (given != 13 || !PyList_CheckExact(args[6]) || !PyList_CheckExact(args[7]) ||
        !PyList_CheckExact(args[8]) || PyList_GET_SIZE(args[6]) != PyList_GET_SIZE(args[7])) {
        return PyErr_Format(PyExc_TypeError, "expected two forms, two lists of lengths, a list of one, "
                                             "a number, a frame, two numbers");
    }
    in.header = PyLong_AsSsize_t(args[1]), in.rows = PyLong_AsSsize_t(args[2]);
    out.header = PyLong_AsSsize_t(args[4]), out.rows = PyLong_AsSsize_t(args[5]);
    for (int i = 0; i < 3; i++) numbers[i] = PyLong_AsLongLong(args[i < 1 ? 9 : 10 + i]);
    if (may_run() && !PyErr_Occurred() && !PyObject_GetBuffer(args[10], &frame, PyBUF_SIMPLE) &&
        !PyObject_GetBuffer(args[0], &in.memory, PyBUF_SIMPLE) &&
        !PyObject_GetBuffer(args[3], &out.memory, PyBUF_WRITABLE)) {
        int fits = is_form(program, &in, program->input_bytes) &&
                   is_form(program, &out, program->output_bytes) &&
                   header_bytes(program, &out) == header_bytes(program, &in) + TIMING_BYTES;
        if (fits) spent = serve(program, &frame, &in, &out, args + 6, numbers);
        else PyErr_SetString(PyExc_ValueError, "these are not the forms of this step's frames");
    }
    PyBuffer_Release(&frame);
    PyBuffer_Release(&in.memory);
    PyBuffer_Release(&out.memory);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(spent);
}

#endif
