/* Failures of csrc/opencl as Python exceptions. */
#ifndef PYLOSS_BINDING_DEVICE_ERROR_H
#define PYLOSS_BINDING_DEVICE_ERROR_H

#include "../opencl/runtime.h"

/* Raises MemoryError or pyloss.errors.DeviceError for an action ("allocating an array") on device
 * `index`, -1 where no device is open yet; frees the error's build log. */
void pl_raise_device_error(pl_cl_error *error, const char *action, int index);

#endif
