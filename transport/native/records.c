/* One record at a time, from the socket to its plaintext and from a plaintext to the socket.
 *
 * Between two tokens a model's weights pass through the processor's caches, so that each Python
 * call on a record's way costs microseconds, and there are dozens; so does each attribute. Here
 * there is one call for each record, and what it counts lies in members of the objects of
 * transport.records. Those stay in charge: they hold the keys, what has been received and what to
 * do next, and the cipher is theirs. Whatever is not plainly the record expected next is left to
 * them as it came, for them to decide what it is.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { HEADER_BYTES = 8, TAG_BYTES = 16, NONCE_BYTES = 12, FRAME = 2 };
enum { LAST_SEALED_BYTES = 1, LAST_RAW = 3 }; /* of a RecordHeader */

static struct {
    PyObject *_start, *_end, *_header, *_last, *_store, *storage;
    PyObject *_cipher, *_use, *_pack_nonce, *_policy, *max_records, *max_bytes;
    PyObject *decrypt_into, *encrypt_into;
} names;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* ---- what is counted: bases of Python classes ---- */

typedef struct {
    PyObject_HEAD
    uint64_t nonce;
    PyObject *aead; /* holds the key, and is kept nowhere else: a key replaced is to be gone */
} cipher_tally_t;

typedef struct {
    PyObject_HEAD
    int64_t num_records, num_bytes;
} use_tally_t;

typedef struct {
    PyObject_HEAD
    int64_t cipher_ns;
} half_tally_t;

typedef struct {
    PyObject_HEAD
    int64_t fd, bytes_sent, bytes_received, send_ns, recv_ns;
} wire_tally_t;

#define NUMBER(TYPE, NAME) {#NAME, T_LONGLONG, offsetof(TYPE, NAME), 0, NULL}
static PyMemberDef cipher_members[] = {
    {"nonce", T_ULONGLONG, offsetof(cipher_tally_t, nonce), 0, NULL},
    {"_cipher", T_OBJECT_EX, offsetof(cipher_tally_t, aead), 0, NULL},
    {0},
};
static PyMemberDef use_members[] = {
    NUMBER(use_tally_t, num_records),
    NUMBER(use_tally_t, num_bytes),
    {0},
};
static PyMemberDef half_members[] = {
    NUMBER(half_tally_t, cipher_ns),
    {0},
};
static PyMemberDef wire_members[] = {
    NUMBER(wire_tally_t, fd),      NUMBER(wire_tally_t, bytes_sent),
    NUMBER(wire_tally_t, send_ns), NUMBER(wire_tally_t, bytes_received),
    NUMBER(wire_tally_t, recv_ns), {0},
};

static void cipher_dealloc(PyObject *self) {
    Py_CLEAR(((cipher_tally_t *)self)->aead);
    Py_TYPE(self)->tp_free(self);
}

#define TALLY(NAME, PYTHON, DEALLOC)                     \
    static PyTypeObject NAME##_tally_type = {            \
        PyVarObject_HEAD_INIT(NULL, 0)                   \
        .tp_name = "transport._native." #PYTHON,         \
        .tp_basicsize = sizeof(NAME##_tally_t),          \
        .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, \
        .tp_new = PyType_GenericNew,                     \
        .tp_dealloc = DEALLOC,                           \
        .tp_members = NAME##_members,                    \
    };
TALLY(cipher, CipherTally, cipher_dealloc)
TALLY(use, UseTally, NULL)
TALLY(half, HalfTally, NULL)
TALLY(wire, WireTally, NULL)

/* An attribute that is such an object; a new reference, NULL with an exception. */
static PyObject *tally_of(PyObject *object, PyObject *name, PyTypeObject *type) {
    PyObject *tally = PyObject_GetAttr(object, name);
    if (!tally || PyObject_TypeCheck(tally, type)) return tally;
    PyErr_Format(PyExc_TypeError, "%U is not a %s", name, type->tp_name);
    Py_DECREF(tally);
    return NULL;
}

/* ---- one direction's cipher ---- */

typedef struct {
    half_tally_t *half; /* a RecordSealer or RecordOpener */
    cipher_tally_t *state;
    use_tally_t *use;
    PyObject *operation; /* the name of encrypt_into or decrypt_into */
    int64_t max_records, max_bytes;
} cipher_t;

static int64_t number(PyObject *object, PyObject *name) {
    PyObject *attribute = PyObject_GetAttr(object, name);
    int64_t value = attribute ? PyLong_AsLongLong(attribute) : -1;
    Py_XDECREF(attribute);
    return value;
}

