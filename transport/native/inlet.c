/* Receiving: one record from the socket to its plaintext. Described in transport/_native.pyi. */
#include "records.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

enum { LAST_SEALED_BYTES = 1, LAST_RAW = 3 }; /* of a RecordHeader */

typedef struct {
    PyObject_HEAD
    wire_tally_t *wire;
    reader_tally_t *reader;
    plain_tally_t *buffer;
    cipher_t cipher;
    PyObject *storage, *plain; /* the buffer's when last seen, and the part of it that is returned */
} inlet_t;

/* Where bytes go, and the record expected there: like the one before it, or none. */
typedef struct {
    Py_buffer store;
    Py_ssize_t received, num_bytes; /* in the store, of the plaintext expected */
    PyObject *header, *nonce, *sealed;
    char raw[HEADER_BYTES];
} arrival_t;

static void arrival_clear(arrival_t *arrival) {
    Py_CLEAR(arrival->header);
    Py_CLEAR(arrival->nonce);
    Py_CLEAR(arrival->sealed);
    PyBuffer_Release(&arrival->store);
}

/* The part of the buffer's storage for so many bytes; 0 with an exception or where it is less. */
static int make_room(inlet_t *inlet, Py_ssize_t num_bytes) {
    PyObject *storage = inlet->buffer->storage;
    if (!storage || !PyMemoryView_Check(storage)) return 0;
    if (storage != inlet->storage || !inlet->plain ||
        PyMemoryView_GET_BUFFER(inlet->plain)->len != num_bytes) {
        Py_XSETREF(inlet->plain, PySequence_GetSlice(storage, 0, num_bytes));
        Py_XSETREF(inlet->storage, Py_NewRef(storage));
    }
    return inlet->plain && PyMemoryView_Check(inlet->plain) &&
           PyMemoryView_GET_BUFFER(inlet->plain)->len == num_bytes;
}

/* Makes ready for a record like the last one; without a header afterwards none is expected.
 * Returns 0 with an exception. */
static int expect(inlet_t *inlet, arrival_t *arrival) {
    PyObject *last = inlet->reader->last;
    if (inlet->cipher.half->cipher != (PyObject *)inlet->cipher.state ||
        !PyTuple_Check(last) || PyTuple_GET_SIZE(last) <= LAST_RAW) {
        return 1;
    }
    PyObject *header = PyTuple_GET_ITEM(last, LAST_RAW);
    arrival->num_bytes = PyLong_AsSsize_t(PyTuple_GET_ITEM(last, LAST_SEALED_BYTES)) - TAG_BYTES;
    if (PyErr_Occurred()) return 0;
    if (!PyByteArray_Check(header) || PyByteArray_GET_SIZE(header) != HEADER_BYTES) return 1;
    memcpy(arrival->raw, PyByteArray_AS_STRING(header), HEADER_BYTES);
    if (arrival->raw[0] != FRAME || arrival->num_bytes < 1 ||
        arrival->num_bytes + HEADER_BYTES + TAG_BYTES > arrival->store.len ||
        !may_go_on(&inlet->cipher, arrival->num_bytes) ||
        !make_room(inlet, arrival->num_bytes)) {
        return !PyErr_Occurred();
    }
    arrival->nonce = nonce_bytes(inlet->cipher.state->nonce);
    arrival->sealed = PyMemoryView_FromMemory((char *)arrival->store.buf + HEADER_BYTES,
                                              arrival->num_bytes + TAG_BYTES, PyBUF_READ);
    if (arrival->nonce && arrival->sealed) arrival->header = Py_NewRef(header);
    return arrival->header != NULL;
}

/* All that can be done before anything has come. 1, 0 if the reader is in the middle of a record,
 * -1 with an exception. */
static int get_ready(inlet_t *inlet, arrival_t *arrival) {
    const reader_tally_t *reader = inlet->reader;
    int is_empty = reader->header == Py_None && reader->start == reader->end;
    if (!is_empty || !reader->store || !reader->last) return 0;
    if (PyObject_GetBuffer(reader->store, &arrival->store, PyBUF_WRITABLE)) return -1;
    return expect(inlet, arrival) ? 1 : -1;
}

