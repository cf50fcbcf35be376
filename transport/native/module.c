/* transport._native. Described in transport/_native.pyi. */
#include "records.h"

struct names names;

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