/* RFC 8439's nonce as Noise has it, section 12.3: four zeros, 64 bits with the lowest first. */
static PyObject *nonce_bytes(uint64_t number) {
    unsigned char nonce[NONCE_BYTES] = {0};
    for (int i = 0; i < 8; i++) nonce[4 + i] = (unsigned char)(number >> (8 * i));
    return PyBytes_FromStringAndSize((char *)nonce, NONCE_BYTES);
}

/* Whether the cipher lays its nonces out like this; -1 with an exception. */
static int packs_alike(PyObject *state) {
    const uint64_t any = 0x0102030405060708;
    PyObject *pack = PyObject_GetAttr(state, names._pack_nonce);
    PyObject *theirs = pack ? PyObject_CallFunction(pack, "K", any) : NULL;
    PyObject *ours = theirs ? nonce_bytes(any) : NULL;
    int is_alike = ours ? PyObject_RichCompareBool(theirs, ours, Py_EQ) : -1;
    Py_XDECREF(pack);
    Py_XDECREF(theirs);
    Py_XDECREF(ours);
    return is_alike;
}

static void cipher_clear(cipher_t *cipher) {
    Py_CLEAR(cipher->half);
    Py_CLEAR(cipher->state);
    Py_CLEAR(cipher->use);
}

/* Returns 0 with an exception. */
static int cipher_init(cipher_t *cipher, PyObject *half, PyObject *operation) {
    if (!PyObject_TypeCheck(half, &half_tally_type)) {
        PyErr_SetString(PyExc_TypeError, "not the half of a record layer");
        return 0;
    }
    cipher->half = (half_tally_t *)Py_NewRef(half);
    cipher->operation = operation;
    cipher->state = (cipher_tally_t *)tally_of(half, names._cipher, &cipher_tally_type);
    if (!cipher->state) return 0;
    cipher->use = (use_tally_t *)tally_of(half, names._use, &use_tally_type);
    PyObject *policy = cipher->use ? PyObject_GetAttr((PyObject *)cipher->use, names._policy) : NULL;
    if (!policy) return 0;
    cipher->max_records = number(policy, names.max_records);
    cipher->max_bytes = number(policy, names.max_bytes);
    Py_DECREF(policy);
    if (PyErr_Occurred()) return 0;
    int is_alike = packs_alike((PyObject *)cipher->state);
    if (is_alike == 0) PyErr_SetString(PyExc_ValueError, "another cipher lays out nonces otherwise");
    return is_alike == 1;
}

/* Whether a record of so many bytes may be next under this key. */
static int may_go_on(const cipher_t *cipher, int64_t num_bytes) {
    return cipher->use->num_records < cipher->max_records &&
           num_bytes <= cipher->max_bytes - cipher->use->num_bytes &&
           cipher->state->aead && cipher->state->nonce <= INT64_MAX; /* the last of 64 bits is for rekeying */
}

/* Seals or opens, and counts; 0 with an exception, and nothing counted. */
static int apply(const cipher_t *cipher, PyObject *nonce, PyObject *from, PyObject *header,
                 PyObject *into, int64_t num_bytes) {
    int64_t started = now_ns();
    PyObject *args[] = {cipher->state->aead, nonce, from, header, into};
    PyObject *result = PyObject_VectorcallMethod(cipher->operation, args, 5, NULL);
    if (!result) return 0;
    Py_DECREF(result);
    cipher->state->nonce++;
    cipher->use->num_records++;
    cipher->use->num_bytes += num_bytes;
    cipher->half->cipher_ns += now_ns() - started;
    return 1;
}

/* ---- receiving ---- */