/* Waits, then takes what there is; 0 with an exception, EOFError at the end. */
static int take(const inlet_t *inlet, arrival_t *arrival, int patience_ms) {
    int fd = (int)inlet->wire->fd, error = EAGAIN;
    struct pollfd waiting = {fd, POLLIN, 0};
    Py_ssize_t received = -1;
    int64_t spent = 0;
    Py_BEGIN_ALLOW_THREADS
    if (poll(&waiting, 1, patience_ms) > 0) {
        spent = now_ns();
        received = recv(fd, arrival->store.buf, (size_t)arrival->store.len, MSG_DONTWAIT);
        error = errno;
        spent = now_ns() - spent;
    }
    Py_END_ALLOW_THREADS
    inlet->wire->recv_ns += spent;
    if (received > 0) {
        inlet->wire->bytes_received += arrival->received = received;
    } else if (received == 0) {
        PyErr_SetNone(PyExc_EOFError);
    } else if (error != EAGAIN && error != EWOULDBLOCK && error != EINTR) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return !PyErr_Occurred();
}

/* Opens what has come if it is the record expected and all of it: 1, 0 if the ordinary way has to
 * look, -1 with an exception. */
static int open_record(inlet_t *inlet, arrival_t *arrival) {
    if (!arrival->header || memcmp(arrival->store.buf, arrival->raw, HEADER_BYTES) ||
        arrival->received != HEADER_BYTES + arrival->num_bytes + TAG_BYTES) {
        return 0;
    }
    if (apply(&inlet->cipher, arrival->nonce, arrival->sealed, arrival->header, inlet->plain,
              arrival->num_bytes)) {
        return 1;
    }
    /* Forged: nobody may read what it decrypts to. It is opened once more, and refused there. */
    Py_buffer *forged = PyMemoryView_GET_BUFFER(inlet->plain);
    memset(forged->buf, 0, (size_t)forged->len);
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return 0;
}

/* Tells the reader of bytes that it has to make sense of; 0 with an exception. */
static int leave(const inlet_t *inlet, Py_ssize_t received) {
    PyObject *told = PyObject_CallMethod((PyObject *)inlet->reader, "took", "n", received);
    Py_XDECREF(told);
    return told != NULL;
}

static PyObject *inlet_receive(PyObject *self, PyObject *patience) {
    inlet_t *inlet = (inlet_t *)self;
    arrival_t arrival = {0};
    long patience_ms = PyLong_AsLong(patience);
    if (PyErr_Occurred()) return NULL;
    if (inlet->wire->fd < 0) Py_RETURN_NONE; /* closed: its number may be another's by now */
    int is_ready = get_ready(inlet, &arrival), is_open = is_ready;
    if (is_ready == 1) {
        is_open = take(inlet, &arrival, (int)patience_ms) ? open_record(inlet, &arrival) : -1;
        if (is_open == 0 && arrival.received && !leave(inlet, arrival.received)) is_open = -1;
    }
    arrival_clear(&arrival);
    if (is_open == -1) return NULL;
    return Py_NewRef(is_open ? inlet->plain : Py_None);
}

static void inlet_dealloc(PyObject *self) {
    inlet_t *inlet = (inlet_t *)self;
    cipher_clear(&inlet->cipher);
    Py_XDECREF(inlet->wire);
    Py_XDECREF(inlet->reader);
    Py_XDECREF(inlet->buffer);
    Py_XDECREF(inlet->storage);
    Py_XDECREF(inlet->plain);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *inlet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *wire, *reader, *opener, *buffer;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "O!O!O!O!", &wire_tally_type, &wire, &reader_tally_type, &reader,
                          &half_tally_type, &opener, &plain_tally_type, &buffer)) {
        return NULL;
    }
    inlet_t *inlet = (inlet_t *)type->tp_alloc(type, 0);
    if (!inlet) return NULL;
    inlet->wire = (wire_tally_t *)Py_NewRef(wire);
    inlet->reader = (reader_tally_t *)Py_NewRef(reader);
    inlet->buffer = (plain_tally_t *)Py_NewRef(buffer);
    if (!cipher_init(&inlet->cipher, (half_tally_t *)opener, "decrypt_into")) Py_CLEAR(inlet);
    return (PyObject *)inlet;
}

static PyMethodDef inlet_methods[] = {{"receive", inlet_receive, METH_O, NULL}, {0}};

PyTypeObject inlet_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "transport._native.Inlet",
    .tp_basicsize = sizeof(inlet_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = inlet_new,
    .tp_dealloc = inlet_dealloc,
    .tp_methods = inlet_methods,
};
