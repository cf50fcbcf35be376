/* transport._native. Described in transport/_native.pyi. */
#include "records.h"

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};

PyMODINIT_FUNC PyInit__native(void) {
    PyTypeObject *types[] = {&cipher_tally_type, &use_tally_type, &half_tally_type,
                             &reader_tally_type, &plain_tally_type, &wire_tally_type,
                             &inlet_type,        &outlet_type};
    PyObject *made = PyModule_Create(&module);
    for (size_t i = 0; made && i < sizeof types / sizeof *types; i++) {
        if (PyModule_AddType(made, types[i])) Py_CLEAR(made);
    }
    return made;
}
