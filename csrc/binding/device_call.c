/* Calls of operations whose arrays are in device memory: finds their device, checks the call by
 * stand-ins for the arrays, and enqueues it. */
#include "device_call.h"

#include <stdlib.h>

#include "../opencl/launch.h"
#include "check.h"
#include "device_array.h"
#include "device_error.h"
#include "profile.h"

int pl_is_device_call(PyObject *const *args, Py_ssize_t nargs) {
    for (Py_ssize_t i = 0; i < nargs; i++)
        if (pl_device_array_of(args[i])) return 1;
    return 0;
}

/* ---- the device of a call */

typedef struct {
    const pl_spec *spec;
    pl_cl_device *device;
    const char *on_device, *on_host; /* names of the first such arguments; NULL: none yet */
} call_arrays;

/* Adds the arrays of an argument, a weight's included; -1 with ValueError set where they are on
 * another device than those before. */
static int add_arrays(call_arrays *found, const char *name, PyObject *object) {
    if (PyTuple_Check(object)) {
        for (Py_ssize_t i = 0; i < PyTuple_Size(object); i++)
            if (add_arrays(found, name, PyTuple_GetItem(object, i))) return -1;
        return 0;
    }
    if (PyArray_Check(object) && !found->on_host) found->on_host = name;
    const pl_device_array *array = pl_device_array_of(object);
    if (!array) return 0;
    pl_cl_device *device = array->buffer->device;
    if (!found->device) {
        found->device = device;
        found->on_device = name;
    }
    if (found->device == device) return 0;
    if (found->device->index == device->index)
        PyErr_Format(PyExc_ValueError,
                     "%s: %s and %s are on opencl:%d in different OpenCL contexts or queues",
                     found->spec->name, found->on_device, name, device->index);
    else
        PyErr_Format(PyExc_ValueError,
                     "%s: %s is on opencl:%d and %s on opencl:%d; move one with pyloss.to_device",
                     found->spec->name, found->on_device, found->device->index, name,
                     device->index);
    return -1;
}

/* The one device and context of all arrays; NULL with an exception set where there are several. */
static pl_cl_device *common_device(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs) {
    call_arrays found = {.spec = spec};
    for (Py_ssize_t i = 0; i < nargs; i++)
        if (add_arrays(&found, spec->param[i].name, args[i])) return NULL;
    if (!found.on_host) return found.device;
    PyErr_Format(
        PyExc_TypeError,
        "%s: %s is on opencl:%d and %s in host memory; move one with pyloss.to_device or .numpy()",
        spec->name, found.on_device, found.device->index, found.on_host);
    return NULL;
}

/* ---- the check */

static int add_weight_buffer(pl_cl_operation *operation, pl_cl_buffer *buffer) {
    for (int i = operation->weight_buffer_count; i--;)
        if (operation->weight_buffers[i] == buffer) return 0;
    const int count = operation->weight_buffer_count;
    if (!(count & (count - 1))) { /* full: the room is a power of two */
        const size_t room = count ? 2 * (size_t)count : 1;
        void *grown = realloc(operation->weight_buffers, sizeof *operation->weight_buffers * room);
        if (!grown) {
            PyErr_NoMemory();
            return -1;
        }
        operation->weight_buffers = grown;
    }
    operation->weight_buffers[operation->weight_buffer_count++] = buffer;
    return 0;
}

/* An ndarray for the check in place of a device array: of its type and shape, at its virtual
 * address, which is never read. Indices are checked by their values, so they are copied to the
 * host. Tuples (weights) are copied with their arrays replaced; their buffers go to the
 * operation. */
static PyObject *stand_in(const pl_param *p, PyObject *object, pl_cl_operation *operation) {
    if (PyTuple_Check(object)) {
        PyObject *copy = PyTuple_New(PyTuple_Size(object));
        for (Py_ssize_t i = 0; copy && i < PyTuple_Size(object); i++) {
            PyObject *item = stand_in(p, PyTuple_GetItem(object, i), operation);
            if (!item || PyTuple_SetItem(copy, i, item)) Py_CLEAR(copy);
        }
        return copy;
    }
    pl_device_array *a = pl_device_array_of(object);
    if (!a) return Py_NewRef(object);
    if (p->index_limit || p->offsets_end) return pl_device_array_values(a);
    const int weight = p->type == PL_T_WEIGHT || p->type == PL_T_STACK;
    if (weight && add_weight_buffer(operation, a->buffer)) return NULL;
    void *address = (void *)(uintptr_t)(a->buffer->address + a->offset);
    return PyArray_SimpleNewFromData(a->ndim, a->dims, pl_device_array_npy(a), address);
}

/* Refuses an output at the place of an input, where ops.def allows it on the host alone. */
static int check_in_place(const pl_spec *spec, const pl_cl_place *place) {
    for (int i = 0; i < spec->count; i++) {
        const pl_param *output = &spec->param[i];
        if (!output->output || output->in_place_on_devices || !place[i].buffer) continue;
        for (int j = 0; j < spec->count; j++)
            if (!spec->param[j].output && place[j].buffer == place[i].buffer &&
                place[j].offset == place[i].offset) {
                PyErr_Format(PyExc_ValueError,
                             "%s: %s overlaps %s; on a device a result needs memory of its own",
                             spec->name, output->name, spec->param[j].name);
                return -1;
            }
    }
    return 0;
}

/* Fills the operation and its call; the stand-ins must live as long as the call. */
static int check_operation(const pl_spec *spec, PyObject *const *args, pl_cl_operation *operation,
                           PyObject **stand_ins, pl_call *call) {
    for (int i = 0; i < spec->count; i++) {
        if (!(stand_ins[i] = stand_in(&spec->param[i], args[i], operation))) return -1;
        const pl_device_array *a = pl_device_array_of(args[i]);
        if (a) operation->place[i] = (pl_cl_place){a->buffer, a->offset};
    }
    if (check_in_place(spec, operation->place)) return -1;
    return pl_check_call(spec, stand_ins, spec->count, call, NULL);
}

/* ---- the call */

static int enqueue(int op, const pl_spec *spec, pl_cl_operation *operation) {
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_run(op, operation) ||
             (pl_profile_is_on() && pl_cl_finish(operation->device, operation->error));
    Py_END_ALLOW_THREADS
    for (int i = 0; i < spec->count; i++)
        if (spec->param[i].output && operation->place[i].buffer)
            __atomic_add_fetch(&operation->place[i].buffer->writes, 1, __ATOMIC_RELAXED);
    if (!failed) return 0;
    pl_raise_device_error(operation->error, spec->name, operation->device->index);
    return -1;
}

PyObject *pl_device_call(int op, const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != spec->count) {
        pl_refuse_count(spec, nargs);
        return NULL;
    }
    pl_cl_device *device = common_device(spec, args, nargs);
    if (!device) return NULL;
    PyObject *stand_ins[PL_MAX_ARGS] = {NULL};
    pl_call call;
    pl_cl_error error;
    pl_cl_operation operation = {
        .name = spec->name, .device = device, .call = &call, .error = &error};
    int failed = check_operation(spec, args, &operation, stand_ins, &call);
    if (!failed) {
        failed = enqueue(op, spec, &operation);
        pl_release_call(spec, &call);
    }
    for (int i = 0; i < spec->count; i++) Py_XDECREF(stand_ins[i]);
    free(operation.weight_buffers);
    if (failed) return NULL;
    const char *complaint = pl_cl_cache_complaint();
    if (complaint && PyErr_WarnEx(PyExc_RuntimeWarning, complaint, 1)) return NULL;
    Py_RETURN_NONE;
}
