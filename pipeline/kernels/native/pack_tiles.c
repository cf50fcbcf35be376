/* From weights as files hold them to packed ones: read, converted and packed in one pass.
 *
 * A tile of 64 inputs of 16 outputs is loaded as floats, an input's 16 outputs side by side in one
 * vector, and a function for each kind writes that share of a packed weight. What is int8 already
 * goes the same way four inputs at a time, as words.
 */
#include "int4_tiles.h"

#if defined(VEILPIPE_SIMD)

static void store_super(super_t *super, const quads_t *quads, const i32x16 *scales, size_t num_in,
                        mask16 outputs) {
    const i32x16 flip = i_set1((int)0x80808080); /* + 128 */
    for (size_t group = 0; group * GROUP < num_in && group < SUPER / GROUP; group++) {
        for (size_t quad = group * GROUP / 4; quad < (group + 1) * GROUP / 4; quad++) {
            i32x16 word = i_load(quads->words[quad]);
            i_store_some(super->weights[quad], outputs, i_xor(word, flip));
        }
        i_store_some_words(super->scales[group], outputs, scales[group]);
    }
}

static void store_super4(super4_t *super, const quads_t *quads, const sides_t *sides, size_t num_in,
                         mask16 outputs) {
    for (size_t group = 0; group * GROUP < num_in && group < SUPER / GROUP; group++) {
        for (size_t n = 0; n < GROUP / 8; n++) {
            i32x16 below = i_load(quads->words[group * GROUP / 4 + n]);
            i32x16 above = i_load(quads->words[group * GROUP / 4 + GROUP / 8 + n]);
            i_store_some(super->weights[group][n], outputs, i_or(below, i_shl(above, 4)));
        }
        i_store_some_words(super->scales[group], outputs, sides->scales[group]);
        i_store_some_words(super->zeros[group], outputs, sides->zeros[group]);
    }
}

/* Writes 64 inputs, or the `num_in` that are left, of a block's outputs. */
typedef void (*pack_fn)(char *to, const tile_t *tile, size_t num_in, mask16 outputs);

static void pack_f32(char *to, const tile_t *tile, size_t num_in, mask16 outputs) {
    for (size_t k = 0; k < SUPER && k < num_in; k++) {
        i_store_some(to + k * VECTOR, outputs, i_of_bits(f_load(tile->values[k])));
    }
}

INLINE void pack_pairs(const int STORED, char *to, const tile_t *tile, size_t num_in,
                       mask16 outputs) {
    for (size_t k = 0; k < SUPER && k < num_in; k += 2) {
        i32x16 low = rounded(STORED, f_load(tile->values[k]));
        i32x16 high = rounded(STORED, f_load(tile->values[k + 1]));
        i_store_some(to + k / 2 * VECTOR, outputs,
                    i_or(low, i_shl(high, 16)));
    }
}

static void pack_bf16(char *to, const tile_t *tile, size_t num_in, mask16 outputs) {
    pack_pairs(STORED_F32, to, tile, num_in, outputs);
}

static void pack_exact_bf16(char *to, const tile_t *tile, size_t num_in, mask16 outputs) {
    pack_pairs(STORED_BF16, to, tile, num_in, outputs);
}

static void pack_i8(char *to, const tile_t *tile, size_t num_in, mask16 outputs) {
    quads_t quads;
    i32x16 scales[SUPER / GROUP];
    quantise_tile(tile, &quads, scales);
    store_super((super_t *)to, &quads, scales, num_in, outputs);
}

static void pack_i4(char *to, const tile_t *tile, size_t num_in, mask16 outputs) {
    quads_t quads;
    sides_t sides;
    quantise_tile_int4(tile, &quads, &sides);
    for (size_t k = num_in; k < SUPER; k++) { /* where nothing is, a level need not be 0 */
        for (size_t out = 0; out < BLOCK; out++) quads.words[k / 4][out] &= ~(0xffu << k % 4 * 8);
    }
    store_super4((super4_t *)to, &quads, &sides, num_in, outputs);
}

static pack_fn packer(int kind, int stored) {
    switch (kind) {
    case KIND_F32: return pack_f32;
    case KIND_BF16: return stored == STORED_BF16 ? pack_exact_bf16 : pack_bf16;
    case KIND_I4: return pack_i4;
    default: return pack_i8;
    }
}

typedef struct {
    matrix_t matrix;
    int kind;
    char *dst; /* the first input's share of the first block */
    size_t first_out, end_out, bytes; /* of a block */
    const uint16_t *scales, *zeros;
    ptrdiff_t scale_stride; /* of zeros, too */
} pack_job_t;

