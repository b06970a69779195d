/* The module's functions on OpenCL devices as a whole. */
#ifndef PYLOSS_BINDING_DEVICES_H
#define PYLOSS_BINDING_DEVICES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef pl_device_functions[];

#endif
