/* Sending: one record from its plaintext to the socket. Described in transport/_native.pyi. */
#include "records.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

typedef struct {
    PyObject_HEAD
    wire_tally_t *wire;
    cipher_t cipher;
    char *record; /* many channels never send one: made for the first */
    Py_ssize_t room, num_bytes; /* of the plaintext that header and sealed are for */
    PyObject *header, *sealed, *nothing;
} outlet_t;

/* Where a record of so many bytes goes; 0 with an exception. */
static int lay_out(outlet_t *outlet, Py_ssize_t num_bytes) {
    if (outlet->num_bytes == num_bytes) return 1;
    if (!outlet->record) outlet->record = PyMem_Malloc((size_t)outlet->room);
    if (!outlet->record) {
        PyErr_NoMemory();
        return 0;
    }
    Py_ssize_t sealed_bytes = num_bytes + TAG_BYTES;
    unsigned char header[HEADER_BYTES] = {FRAME};
    for (int i = 0; i < 4; i++) header[4 + i] = (unsigned char)(sealed_bytes >> (24 - 8 * i));
    memcpy(outlet->record, header, HEADER_BYTES);
    outlet->num_bytes = 0;
    Py_XSETREF(outlet->header, PyBytes_FromStringAndSize((char *)header, HEADER_BYTES));
    Py_XSETREF(outlet->sealed, PyMemoryView_FromMemory(outlet->record + HEADER_BYTES, sealed_bytes,
                                                       PyBUF_WRITE));
    if (!outlet->header || !outlet->sealed) return 0;
    outlet->num_bytes = num_bytes;
    return 1;
}

/* Seals the record: 1, 0 if the ordinary way has to, -1 with an exception. */
static int seal(outlet_t *outlet, PyObject *plain) {
    Py_ssize_t num_bytes = PyObject_Size(plain);
    if (num_bytes < 0) return -1;
    if (num_bytes == 0 || num_bytes > outlet->room - HEADER_BYTES - TAG_BYTES) return 0;
    if (!may_go_on(&outlet->cipher, num_bytes)) return 0;
    PyObject *nonce = lay_out(outlet, num_bytes) ? nonce_bytes(outlet->cipher.state->nonce) : NULL;
    int is_sealed = nonce && apply(&outlet->cipher, nonce, plain, outlet->header, outlet->sealed,
                                   num_bytes);
    Py_XDECREF(nonce);
    return is_sealed ? 1 : -1;
}

/* What is still to be sent of the last record: seldom anything. */
static PyObject *rest_of(const outlet_t *outlet, Py_ssize_t sent) {
    Py_ssize_t unsent = HEADER_BYTES + outlet->num_bytes + TAG_BYTES - sent;
    if (!unsent) return Py_NewRef(outlet->nothing);
    PyObject *bytes = PyBytes_FromStringAndSize(outlet->record + sent, unsent);
    PyObject *rest = bytes ? PyMemoryView_FromObject(bytes) : NULL;
    Py_XDECREF(bytes);
    return rest;
}

static PyObject *outlet_send(PyObject *self, PyObject *plain) {
    outlet_t *outlet = (outlet_t *)self;
    wire_tally_t *wire = outlet->wire;
    int is_sealed = wire->fd < 0 ? 0 : seal(outlet, plain);
    if (is_sealed != 1) return is_sealed == 0 ? Py_NewRef(Py_None) : NULL;
    int64_t started = now_ns();
    ssize_t sent = send((int)wire->fd, outlet->record,
                        (size_t)(HEADER_BYTES + outlet->num_bytes + TAG_BYTES),
                        MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            return PyErr_SetFromErrno(PyExc_OSError);
        }
        sent = 0;
    }
    wire->send_ns += now_ns() - started;
    wire->bytes_sent += sent;
    return rest_of(outlet, sent);
}

static void outlet_dealloc(PyObject *self) {
    outlet_t *outlet = (outlet_t *)self;
    cipher_clear(&outlet->cipher);
    Py_XDECREF(outlet->wire);
    Py_XDECREF(outlet->header);
    Py_XDECREF(outlet->sealed);
    Py_XDECREF(outlet->nothing);
    PyMem_Free(outlet->record);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *outlet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *wire, *sealer;
    Py_ssize_t room;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "O!O!n", &wire_tally_type, &wire, &half_tally_type, &sealer,
                          &room)) {
        return NULL;
    }
    outlet_t *outlet = (outlet_t *)type->tp_alloc(type, 0);
    if (!outlet) return NULL;
    outlet->wire = (wire_tally_t *)Py_NewRef(wire);
    outlet->room = room;
    outlet->nothing = PyMemoryView_FromMemory("", 0, PyBUF_READ);
    if (!outlet->nothing || !cipher_init(&outlet->cipher, (half_tally_t *)sealer, "encrypt_into")) {
        Py_CLEAR(outlet);
    }
    return (PyObject *)outlet;
}

static PyMethodDef outlet_methods[] = {{"send", outlet_send, METH_O, NULL}, {0}};

PyTypeObject outlet_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "transport._native.Outlet",
    .tp_basicsize = sizeof(outlet_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = outlet_new,
    .tp_dealloc = outlet_dealloc,
    .tp_methods = outlet_methods,
};