INLINE void pack_block(const int STORED, const pack_job_t *job, size_t block) {
    pack_fn run = packer(job->kind, STORED);
    size_t step = block_bytes(job->kind, SUPER);
    char *to = job->dst + block * job->bytes;
    source_t source = source_of(&job->matrix, job->first_out, job->end_out, block);
    do {
        tile_t tile;
        load(STORED, &source, &tile);
        run(to, &tile, source.num_in, outputs_of(&source));
        to += step;
    } while (advance(&source));
}

/* What a block's outputs have for 64 inputs, a number for each group, `behind` from their first. */
static void load_sides(const pack_job_t *job, const source_t *source, size_t block,
                       const uint16_t *sides, size_t behind, i32x16 found[SUPER / GROUP]) {
    ptrdiff_t first = (ptrdiff_t)(block * BLOCK) - (ptrdiff_t)job->first_out;
    const uint16_t *of_output = sides + first * job->scale_stride + (ptrdiff_t)behind;
    for (size_t group = 0; group < SUPER / GROUP; group++) {
        uint32_t each[BLOCK] = {0};
        for (size_t out = source->first; out < source->end && group * GROUP < source->num_in; out++) {
            each[out] = of_output[(ptrdiff_t)out * job->scale_stride + (ptrdiff_t)group];
        }
        found[group] = i_load(each);
    }
}

static void pack_int8_block(const pack_job_t *job, size_t block) {
    super_t *super = (super_t *)(job->dst + block * job->bytes);
    source_t source = source_of(&job->matrix, job->first_out, job->end_out, block);
    size_t behind = 0;
    do {
        quads_t quads;
        i32x16 scales[SUPER / GROUP];
        load_quads(&source, &quads);
        load_sides(job, &source, block, job->scales, behind, scales);
        store_super(super++, &quads, scales, source.num_in, outputs_of(&source));
        behind += SUPER / GROUP;
    } while (advance(&source));
}

static void pack_int4_block(const pack_job_t *job, size_t block) {
    super4_t *super = (super4_t *)(job->dst + block * job->bytes);
    source_t source = source_of(&job->matrix, job->first_out, job->end_out, block);
    size_t behind = 0;
    do {
        quads_t quads;
        sides_t sides;
        load_quads(&source, &quads);
        load_sides(job, &source, block, job->scales, behind, sides.scales);
        load_sides(job, &source, block, job->zeros, behind, sides.zeros);
        store_super4(super++, &quads, &sides, source.num_in, outputs_of(&source));
        behind += SUPER / GROUP;
    } while (advance(&source));
}

static void pack_chunk(void *opaque, size_t chunk) {
    const pack_job_t *job = opaque;
    size_t block = job->first_out / BLOCK + chunk;
    switch (job->matrix.stored) {
    case STORED_F32: pack_block(STORED_F32, job, block); break;
    case STORED_BF16: pack_block(STORED_BF16, job, block); break;
    case STORED_F16: pack_block(STORED_F16, job, block); break;
    default:
        if (job->kind == KIND_I4) pack_int4_block(job, block);
        else pack_int8_block(job, block);
    }
}

static void run_blocks(pack_job_t *job, place_t place) {
    if (place.num_out == 0) return;
    job->first_out = place.first_out;
    job->end_out = place.first_out + place.num_out;
    job->bytes = block_bytes(job->kind, place.whole_num_in);
    job->dst += block_bytes(job->kind, place.first_in);
    pool_run(pack_chunk, job, (job->end_out - 1) / BLOCK - job->first_out / BLOCK + 1);
}

void pack(int kind, void *dst, const matrix_t *matrix, place_t place) {
    pack_job_t job = {.matrix = *matrix, .kind = kind, .dst = dst};
    run_blocks(&job, place);
}

void pack_int8(void *dst, const matrix_t *matrix, const uint16_t *scales, ptrdiff_t scale_stride,
               place_t place) {
    pack_job_t job = {.matrix = *matrix,
                      .kind = KIND_I8,
                      .dst = dst,
                      .scales = scales,
                      .scale_stride = scale_stride};
    run_blocks(&job, place);
}

void pack_int4(void *dst, const matrix_t *matrix, const uint16_t *scales, const uint16_t *zeros,
               ptrdiff_t side_stride, place_t place) {
    pack_job_t job = {.matrix = *matrix,
                      .kind = KIND_I4,
                      .dst = dst,
                      .scales = scales,
                      .zeros = zeros,
                      .scale_stride = side_stride};
    run_blocks(&job, place);
}

END_SIMD
#endif
