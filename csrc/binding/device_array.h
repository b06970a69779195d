/* _core.DeviceArray: an array in device memory as a Python object. pyloss.device adds what users
 * see of it. */
#ifndef PYLOSS_BINDING_DEVICE_ARRAY_H
#define PYLOSS_BINDING_DEVICE_ARRAY_H

#include "../opencl/runtime.h"
#include "numpy_api.h"

enum { PL_DEVICE_MAX_NDIM = 32 };

typedef struct {
    PyObject_HEAD pl_cl_buffer *buffer;
    size_t offset, bytes; /* in the buffer */
    int type, ndim;       /* type: see pl_device_array_npy */
    npy_intp dims[PL_DEVICE_MAX_NDIM];
    PyObject *host;       /* an int32 array's elements as an ndarray, or NULL; see host_writes */
    unsigned host_writes; /* `host` is up to date while the buffer's `writes` is this */
} pl_device_array;

/* Adds the type to the module; -1 with an exception set. */
int pl_device_array_init(PyObject *module);

/* The object as a device array; NULL for any other object. */
pl_device_array *pl_device_array_of(PyObject *object);
/* NumPy's type for the elements; NPY_UINT16 for bfloat16, which NumPy lacks. */
int pl_device_array_npy(const pl_device_array *a);
/* A new reference to an int32 array's elements on the host. They are copied back only if the device
 * has written since the last copy. */
PyObject *pl_device_array_values(pl_device_array *a);

#endif
