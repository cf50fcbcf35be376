/* One record at a time, from the socket to its plaintext and from a plaintext to the socket.
 *
 * Between two tokens a model's weights pass through the processor's caches, so that each Python
 * call on a record's way costs microseconds, and there are dozens. Here there is one for each
 * record. Keys, counters and what has been received stay where they are, in the objects of
 * transport.records, and the cipher is the one they hold: these are their hands, not a second
 * record layer. Whatever is not plainly the record expected next is left to them as it came, for
 * them to decide what it is.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { HEADER_BYTES = 8, TAG_BYTES = 16, FRAME = 2 };
enum { LAST_SEALED_BYTES = 1, LAST_RAW = 3 }; /* of a RecordHeader */

static struct {
    PyObject *fd, *bytes_sent, *bytes_received, *send_ns, *recv_ns;
    PyObject *_start, *_end, *_header, *_last, *_store, *storage;
    PyObject *_cipher, *_use, *_pack_nonce, *nonce, *num_records, *num_bytes, *decrypt_ns, *encrypt_ns;
    PyObject *_policy, *max_records, *max_bytes, *decrypt_into, *encrypt_into;
} names;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* An attribute that is an int; -1 with an exception. */
static int64_t number(PyObject *object, PyObject *name) {
    PyObject *attribute = PyObject_GetAttr(object, name);
    if (!attribute) return -1;
    int64_t value = PyLong_AsLongLong(attribute);
    Py_DECREF(attribute);
    return value;
}

/* Adds to an attribute that is an int; 0 with an exception. */
static int add(PyObject *object, PyObject *name, int64_t more) {
    int64_t value = number(object, name);
    if (value == -1 && PyErr_Occurred()) return 0;
    PyObject *sum = PyLong_FromLongLong(value + more);
    int is_set = sum && !PyObject_SetAttr(object, name, sum);
    Py_XDECREF(sum);
    return is_set;
}

/* What seals or opens records now. Its key is never seen here. */
typedef struct {
    PyObject *state, *use; /* a CipherState, a _KeyUse */
    int64_t nonce;
} cipher_t;

static void forget(cipher_t *cipher) {
    Py_CLEAR(cipher->state);
    Py_CLEAR(cipher->use);
}

/* Whether a record of so many bytes may be next under this key; -1 with an exception. */
static int may_go_on(cipher_t *cipher, PyObject *owner, int64_t num_bytes) {
    cipher->state = PyObject_GetAttr(owner, names._cipher);
    cipher->use = PyObject_GetAttr(owner, names._use);
    if (!cipher->state || !cipher->use) return -1;
    if (cipher->state == Py_None) return 0; /* this direction has failed */
    PyObject *policy = PyObject_GetAttr(cipher->use, names._policy);
    if (!policy) return -1;
    int64_t records = number(cipher->use, names.num_records);
    int64_t bytes = number(cipher->use, names.num_bytes);
    int64_t max_records = number(policy, names.max_records);
    int64_t max_bytes = number(policy, names.max_bytes);
    cipher->nonce = number(cipher->state, names.nonce); /* from 2**63 on it is not one for here */
    Py_DECREF(policy);
    if (PyErr_Occurred()) return -1;
    return records < max_records && bytes + num_bytes <= max_bytes;
}

/* Seals or opens; 0 with an exception, and nothing counted. */
static int apply(const cipher_t *cipher, PyObject *method, PyObject *from, PyObject *header,
                 PyObject *into) {
    PyObject *pack = PyObject_GetAttr(cipher->state, names._pack_nonce);
    PyObject *aead = PyObject_GetAttr(cipher->state, names._cipher);
    PyObject *number_used = PyLong_FromLongLong(cipher->nonce), *nonce = NULL, *result = NULL;
    if (pack && aead && number_used) nonce = PyObject_CallOneArg(pack, number_used);
    if (nonce) {
        PyObject *args[] = {aead, nonce, from, header, into};
        result = PyObject_VectorcallMethod(method, args, 5, NULL);
    }
    Py_XDECREF(pack);
    Py_XDECREF(aead);
    Py_XDECREF(number_used);
    Py_XDECREF(nonce);
    Py_XDECREF(result);
    return result != NULL;
}

static int count(const cipher_t *cipher, int64_t num_bytes) {
    return add(cipher->state, names.nonce, 1) && add(cipher->use, names.num_records, 1) &&
           add(cipher->use, names.num_bytes, num_bytes);
}

static int is_object(PyObject *object, PyObject *name, PyObject *expected) {
    PyObject *attribute = PyObject_GetAttr(object, name);
    Py_XDECREF(attribute); /* compared only; the owner keeps it */
    return attribute == NULL ? -1 : attribute == expected;
}

