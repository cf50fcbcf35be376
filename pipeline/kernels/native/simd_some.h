/* For levels without masks of their own: what takes only some lanes, through memory. */
INLINE f32x16 f_load_some_halves(mask16 mask, const void *p) {
    if (mask == 0xffff) return f_load_halves(p);
    uint16_t all[16] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) all[i] = ((const uint16_t *)p)[i];
    }
    return f_load_halves(all);
}

INLINE i32x16 i_load_some_words(mask16 mask, const void *p) {
    if (mask == 0xffff) return i_load_words(p);
    uint16_t all[16] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) all[i] = ((const uint16_t *)p)[i];
    }
    return i_load_words(all);
}

INLINE i32x16 i_load_some_bytes(mask16 mask, const void *p) {
    if (mask == 0xffff) return i_load_bytes(p);
    int8_t all[16] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) all[i] = ((const int8_t *)p)[i];
    }
    return i_load_bytes(all);
}

INLINE void store_some_of(void *p, mask16 mask, const uint16_t *all) {
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) ((uint16_t *)p)[i] = all[i];
    }
}

INLINE void f_store_some_halves(void *p, mask16 mask, f32x16 x) {
    uint16_t all[16];
    f_store_halves(mask == 0xffff ? p : all, x);
    if (mask != 0xffff) store_some_of(p, mask, all);
}

INLINE void i_store_some_words(void *p, mask16 mask, i32x16 x) {
    uint16_t all[16];
    i_store_words(mask == 0xffff ? p : all, x);
    if (mask != 0xffff) store_some_of(p, mask, all);
}

INLINE i32x16 i_load_first_bytes(size_t count, const void *p) {
    char all[64] = {0};
    __builtin_memcpy(all, p, count < 64 ? count : 64);
    return i_load(all);
}

INLINE void i_store_first_bytes(void *p, size_t count, i32x16 x) {
    char all[64];
    i_store(all, x);
    __builtin_memcpy(p, all, count < 64 ? count : 64);
}

/* x * 2^n for whole n, in two steps of which only the second rounds. */
INLINE f32x16 f_scale(f32x16 x, f32x16 n) {
    i32x16 whole = i_of_f(n);
    i32x16 half = i_sub(i_shr(i_add(whole, i_set1(512)), 1), i_set1(256)), rest = i_sub(whole, half);
    f32x16 first = f_of_bits(i_shl(i_add(half, i_set1(127)), 23));
    f32x16 second = f_of_bits(i_shl(i_add(rest, i_set1(127)), 23));
    return f_mul(f_mul(x, first), second);
}
