/* Failures of csrc/opencl as Python exceptions. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "device_error.h"

#include <stdio.h>
#include <stdlib.h>

void pl_raise_device_error(pl_cl_error *error, const char *action, int index) {
    char device[200] = "OpenCL";
    if (index >= 0)
        snprintf(device, sizeof device, "opencl:%d (%s)", index, pl_cl_info_at(index)->name);
    if (error->kind == PL_CL_NO_MEMORY) {
        PyErr_Format(PyExc_MemoryError, "%s on %s: %s", action, device, error->text);
    } else {
        PyObject *module = PyImport_ImportModule("pyloss.errors");
        PyObject *type = module ? PyObject_GetAttrString(module, "DeviceError") : NULL;
        if (type)
            PyErr_Format(type, "%s on %s: %s%s%s", action, device, error->text,
                         error->log ? "\n" : "", error->log ? error->log : "");
        Py_XDECREF(type);
        Py_XDECREF(module);
    }
    free(error->log);
    error->log = NULL;
}