/* ---- receiving ---- */

typedef struct {
    PyObject_HEAD
    PyObject *wire, *reader, *opener, *arena;
    PyObject *storage, *plain; /* the arena's when last seen, and the part of it that is returned */
} inlet_t;

/* What has been received, and the record expected: like the one before it. */
typedef struct {
    Py_buffer store;
    Py_ssize_t received, num_bytes; /* in the store, of its plaintext */
    PyObject *header; /* its bytes; as yet there may have been none */
    int64_t spent;
} arrival_t;

/* Waits, then takes what there is; 0 with an exception, EOFError at the end. */
static int take(arrival_t *arrival, int fd, int patience_ms) {
    struct pollfd waiting = {fd, POLLIN, 0};
    Py_ssize_t received = -1;
    int error = EAGAIN;
    Py_BEGIN_ALLOW_THREADS
    if (poll(&waiting, 1, patience_ms) > 0) {
        int64_t started = now_ns();
        received = recv(fd, arrival->store.buf, (size_t)arrival->store.len, MSG_DONTWAIT);
        error = errno;
        arrival->spent = now_ns() - started;
    }
    Py_END_ALLOW_THREADS
    if (received < 0 && error != EAGAIN && error != EWOULDBLOCK && error != EINTR) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        return 0;
    }
    if (received == 0) PyErr_SetNone(PyExc_EOFError);
    arrival->received = received > 0 ? received : 0;
    return received != 0;
}

/* The part of the arena's storage for so many bytes; borrowed, NULL with an exception. */
static PyObject *plain_of(inlet_t *inlet, Py_ssize_t num_bytes) {
    PyObject *storage = PyObject_GetAttr(inlet->arena, names.storage);
    if (!storage) return NULL;
    if (storage != inlet->storage || !inlet->plain ||
        PyMemoryView_GET_BUFFER(inlet->plain)->len != num_bytes) {
        Py_CLEAR(inlet->plain);
        PyObject *plain = PySequence_GetSlice(storage, 0, num_bytes);
        if (plain && PyMemoryView_Check(plain)) inlet->plain = plain;
        Py_XSETREF(inlet->storage, Py_NewRef(storage));
    }
    Py_DECREF(storage);
    return inlet->plain;
}

/* Whether the record expected is all that has come. */
static int is_expected(const arrival_t *arrival) {
    PyObject *header = arrival->header;
    if (!PyByteArray_Check(header) || PyByteArray_GET_SIZE(header) != HEADER_BYTES) return 0;
    const char *raw = PyByteArray_AS_STRING(header);
    return raw[0] == FRAME && arrival->received == HEADER_BYTES + arrival->num_bytes + TAG_BYTES &&
           !memcmp(arrival->store.buf, raw, HEADER_BYTES);
}

/* Opens it: its plaintext, None if the ordinary way has to look, NULL with an exception. */
static PyObject *open_record(inlet_t *inlet, arrival_t *arrival) {
    cipher_t cipher = {0};
    PyObject *opened = NULL, *sealed = NULL, *plain = NULL;
    int is_due = may_go_on(&cipher, inlet->opener, arrival->num_bytes);
    if (is_due == 0) opened = Py_None;
    if (is_due == 1 && (plain = plain_of(inlet, arrival->num_bytes))) {
        sealed = PyMemoryView_FromMemory((char *)arrival->store.buf + HEADER_BYTES,
                                         arrival->num_bytes + TAG_BYTES, PyBUF_READ);
    }
    if (sealed) {
        int64_t started = now_ns();
        if (apply(&cipher, names.decrypt_into, sealed, arrival->header, plain)) {
            int is_counted = count(&cipher, arrival->num_bytes) &&
                             add(inlet->opener, names.decrypt_ns, now_ns() - started);
            if (is_counted) opened = plain;
        } else if (PyErr_ExceptionMatches(PyExc_Exception)) {
            /* Forged: nobody may read what it decrypts to. It is opened once more, and refused. */
            Py_buffer *forged = PyMemoryView_GET_BUFFER(plain);
            memset(forged->buf, 0, (size_t)forged->len);
            PyErr_Clear();
            opened = Py_None;
        }
        Py_DECREF(sealed);
    }
    forget(&cipher);
    return Py_XNewRef(opened);
}

