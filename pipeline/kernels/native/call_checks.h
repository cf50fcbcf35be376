/* What checks of arguments share. */
#ifndef VEILPIPE_CALL_CHECKS_H
#define VEILPIPE_CALL_CHECKS_H

#include "calls.h"

#include <string.h>

#define ALIGNMENT 64
#define LARGEST ((int64_t)1 << 28) /* of any size: bytes of a weight fit 63 bits, so do products of two */
#define DONE ((refusal_t){NULL, 0})
#define REFUSE(WHAT, VALUE) return (refusal_t){WHAT, VALUE}
#define CHECK(REFUSAL)                                                                            \
    do {                                                                                          \
        refusal_t refusal_ = (REFUSAL);                                                           \
        if (refusal_.what) return refusal_;                                                       \
    } while (0)

static inline void *at(int64_t address) { return (void *)(uintptr_t)address; }

static inline float float_of(int64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

/* calls.c: ids of rows, `stride` apart. */
refusal_t check_ids(const int64_t *ids, int64_t stride, int64_t count, int64_t num_rows);

#endif
