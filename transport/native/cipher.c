/* One direction's cipher: its nonces, what its key has done, and calls of it that count. */
#include "records.h"

#include <time.h>

enum { NONCE_BYTES = 12 };

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int64_t number(PyObject *object, const char *name) {
    PyObject *attribute = PyObject_GetAttrString(object, name);
    int64_t value = attribute ? PyLong_AsLongLong(attribute) : -1;
    Py_XDECREF(attribute);
    return value;
}

/* RFC 8439's nonce as Noise has it, section 12.3: four zeros, 64 bits with the lowest first. */
PyObject *nonce_bytes(uint64_t number) {
    unsigned char nonce[NONCE_BYTES] = {0};
    for (int i = 0; i < 8; i++) nonce[4 + i] = (unsigned char)(number >> (8 * i));
    return PyBytes_FromStringAndSize((char *)nonce, NONCE_BYTES);
}

/* Whether the cipher lays its nonces out like this; -1 with an exception. */
static int packs_alike(PyObject *state) {
    const uint64_t any = 0x0102030405060708;
    PyObject *pack = PyObject_GetAttrString(state, "_pack_nonce");
    PyObject *theirs = pack ? PyObject_CallFunction(pack, "K", any) : NULL;
    PyObject *ours = theirs ? nonce_bytes(any) : NULL;
    int is_alike = ours ? PyObject_RichCompareBool(theirs, ours, Py_EQ) : -1;
    Py_XDECREF(pack);
    Py_XDECREF(theirs);
    Py_XDECREF(ours);
    return is_alike;
}

void cipher_clear(cipher_t *cipher) {
    Py_CLEAR(cipher->half);
    Py_CLEAR(cipher->state);
    Py_CLEAR(cipher->use);
    Py_CLEAR(cipher->operation);
}

/* An attribute that is such an object; a new reference, NULL with an exception. */
static void *tally_of(void *object, const char *name, PyTypeObject *type) {
    PyObject *tally = PyObject_GetAttrString(object, name);
    if (!tally || PyObject_TypeCheck(tally, type)) return tally;
    PyErr_Format(PyExc_TypeError, "%s is not a %s", name, type->tp_name);
    Py_DECREF(tally);
    return NULL;
}

/* Returns 0 with an exception. */
int cipher_init(cipher_t *cipher, half_tally_t *half, const char *operation) {
    cipher->half = (half_tally_t *)Py_NewRef((PyObject *)half);
    cipher->operation = PyUnicode_InternFromString(operation);
    cipher->state = cipher->operation ? tally_of(half, "_cipher", &cipher_tally_type) : NULL;
    cipher->use = cipher->state ? tally_of(half, "_use", &use_tally_type) : NULL;
    PyObject *policy = cipher->use ? PyObject_GetAttrString((PyObject *)cipher->use, "_policy") : NULL;
    if (!policy) return 0;
    cipher->max_records = number(policy, "max_records");
    cipher->max_bytes = number(policy, "max_bytes");
    Py_DECREF(policy);
    if (PyErr_Occurred()) return 0;
    int is_alike = packs_alike((PyObject *)cipher->state);
    if (!is_alike) cipher->max_records = 0; /* every record is left to the ordinary way */
    return is_alike >= 0;
}

/* Whether a record of so many bytes may be next under this key. */
int may_go_on(const cipher_t *cipher, int64_t num_bytes) {
    return cipher->use->num_records < cipher->max_records &&
           num_bytes <= cipher->max_bytes - cipher->use->num_bytes &&
           cipher->state->aead && cipher->state->nonce <= INT64_MAX; /* the last of 64 bits is for rekeying */
}

/* Seals or opens, and counts; 0 with an exception, and nothing counted. */
int apply(const cipher_t *cipher, PyObject *nonce, PyObject *from, PyObject *header,
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