/* Whether a next record may be received here, and which is expected; -1 with an exception. */
static int expect(inlet_t *inlet, arrival_t *arrival) {
    int is_ready = number(inlet->reader, names._start) == number(inlet->reader, names._end) &&
                   is_object(inlet->reader, names._header, Py_None) == 1;
    if (PyErr_Occurred()) return -1;
    if (!is_ready) return 0;
    PyObject *last = PyObject_GetAttr(inlet->reader, names._last);
    PyObject *store = last ? PyObject_GetAttr(inlet->reader, names._store) : NULL;
    if (store && PyTuple_Check(last) && PyTuple_GET_SIZE(last) > LAST_RAW &&
        !PyObject_GetBuffer(store, &arrival->store, PyBUF_WRITABLE)) {
        arrival->header = Py_NewRef(PyTuple_GET_ITEM(last, LAST_RAW));
        arrival->num_bytes = PyLong_AsSsize_t(PyTuple_GET_ITEM(last, LAST_SEALED_BYTES)) - TAG_BYTES;
    }
    Py_XDECREF(last);
    Py_XDECREF(store);
    if (PyErr_Occurred()) return -1;
    return 1;
}

/* Tells the reader of bytes that it has to make sense of. */
static int leave(inlet_t *inlet, Py_ssize_t received) {
    PyObject *none = PyLong_FromLong(0), *end = PyLong_FromSsize_t(received);
    int is_left = none && end && !PyObject_SetAttr(inlet->reader, names._start, none) &&
                  !PyObject_SetAttr(inlet->reader, names._end, end);
    Py_XDECREF(none);
    Py_XDECREF(end);
    return is_left;
}

static PyObject *inlet_receive(PyObject *self, PyObject *patience) {
    inlet_t *inlet = (inlet_t *)self;
    arrival_t arrival = {0};
    PyObject *plain = NULL;
    int64_t patience_ms = PyLong_AsLongLong(patience);
    int64_t fd = PyErr_Occurred() ? -1 : number(inlet->wire, names.fd);
    if (PyErr_Occurred()) return NULL;
    int is_due = fd < 0 ? 0 : expect(inlet, &arrival); /* closed: its number may be another's now */
    if (is_due == 0) plain = Py_NewRef(Py_None);
    if (is_due == 1 && take(&arrival, (int)fd, (int)patience_ms) &&
        add(inlet->wire, names.bytes_received, arrival.received) &&
        add(inlet->wire, names.recv_ns, arrival.spent)) {
        plain = is_expected(&arrival) ? open_record(inlet, &arrival) : Py_NewRef(Py_None);
        if (plain == Py_None && arrival.received && !leave(inlet, arrival.received)) {
            Py_CLEAR(plain);
        }
    }
    Py_XDECREF(arrival.header);
    PyBuffer_Release(&arrival.store);
    return plain;
}

/* ---- sending ---- */

typedef struct {
    PyObject_HEAD
    PyObject *wire, *sealer, *nothing;
    char *record;
    Py_ssize_t room, used; /* of the last record */
} outlet_t;

/* The record of `plain`, in place of the one before: 1, 0 if the ordinary way has to make it, -1
 * with an exception. */
static int seal(outlet_t *outlet, PyObject *plain) {
    Py_ssize_t num_bytes = PyObject_Size(plain), sealed_bytes = num_bytes + TAG_BYTES;
    cipher_t cipher = {0};
    if (num_bytes < 0) return -1;
    int is_due = sealed_bytes + HEADER_BYTES > outlet->room
                     ? 0
                     : may_go_on(&cipher, outlet->sealer, num_bytes);
    if (is_due == 1) {
        unsigned char *at = (unsigned char *)outlet->record;
        int64_t started = now_ns();
        memset(at, 0, HEADER_BYTES);
        at[0] = FRAME;
        for (int i = 0; i < 4; i++) at[4 + i] = (unsigned char)(sealed_bytes >> (24 - 8 * i));
        PyObject *header = PyBytes_FromStringAndSize(outlet->record, HEADER_BYTES);
        PyObject *sealed =
            PyMemoryView_FromMemory(outlet->record + HEADER_BYTES, sealed_bytes, PyBUF_WRITE);
        is_due = header && sealed && apply(&cipher, names.encrypt_into, plain, header, sealed) &&
                         count(&cipher, num_bytes) &&
                         add(outlet->sealer, names.encrypt_ns, now_ns() - started)
                     ? 1
                     : -1;
        Py_XDECREF(header);
        Py_XDECREF(sealed);
        outlet->used = HEADER_BYTES + sealed_bytes;
    }
    forget(&cipher);
    return is_due;
}

/* What is still to be sent of the last record: seldom anything. */
static PyObject *rest_of(const outlet_t *outlet, Py_ssize_t sent) {
    if (sent == outlet->used) return Py_NewRef(outlet->nothing);
    PyObject *bytes = PyBytes_FromStringAndSize(outlet->record + sent, outlet->used - sent);
    PyObject *rest = bytes ? PyMemoryView_FromObject(bytes) : NULL;
    Py_XDECREF(bytes);
    return rest;
}

