/* Arrays in device memory as Python objects, and operations on them. */
#ifndef PYLOSS_BINDING_DEVICE_H
#define PYLOSS_BINDING_DEVICE_H

#include "spec.h"

/* Adds DeviceArray and the opencl_* functions to the module; -1 with an exception set. */
int pl_device_init(PyObject *module);
/* Whether an argument lies in device memory. */
int pl_device_call(PyObject *const *args, Py_ssize_t nargs);
/* Checks a call as one on the host would be, and enqueues it on the device of its arrays. */
PyObject *pl_device_run(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs);

#endif
