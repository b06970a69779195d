/* The module's functions on OpenCL devices: their list, the shape of kernels, cached memory. */
#include "devices.h"

#include <string.h>

#include "../opencl/launch.h"
#include "../opencl/profile.h"
#include "device_error.h"
#include "numbers.h"

static const char *kind_of(const pl_cl_info *device) {
    return device->kind & CL_DEVICE_TYPE_CPU           ? "cpu"
           : device->kind & CL_DEVICE_TYPE_GPU         ? "gpu"
           : device->kind & CL_DEVICE_TYPE_ACCELERATOR ? "accelerator"
                                                       : "custom";
}

static PyObject *py_opencl_devices(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    pl_cl_error error;
    int count, failed;
    const char *reason;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_open(&count, &reason, &error);
    Py_END_ALLOW_THREADS
    if (failed) {
        pl_raise_device_error(&error, "listing devices", -1);
        return NULL;
    }
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < count; i++) {
        const pl_cl_info *d = pl_cl_info_at(i);
        PyObject *item = Py_BuildValue(
            "{s:s,s:s,s:s,s:s,s:s,s:L,s:L,s:L,s:n,s:n,s:O}", "name", d->name, "platform",
            d->platform_name, "vendor", d->vendor, "driver", d->driver, "kind", kind_of(d),
            "memory", (long long)d->global_memory, "max_allocation", (long long)d->max_allocation,
            "local_memory", (long long)d->local_memory, "max_group", (Py_ssize_t)d->max_group,
            "units", (Py_ssize_t)d->units, "fp64", d->fp64 ? Py_True : Py_False);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list ? Py_BuildValue("(Nz)", list, reason) : NULL;
}

static PyObject *py_opencl_shape(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *given[3];
    int64_t size[3];
    int without_fp64 = 0;
    if (!PyArg_ParseTuple(args, "OOO|p", &given[0], &given[1], &given[2], &without_fp64))
        return NULL;
    for (int i = 0; i < 3; i++)
        if (pl_whole("opencl_shape", "a size", given[i], 0, 1 << 20, &size[i])) return NULL;
    pl_cl_forced_shape = (pl_cl_shape){(int)size[0], (int)size[1], (int)size[2]};
    pl_cl_without_fp64 = without_fp64;
    Py_RETURN_NONE;
}

static PyObject *py_opencl_trim(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    Py_BEGIN_ALLOW_THREADS
    pl_cl_trim();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Appends `item`, which it takes over, to a list; -1 with an exception set if there is none. */
static int append(PyObject *list, PyObject *item) {
    const int failed = !item || PyList_Append(list, item);
    Py_XDECREF(item);
    return failed ? -1 : 0;
}

static PyObject *py_opencl_profile(PyObject *self, PyObject *args) {
    (void)self;
    int on;
    if (!PyArg_ParseTuple(args, "p", &on)) return NULL;
    pl_cl_profile found;
    Py_BEGIN_ALLOW_THREADS
    found = pl_cl_profile_switch(on);
    Py_END_ALLOW_THREADS
    PyObject *commands = PyList_New(0), *builds = PyList_New(0);
    int failed = !commands || !builds;
    for (size_t i = 0; !failed && i < found.command_count; i++) {
        const pl_cl_command_time *c = &found.commands[i];
        const double seconds = 1e-9 * (double)c->nanoseconds;
        failed = append(commands, Py_BuildValue("(ssLdL)", c->operation, c->command,
                                                (long long)c->calls, seconds, (long long)c->bytes));
    }
    for (size_t i = 0; !failed && i < found.build_count; i++) {
        const pl_cl_build_time *b = &found.builds[i];
        PyObject *log = b->log ? PyUnicode_DecodeUTF8(b->log, (Py_ssize_t)strlen(b->log), "replace")
                               : Py_NewRef(Py_None);
        failed = !log || append(builds, Py_BuildValue("(ssOdN)", b->program, b->options,
                                                      b->cached ? Py_True : Py_False,
                                                      1e-9 * (double)b->nanoseconds, log));
    }
    PyObject *all =
        failed ? NULL : Py_BuildValue("(OOd)", commands, builds, 1e-9 * (double)found.span);
    Py_XDECREF(commands);
    Py_XDECREF(builds);
    pl_cl_profile_free(&found);
    return all;
}

PyMethodDef pl_device_functions[] = {
    {"opencl_devices", py_opencl_devices, METH_NOARGS,
     "(devices, reason): the OpenCL devices as dicts; why there are none, or None."},
    {"opencl_shape", py_opencl_shape, METH_VARARGS,
     "opencl_shape(group, width, block, without_fp64=False): forces the shape of kernels, 0 for "
     "the "
     "device's own, and forbids float64; for tests and benchmarks."},
    {"opencl_profile", py_opencl_profile, METH_VARARGS,
     "opencl_profile(on): keeps the times of builds, and of commands on devices opened from now.\n"
     "Returns what was kept and forgets it: [(operation, command, calls, seconds, bytes)], "
     "[(program, options, cached, seconds, remarks)], seconds from the first command to the last."},
    {"opencl_trim", py_opencl_trim, METH_NOARGS, "Returns cached device buffers to their drivers."},
    {NULL, NULL, 0, NULL}};