typedef struct {
    PyObject_HEAD
    wire_tally_t *wire;
    PyObject *reader, *arena;
    cipher_t cipher;
    PyObject *storage, *plain; /* the arena's when last seen, and the part of it that is returned */
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

/* The part of the arena's storage for so many bytes; 0 with an exception or where it is less. */
static int make_room(inlet_t *inlet, Py_ssize_t num_bytes) {
    PyObject *storage = PyObject_GetAttr(inlet->arena, names.storage);
    if (!storage) return 0;
    if (storage != inlet->storage || !inlet->plain ||
        PyMemoryView_GET_BUFFER(inlet->plain)->len != num_bytes) {
        Py_XSETREF(inlet->plain, PySequence_GetSlice(storage, 0, num_bytes));
        Py_XSETREF(inlet->storage, Py_NewRef(storage));
    }
    Py_DECREF(storage);
    return inlet->plain && PyMemoryView_Check(inlet->plain) &&
           PyMemoryView_GET_BUFFER(inlet->plain)->len == num_bytes;
}

/* Makes ready for a record like `last`; without a header afterwards none is expected. Returns 0
 * with an exception. */
static int expect(inlet_t *inlet, arrival_t *arrival, PyObject *last) {
    PyObject *state = PyObject_GetAttr((PyObject *)inlet->cipher.half, names._cipher);
    Py_XDECREF(state); /* compared only: None after a failure */
    if (state != (PyObject *)inlet->cipher.state || !PyTuple_Check(last) ||
        PyTuple_GET_SIZE(last) <= LAST_RAW) {
        return !PyErr_Occurred();
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
    int64_t start = number(inlet->reader, names._start), end = number(inlet->reader, names._end);
    PyObject *header = PyObject_GetAttr(inlet->reader, names._header);
    int is_between = header == Py_None && start == end;
    Py_XDECREF(header);
    if (PyErr_Occurred()) return -1;
    if (!is_between) return 0;
    PyObject *store = PyObject_GetAttr(inlet->reader, names._store);
    PyObject *last = store ? PyObject_GetAttr(inlet->reader, names._last) : NULL;
    int is_ready = last && !PyObject_GetBuffer(store, &arrival->store, PyBUF_WRITABLE) &&
                   expect(inlet, arrival, last);
    Py_XDECREF(store);
    Py_XDECREF(last);
    return is_ready ? 1 : -1;
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

/* ---- sending ---- */

typedef struct {
    PyObject_HEAD
    wire_tally_t *wire;
    cipher_t cipher;
    char *record;
    Py_ssize_t room, num_bytes; /* of the plaintext that header and sealed are for */
    PyObject *header, *sealed, *nothing;
} outlet_t;

/* Where a record of so many bytes goes; 0 with an exception. */
static int lay_out(outlet_t *outlet, Py_ssize_t num_bytes) {
    if (outlet->num_bytes == num_bytes) return 1;
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

/* ---- the types ---- */

static void inlet_dealloc(PyObject *self) {
    inlet_t *inlet = (inlet_t *)self;
    cipher_clear(&inlet->cipher);
    Py_XDECREF(inlet->wire);
    Py_XDECREF(inlet->reader);
    Py_XDECREF(inlet->arena);
    Py_XDECREF(inlet->storage);
    Py_XDECREF(inlet->plain);
    Py_TYPE(self)->tp_free(self);
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

static PyObject *inlet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *wire, *reader, *opener, *arena;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "O!OOO", &wire_tally_type, &wire, &reader, &opener, &arena)) {
        return NULL;
    }
    inlet_t *inlet = (inlet_t *)type->tp_alloc(type, 0);
    if (!inlet) return NULL;
    inlet->wire = (wire_tally_t *)Py_NewRef(wire);
    inlet->reader = Py_NewRef(reader);
    inlet->arena = Py_NewRef(arena);
    if (!cipher_init(&inlet->cipher, opener, names.decrypt_into)) Py_CLEAR(inlet);
    return (PyObject *)inlet;
}

static PyObject *outlet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *wire, *sealer;
    Py_ssize_t room;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "O!On", &wire_tally_type, &wire, &sealer, &room)) return NULL;
    outlet_t *outlet = (outlet_t *)type->tp_alloc(type, 0);
    if (!outlet) return NULL;
    outlet->wire = (wire_tally_t *)Py_NewRef(wire);
    outlet->room = room;
    outlet->nothing = PyMemoryView_FromMemory("", 0, PyBUF_READ);
    outlet->record = room < 0 ? NULL : PyMem_Malloc((size_t)room + HEADER_BYTES);
    if (outlet->nothing && !outlet->record) PyErr_NoMemory();
    if (!outlet->nothing || !outlet->record ||
        !cipher_init(&outlet->cipher, sealer, names.encrypt_into)) {
        Py_CLEAR(outlet);
    }
    return (PyObject *)outlet;
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
    return NAME(_start) && NAME(_end) && NAME(_header) && NAME(_last) && NAME(_store) &&
           NAME(storage) && NAME(_cipher) && NAME(_use) && NAME(_pack_nonce) && NAME(_policy) &&
           NAME(max_records) && NAME(max_bytes) && NAME(decrypt_into) && NAME(encrypt_into);
#undef NAME
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};

PyMODINIT_FUNC PyInit__native(void) {
    PyTypeObject *types[] = {&cipher_tally_type, &use_tally_type, &half_tally_type,
                             &wire_tally_type,   &inlet_type,     &outlet_type};
    PyObject *made = intern_names() ? PyModule_Create(&module) : NULL;
    for (size_t i = 0; made && i < sizeof types / sizeof *types; i++) {
        if (PyModule_AddType(made, types[i])) Py_CLEAR(made);
    }
    return made;
}
