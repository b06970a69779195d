/* Arrays in device memory as Python objects, and operations on them. */
#ifndef PYLOSS_BINDING_DEVICE_H
#define PYLOSS_BINDING_DEVICE_H

#include "spec.h"

/* Adds DeviceArray and the opencl_* functions to the module; -1 with an exception set. */
int pl_device_init(PyObject *module);
/* Whether an argument lies in device memory. */
int pl_device_call(PyObject *const *args, Py_ssize_t nargs);
/* What PYLOSS_PROFILE counts, of an operation or of copies in one direction. */
typedef struct {
    int64_t calls, nanoseconds, bytes;
} pl_profile;
extern pl_profile pl_copied_to_devices, pl_copied_from_devices;
extern int pl_profiling;
/* Now, or 0 while nothing is counted; and the entry of what began then. */
int64_t pl_profile_begin(void);
void pl_profile_end(pl_profile *entry, int64_t begin, int64_t bytes);
/* Bytes of an array in device memory, 0 for anything else. */
int64_t pl_device_bytes(PyObject *object);

/* Checks a call as one on the host would be, and enqueues it on the device of its arrays; while calls are timed, waits for it. */
PyObject *pl_device_run(int op, const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs);

#endif
