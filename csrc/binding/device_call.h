/* Calls of operations whose arrays are in device memory. */
#ifndef PYLOSS_BINDING_DEVICE_CALL_H
#define PYLOSS_BINDING_DEVICE_CALL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "spec.h"

/* Whether an argument is in device memory. */
int pl_is_device_call(PyObject *const *args, Py_ssize_t nargs);
/* Checks the call as one on the host is checked, and enqueues it on the device of its arrays. Waits
 * for it while calls are counted. None, or NULL with an exception set. */
PyObject *pl_device_call(int op, const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs);

#endif