static PyObject *outlet_send(PyObject *self, PyObject *plain) {
    outlet_t *outlet = (outlet_t *)self;
    int64_t fd = number(outlet->wire, names.fd);
    if (PyErr_Occurred()) return NULL;
    int is_sealed = fd < 0 ? 0 : seal(outlet, plain);
    if (is_sealed != 1) return is_sealed == 0 ? Py_NewRef(Py_None) : NULL;
    int64_t started = now_ns();
    ssize_t sent = send((int)fd, outlet->record, (size_t)outlet->used, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (sent < 0) sent = 0;
    if (!add(outlet->wire, names.bytes_sent, sent) ||
        !add(outlet->wire, names.send_ns, now_ns() - started)) {
        return NULL;
    }
    return rest_of(outlet, sent);
}

/* ---- the types ---- */

static PyObject *inlet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    inlet_t *inlet = (inlet_t *)type->tp_alloc(type, 0);
    if (inlet && !PyArg_ParseTuple(args, "OOOO", &inlet->wire, &inlet->reader, &inlet->opener,
                                   &inlet->arena)) {
        inlet->wire = inlet->reader = inlet->opener = inlet->arena = NULL;
        Py_CLEAR(inlet);
    }
    if (!inlet) return NULL;
    Py_INCREF(inlet->wire);
    Py_INCREF(inlet->reader);
    Py_INCREF(inlet->opener);
    Py_INCREF(inlet->arena);
    return (PyObject *)inlet;
}

static void inlet_dealloc(PyObject *self) {
    inlet_t *inlet = (inlet_t *)self;
    Py_XDECREF(inlet->plain);
    Py_XDECREF(inlet->storage);
    Py_XDECREF(inlet->wire);
    Py_XDECREF(inlet->reader);
    Py_XDECREF(inlet->opener);
    Py_XDECREF(inlet->arena);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *outlet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *wire, *sealer;
    Py_ssize_t room;
    if (!PyArg_ParseTuple(args, "OOn", &wire, &sealer, &room)) return NULL;
    outlet_t *outlet = (outlet_t *)type->tp_alloc(type, 0);
    if (!outlet) return NULL;
    outlet->wire = Py_NewRef(wire);
    outlet->sealer = Py_NewRef(sealer);
    outlet->room = room;
    outlet->nothing = PyMemoryView_FromMemory("", 0, PyBUF_READ);
    outlet->record = PyMem_Malloc((size_t)room);
    if (outlet->nothing && outlet->record) return (PyObject *)outlet;
    Py_DECREF(outlet);
    return PyErr_NoMemory();
}

static void outlet_dealloc(PyObject *self) {
    outlet_t *outlet = (outlet_t *)self;
    PyMem_Free(outlet->record);
    Py_XDECREF(outlet->nothing);
    Py_XDECREF(outlet->wire);
    Py_XDECREF(outlet->sealer);
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef inlet_methods[] = {{"receive", inlet_receive, METH_O, NULL}, {0}};
static PyMethodDef outlet_methods[] = {{"send", outlet_send, METH_O, NULL}, {0}};

static PyTypeObject inlet_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "transport._native.Inlet",
    .tp_basicsize = sizeof(inlet_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = inlet_new,
    .tp_dealloc = inlet_dealloc,
    .tp_methods = inlet_methods,
};

static PyTypeObject outlet_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "transport._native.Outlet",
    .tp_basicsize = sizeof(outlet_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = outlet_new,
    .tp_dealloc = outlet_dealloc,
    .tp_methods = outlet_methods,
};

static int intern_names(void) {
#define NAME(name) (names.name = PyUnicode_InternFromString(#name)) != NULL
    return NAME(fd) && NAME(bytes_sent) && NAME(bytes_received) && NAME(send_ns) &&
           NAME(recv_ns) && NAME(_start) && NAME(_end) && NAME(_header) && NAME(_last) &&
           NAME(_store) && NAME(storage) && NAME(_cipher) && NAME(_use) && NAME(_pack_nonce) &&
           NAME(nonce) && NAME(num_records) && NAME(num_bytes) && NAME(decrypt_ns) &&
           NAME(encrypt_ns) && NAME(_policy) && NAME(max_records) && NAME(max_bytes) &&
           NAME(decrypt_into) && NAME(encrypt_into);
#undef NAME
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *made = intern_names() ? PyModule_Create(&module) : NULL;
    if (!made) return NULL;
    if (!PyModule_AddType(made, &inlet_type) && !PyModule_AddType(made, &outlet_type)) return made;
    Py_DECREF(made);
    return NULL;
}
