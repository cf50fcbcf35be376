/* What is counted. Described in transport/_native.pyi. */
#include "records.h"

#include <stddef.h>
#include <structmember.h>

#define NUMBER(TYPE, NAME) {#NAME, T_LONGLONG, offsetof(TYPE, NAME), 0, NULL}
#define OBJECT(TYPE, MEMBER, NAME) {NAME, T_OBJECT_EX, offsetof(TYPE, MEMBER), 0, NULL}
static PyMemberDef cipher_members[] = {
    {"nonce", T_ULONGLONG, offsetof(cipher_tally_t, nonce), 0, NULL},
    OBJECT(cipher_tally_t, aead, "_cipher"),
    {0},
};
static PyMemberDef use_members[] = {
    NUMBER(use_tally_t, num_records),
    NUMBER(use_tally_t, num_bytes),
    {0},
};
static PyMemberDef half_members[] = {
    NUMBER(half_tally_t, cipher_ns),
    OBJECT(half_tally_t, cipher, "_cipher"),
    {0},
};
static PyMemberDef reader_members[] = {
    {"_start", T_LONGLONG, offsetof(reader_tally_t, start), 0, NULL},
    {"_end", T_LONGLONG, offsetof(reader_tally_t, end), 0, NULL},
    OBJECT(reader_tally_t, store, "_store"),
    OBJECT(reader_tally_t, header, "_header"),
    OBJECT(reader_tally_t, last, "_last"),
    {0},
};
static PyMemberDef plain_members[] = {
    OBJECT(plain_tally_t, storage, "storage"),
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

static void half_dealloc(PyObject *self) {
    Py_CLEAR(((half_tally_t *)self)->cipher);
    Py_TYPE(self)->tp_free(self);
}

static void reader_dealloc(PyObject *self) {
    reader_tally_t *reader = (reader_tally_t *)self;
    Py_CLEAR(reader->store);
    Py_CLEAR(reader->header);
    Py_CLEAR(reader->last);
    Py_TYPE(self)->tp_free(self);
}

static void plain_dealloc(PyObject *self) {
    Py_CLEAR(((plain_tally_t *)self)->storage);
    Py_TYPE(self)->tp_free(self);
}

#define TALLY(NAME, PYTHON, DEALLOC)                          \
    PyTypeObject NAME##_tally_type = {                        \
        PyVarObject_HEAD_INIT(NULL, 0)                        \
        .tp_name = "transport._native." #PYTHON,              \
        .tp_basicsize = sizeof(NAME##_tally_t),               \
        .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, \
        .tp_new = PyType_GenericNew,                          \
        .tp_dealloc = DEALLOC,                                \
        .tp_members = NAME##_members,                         \
    };
TALLY(cipher, CipherTally, cipher_dealloc)
TALLY(use, UseTally, NULL)
TALLY(half, HalfTally, half_dealloc)
TALLY(reader, ReaderTally, reader_dealloc)
TALLY(plain, PlainTally, plain_dealloc)
TALLY(wire, WireTally, NULL)
