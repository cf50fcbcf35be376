/* One record at a time, from the socket to its plaintext and from a plaintext to the socket.
 *
 * Between two tokens a model's weights pass through the processor's caches, so that each Python
 * call on a record's way costs microseconds, and there are dozens; so does each attribute. Here
 * there is one call for each record, and what it counts lies in members of the objects of
 * transport.records. Those stay in charge: they hold the keys, what has been received and what to
 * do next, and the cipher is theirs. Whatever is not plainly the record expected next is left to
 * them as it came, for them to decide what it is.
 */
#ifndef VEILPIPE_RECORDS_H
#define VEILPIPE_RECORDS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

enum { HEADER_BYTES = 8, TAG_BYTES = 16, FRAME = 2 };

/* tallies.c: what is read and counted for each record, in bases of Python classes */
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
    PyObject *cipher; /* a cipher_tally_t, or None after a failure */
} half_tally_t;

typedef struct {
    PyObject_HEAD
    int64_t start, end;             /* of what is in the store and has not been read */
    PyObject *store, *header, *last; /* last: the header of the record before */
} reader_tally_t;

typedef struct {
    PyObject_HEAD
    PyObject *storage;
} plain_tally_t;

typedef struct {
    PyObject_HEAD
    int64_t fd, bytes_sent, bytes_received, send_ns, recv_ns;
} wire_tally_t;

extern PyTypeObject cipher_tally_type, use_tally_type, half_tally_type, reader_tally_type,
    plain_tally_type, wire_tally_type;

/* cipher.c: one direction's */
typedef struct {
    half_tally_t *half; /* a RecordSealer or RecordOpener */
    cipher_tally_t *state;
    use_tally_t *use;
    PyObject *operation; /* its name: encrypt_into or decrypt_into */
    int64_t max_records, max_bytes;
} cipher_t;

int64_t now_ns(void);
PyObject *nonce_bytes(uint64_t number);
int cipher_init(cipher_t *cipher, half_tally_t *half, const char *operation);
void cipher_clear(cipher_t *cipher);
int may_go_on(const cipher_t *cipher, int64_t num_bytes);
int apply(const cipher_t *cipher, PyObject *nonce, PyObject *from, PyObject *header,
          PyObject *into, int64_t num_bytes);

extern PyTypeObject inlet_type, outlet_type; /* inlet.c, outlet.c */

#endif
