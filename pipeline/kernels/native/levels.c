/* Which vector instructions compute: the levels of this CPU, and the one in use. */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

int has_byte_dot;

#if defined(VEILPIPE_SIMD)

typedef struct {
    const char *name;
    const kernels_t *kernels;
    int (*is_here)(void);
    int has_byte_dot;
} level_t;

#define ENTRY(NAME) .NAME = NAME,
static const kernels_t first_kernels = {KERNELS(ENTRY)};

#if defined(__x86_64__)

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}

static int has_avx2(void) {
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

static int has_avx_vnni(void) {
    unsigned a = 0, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
}

static const level_t levels[] = {
    {"avx512", &first_kernels, has_avx512, 0},
    {"avxvnni", &avx2_kernels, has_avx_vnni, 1},
    {"avx2", &avx2_kernels, has_avx2, 0},
};

#else

static int has_neon(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 0;
#endif
}

static const level_t levels[] = {{"neon", &first_kernels, has_neon, 0}};

#endif

static const level_t *current;
const kernels_t *kernels;

static void use(const level_t *level) {
    current = level;
    kernels = level->kernels;
    has_byte_dot = level->has_byte_dot;
}

static const level_t *found(size_t number) {
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
        if (levels[i].is_here() && number-- == 0) return levels + i;
    }
    return NULL;
}

const char *level_name(size_t number) {
    const level_t *level = found(number);
    return level ? level->name : NULL;
}

const char *current_level(void) {
    if (!current && found(0)) use(found(0));
    return current ? current->name : NULL;
}

int use_level(const char *name) {
    for (size_t i = 0; found(i); i++) {
        if (strcmp(found(i)->name, name)) continue;
        use(found(i));
        return 1;
    }
    return 0;
}

int holds_kind(int kind) {
#if defined(__x86_64__)
    if ((kind == KIND_I8 || kind == KIND_I4) && kernels == &first_kernels) {
        return __builtin_cpu_supports("avx512vnni");
    }
#endif
    return kernels != NULL && kind < NUM_KINDS;
}

int rounds_rows(void) {
#if defined(__x86_64__)
    return kernels == &first_kernels && has_bf16_dot();
#else
    return 0;
#endif
}

#endif
