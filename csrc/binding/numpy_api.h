/* Python's and NumPy's C interfaces, set up alike in every file. module.c defines
 * PYLOSS_IMPORTS_NUMPY: it holds NumPy's table of functions, which the other files share. */
#ifndef PYLOSS_BINDING_NUMPY_API_H
#define PYLOSS_BINDING_NUMPY_API_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL pyloss_array_api
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#ifndef PYLOSS_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

/* module.c: an uninitialized array in a reused, aligned buffer; NULL with an exception set. */
PyObject *pl_new_array(int ndim, const npy_intp *dims, int npy);

#endif
