/* The functions that follow, up to END_SIMD, may use TARGET; the module itself loads anywhere. */
#define PRAGMA(text) _Pragma(#text)
#define PRAGMA_OF(text) PRAGMA(text)
#if defined(__clang__)
PRAGMA_OF(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#pragma GCC push_options
PRAGMA_OF(GCC target(TARGET))
#define END_TARGET _Pragma("GCC pop_options")
#endif
