/* All that is compiled for a level, once more for AVX2: under other names in the module. */
#define VEILPIPE_AVX2 1
#include "kernels.h"

#if defined(__x86_64__) && defined(VEILPIPE_SIMD)

/* What the level's files call of each other. */
#define OWN(X)                                                                                     \
    KERNELS(X) X(tile_f32) X(tile_bf16) X(tile_i8) X(tile_i4) X(tile_wide_i4) X(widen_i4)          \
    X(tile_rows) X(interleave) X(quantised_bytes) X(quantise_rows) X(sum_rows)
#define RENAME(NAME) extern __typeof__(NAME) NAME __asm__("avx2_" #NAME);
OWN(RENAME)

#include "simd.h"

#include "attention.h"
extern __typeof__(append_keys) append_keys __asm__("avx2_append_keys");
extern __typeof__(append_values) append_values __asm__("avx2_append_values");

#include "attend_rows.c"
#include "attention.c"
#include "attention_cache.c"
#include "convert.c"
#include "experts.c"
#include "linear.c"
#include "lookup.c"
#include "pack_tiles.c"
#include "pointwise.c"
#include "ring.c"
#include "tiles_f32.c"
#include "tiles_i8.c"
#include "tiles_i4.c"
#include "turn.c"

END_TARGET

#define ENTRY(NAME) .NAME = NAME,
const kernels_t avx2_kernels = {KERNELS(ENTRY)};

#endif
