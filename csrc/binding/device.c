/* Device memory in Python: the type _core.DeviceArray (pyloss.device adds what users see of it), operations over such arrays, the
 * list of devices, and OpenCL's errors as exceptions. */
#include "device.h"

#include "../opencl/runtime.h"

#define NO_IMPORT_ARRAY
#define PY_ARRAY_UNIQUE_SYMBOL pyloss_array_api
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_NDIM = 32 };

/* Element types; `npy` is what the specification's checks take for it (bfloat16 goes as its bits). */
static const struct {
    const char *name;
    int npy;
    size_t bytes;
} kinds[] = {{"f32", NPY_FLOAT32, 4}, {"f64", NPY_FLOAT64, 8}, {"f16", NPY_FLOAT16, 2},
             {"bf16", NPY_UINT16, 2}, {"i32", NPY_INT32, 4},   {"i64", NPY_INT64, 8},
             {"i16", NPY_INT16, 2},   {"i8", NPY_INT8, 1},     {"u8", NPY_UINT8, 1},
             {"u16", NPY_INT16, 2},   {"u32", NPY_UINT32, 4},  {"u64", NPY_UINT64, 8},
             {"bool", NPY_BOOL, 1}};

typedef struct {
    PyObject_HEAD pl_cl_buffer *buffer;
    size_t offset, bytes;
    int kind, ndim;
    npy_intp dims[MAX_NDIM];
    PyObject *
        host; /* of index arrays: what was written, an ndarray, so that checking them needs no copy back */
    unsigned writes; /* of the buffer, when `host` was the same */
} device_array;

static PyTypeObject *array_type;

static int is_device_array(PyObject *object) { return PyObject_TypeCheck(object, array_type); }

/* ---- errors */

static void raise(pl_cl_error *error, const char *operation, int index) {
    char where[200] = "OpenCL";
    if (index >= 0)
        snprintf(where, sizeof where, "opencl:%d (%s)", index, pl_cl_info_at(index)->name);
    if (error->kind == PL_CL_NO_MEMORY) {
        PyErr_Format(PyExc_MemoryError, "%s on %s: %s", operation, where, error->text);
    } else {
        PyObject *module = PyImport_ImportModule("pyloss.errors"),
                 *type = module ? PyObject_GetAttrString(module, "DeviceError") : NULL;
        if (type)
            PyErr_Format(type, "%s on %s: %s%s%s", operation, where, error->text,
                         error->log ? "\n" : "", error->log ? error->log : "");
        Py_XDECREF(type);
        Py_XDECREF(module);
    }
    free(error->log);
    error->log = NULL;
}

/* ---- the type */

int64_t pl_device_bytes(PyObject *object) {
    return is_device_array(object) ? (int64_t)((device_array *)object)->bytes : 0;
}

static int64_t items(const device_array *a) {
    int64_t n = 1;
    for (int i = 0; i < a->ndim; i++) n *= a->dims[i];
    return n;
}

/* Fills kind, shape and bytes; -1 with an exception set. */
static int take_shape(device_array *a, PyObject *shape, const char *kind) {
    size_t count = sizeof kinds / sizeof *kinds, k = 0;
    while (k < count && strcmp(kinds[k].name, kind)) k++;
    if (k == count) {
        PyErr_Format(PyExc_ValueError, "DeviceArray: there is no element type '%s'", kind);
        return -1;
    }
    a->kind = (int)k;
    Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "DeviceArray: at most %d dimensions, got %zd", (int)MAX_NDIM,
                     ndim);
        return -1;
    }
    a->ndim = (int)ndim;
    double total = (double)kinds[k].bytes;
    for (int i = 0; i < a->ndim; i++) {
        int64_t n;
        if (pl_whole("DeviceArray", "a size of the shape", PyTuple_GetItem(shape, i), 0, INT64_MAX,
                     &n))
            return -1;
        a->dims[i] = (npy_intp)n;
        total *= (double)n;
    }
    if (total > 1e18) {
        PyErr_NoMemory();
        return -1;
    }
    a->bytes = (size_t)items(a) * kinds[k].bytes;
    return 0;
}

/* Over another library's memory: handles of context, queue and buffer, the offset in it, and its size. */
static int adopt(device_array *a, PyObject *handles) {
    PyObject *given[5];
    int64_t number[5]; /* context, queue, buffer, offset, size */
    if (!PyArg_ParseTuple(handles, "OOOOO", &given[0], &given[1], &given[2], &given[3], &given[4]))
        return -1;
    for (int i = 0; i < 5; i++)
        if (pl_whole("DeviceArray", "a handle", given[i], i < 3 ? INT64_MIN : 0, INT64_MAX,
                     &number[i]))
            return -1;
    const int64_t offset = number[3], size = number[4];
    if (size < offset || (size_t)(size - offset) < a->bytes) {
        PyErr_Format(PyExc_ValueError,
                     "DeviceArray: %lld bytes from %lld on do not hold the array's %zu",
                     (long long)size, (long long)offset, a->bytes);
        return -1;
    }
    pl_cl_error error;
    pl_cl_device *device = pl_cl_device_of((cl_context)(intptr_t)number[0],
                                           (cl_command_queue)(intptr_t)number[1], &error);
    a->buffer =
        device ? pl_cl_buffer_of(device, (cl_mem)(intptr_t)number[2], (size_t)size, &error) : NULL;
    a->offset = (size_t)offset;
    if (a->buffer) return 0;
    raise(&error, "taking an array", device ? device->index : -1);
    return -1;
}

static int allocate(device_array *a, pl_cl_device *device) {
    pl_cl_error error;
    Py_BEGIN_ALLOW_THREADS
    a->buffer = pl_cl_buffer_new(device, a->bytes, &error);
    Py_END_ALLOW_THREADS
    if (a->buffer) return 0;
    raise(&error, "allocating an array", device->index);
    return -1;
}

static int open_and_allocate(device_array *a, int index) {
    pl_cl_error error;
    pl_cl_device *device;
    Py_BEGIN_ALLOW_THREADS
    device = pl_cl_device_at(index, &error);
    Py_END_ALLOW_THREADS
    if (device) return allocate(a, device);
    raise(&error, "opening a device", -1);
    return -1;
}

static device_array *new_array(PyTypeObject *type) {
    return (device_array *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

static PyObject *made(device_array *a, int failed) {
    if (!failed) return (PyObject *)a;
    Py_DECREF(a);
    return NULL;
}

static PyObject *array_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    (void)keywords;
    PyObject *where, *shape;
    const char *kind;
    if (!PyArg_ParseTuple(args, "OO!s", &where, &PyTuple_Type, &shape, &kind)) return NULL;
    device_array *a = new_array(type);
    if (!a) return NULL;
    if (take_shape(a, shape, kind)) return made(a, 1);
    if (PyTuple_Check(where)) return made(a, adopt(a, where));
    int64_t index;
    return made(a, pl_whole("DeviceArray", "the device's number", where, 0, INT32_MAX, &index) ||
                       open_and_allocate(a, (int)index));
}

static PyObject *array_fresh(PyObject *self, PyObject *args) {
    PyObject *shape;
    const char *kind;
    if (!PyArg_ParseTuple(args, "O!s", &PyTuple_Type, &shape, &kind)) return NULL;
    device_array *a = new_array(Py_TYPE(self));
    if (!a) return NULL;
    return made(a,
                take_shape(a, shape, kind) || allocate(a, ((device_array *)self)->buffer->device));
}

static PyObject *array_part(PyObject *self, PyObject *args) {
    const device_array *base = (device_array *)self;
    PyObject *shape, *place;
    int64_t offset;
    if (!PyArg_ParseTuple(args, "O!O", &PyTuple_Type, &shape, &place)) return NULL;
    if (pl_whole("part", "the offset", place, 0, INT64_MAX, &offset)) return NULL;
    device_array *a = new_array(Py_TYPE(self));
    if (!a || take_shape(a, shape, kinds[base->kind].name)) return a ? made(a, 1) : NULL;
    if ((size_t)offset > base->bytes || a->bytes > base->bytes - (size_t)offset) {
        PyErr_SetString(PyExc_ValueError, "DeviceArray: a part must lie within the array");
        return made(a, 1);
    }
    a->buffer = base->buffer;
    a->offset = base->offset + (size_t)offset;
    __atomic_add_fetch(&a->buffer->references, 1, __ATOMIC_RELAXED);
    return (PyObject *)a;
}

static void array_dealloc(PyObject *self) {
    device_array *a = (device_array *)self;
    PyTypeObject *type = Py_TYPE(self);
    pl_cl_buffer_release(a->buffer);
    Py_CLEAR(a->host);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* A C-contiguous ndarray of as many bytes. */
static PyArrayObject *same_bytes(device_array *a, PyObject *object, const char *operation) {
    if (!PyArray_Check(object) || !PyArray_ISCARRAY_RO((PyArrayObject *)object) ||
        (size_t)PyArray_NBYTES((PyArrayObject *)object) != a->bytes) {
        PyErr_Format(PyExc_ValueError, "%s: needs a C-contiguous numpy.ndarray of %zu bytes",
                     operation, a->bytes);
        return NULL;
    }
    return (PyArrayObject *)object;
}

static PyObject *array_write(PyObject *self, PyObject *object) {
    device_array *a = (device_array *)self;
    int64_t begin = pl_profile_begin();
    PyArrayObject *from = same_bytes(a, object, "write");
    if (!from) return NULL;
    PyObject *host = NULL;
    if (kinds[a->kind].npy == NPY_INT32 && !(host = PyArray_NewCopy(from, NPY_CORDER))) return NULL;
    pl_cl_error error;
    int failed;
    const void *data = PyArray_DATA(from);
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_write(a->buffer, a->offset, data, a->bytes, &error);
    Py_END_ALLOW_THREADS
    Py_CLEAR(a->host);
    if (failed) {
        Py_XDECREF(host);
        raise(&error, "copying to the device", a->buffer->device->index);
        return NULL;
    }
    a->host = host;
    a->writes = a->buffer->writes;
    pl_profile_end(&pl_copied_to_devices, begin, (int64_t)a->bytes);
    Py_RETURN_NONE;
}

static int copy_back(device_array *a, void *to) {
    int64_t begin = pl_profile_begin();
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_read(a->buffer, a->offset, to, a->bytes, &error);
    Py_END_ALLOW_THREADS
    if (failed) {
        raise(&error, "copying from the device", a->buffer->device->index);
        return -1;
    }
    pl_profile_end(&pl_copied_from_devices, begin, (int64_t)a->bytes);
    return 0;
}

/* The elements of an index array on the host: copied back if they are not known there. */
static PyObject *index_values(device_array *a) {
    if (!a->host || a->writes != a->buffer->writes || a->buffer->foreign) {
        PyObject *copy = PyArray_SimpleNew(a->ndim, a->dims, kinds[a->kind].npy);
        if (!copy || copy_back(a, PyArray_DATA((PyArrayObject *)copy))) {
            Py_XDECREF(copy);
            return NULL;
        }
        Py_XDECREF(a->host);
        a->host = copy;
        a->writes = a->buffer->writes;
    }
    return Py_NewRef(a->host);
}

static PyObject *array_read(PyObject *self, PyObject *object) {
    device_array *a = (device_array *)self;
    PyArrayObject *to = same_bytes(a, object, "read");
    if (!to) return NULL;
    if (!PyArray_ISWRITEABLE(to))
        return PyErr_Format(PyExc_ValueError, "read: the numpy.ndarray is read-only");
    if (kinds[a->kind].npy == NPY_INT32) {
        PyObject *values = index_values(a);
        if (!values) return NULL;
        memcpy(PyArray_DATA(to), PyArray_DATA((PyArrayObject *)values), a->bytes);
        Py_DECREF(values);
    } else if (copy_back(a, PyArray_DATA(to))) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *array_clear(PyObject *self, PyObject *unused) {
    (void)unused;
    device_array *a = (device_array *)self;
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_clear(a->buffer, a->offset, a->bytes, &error);
    Py_END_ALLOW_THREADS
    Py_CLEAR(a->host);
    if (failed) {
        raise(&error, "clearing an array", a->buffer->device->index);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *array_wait(PyObject *self, PyObject *unused) {
    (void)unused;
    pl_cl_device *device = ((device_array *)self)->buffer->device;
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_finish(device, &error);
    Py_END_ALLOW_THREADS
    if (failed) {
        raise(&error, "waiting", device->index);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *get_shape(PyObject *self, void *unused) {
    (void)unused;
    device_array *a = (device_array *)self;
    PyObject *shape = PyTuple_New(a->ndim);
    for (int i = 0; shape && i < a->ndim; i++) {
        PyObject *n = PyLong_FromSsize_t(a->dims[i]);
        if (!n || PyTuple_SetItem(shape, i, n)) Py_CLEAR(shape);
    }
    return shape;
}
static PyObject *get_kind(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(kinds[((device_array *)self)->kind].name);
}
static PyObject *get_nbytes(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(((device_array *)self)->bytes);
}
static PyObject *get_index(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(((device_array *)self)->buffer->device->index);
}
static PyObject *get_place(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((device_array *)self)->buffer->device);
}
static PyObject *get_own(PyObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(((device_array *)self)->buffer->device->own);
}
static PyObject *get_handles(PyObject *self, void *unused) {
    (void)unused;
    device_array *a = (device_array *)self;
    const pl_cl_device *device = a->buffer->device;
    return Py_BuildValue("(nnnnn)", (Py_ssize_t)device->context, (Py_ssize_t)device->queue,
                         (Py_ssize_t)a->buffer->memory, (Py_ssize_t)a->offset,
                         (Py_ssize_t)a->buffer->bytes);
}

static PyMethodDef array_methods[] = {
    {"write", array_write, METH_O, "Copies a C-contiguous ndarray of as many bytes here."},
    {"read", array_read, METH_O, "Copies the elements to a C-contiguous ndarray of as many bytes."},
    {"clear", array_clear, METH_NOARGS, "Makes all elements 0."},
    {"fresh", array_fresh, METH_VARARGS,
     "fresh(shape, kind): a new array in memory of the same device and context."},
    {"part", array_part, METH_VARARGS,
     "part(shape, offset): an array over its bytes from `offset` on."},
    {"wait", array_wait, METH_NOARGS, "Returns when the device has done all that was asked of it."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef array_attributes[] = {
    {"shape", get_shape, NULL, "The sizes along the axes.", NULL},
    {"kind", get_kind, NULL, "The element type, as the specification of operations names it.",
     NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL},
    {"index", get_index, NULL, "The number of the device.", NULL},
    {"place", get_place, NULL, "A number that arrays in one context and queue share.", NULL},
    {"own", get_own, NULL, "Whether its context is pyloss's own.", NULL},
    {"handles", get_handles, NULL,
     "Handles of context, queue and buffer, the offset in the buffer, and its size.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot array_slots[] = {
    {Py_tp_doc, "DeviceArray(where, shape, kind): where is a device's number, or handles."},
    {Py_tp_new, array_new},
    {Py_tp_dealloc, array_dealloc},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_attributes},
    {0, NULL}};
static PyType_Spec array_spec = {"pyloss._core.DeviceArray", sizeof(device_array), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, array_slots};

/* ---- operations */

int pl_device_call(PyObject *const *args, Py_ssize_t nargs) {
    for (Py_ssize_t i = 0; i < nargs; i++)
        if (is_device_array(args[i])) return 1;
    return 0;
}

/* The arrays of a call as they are found, tuples (weights) included, and the device that all of them live on. */
typedef struct {
    const pl_spec *spec;
    pl_cl_device *device;
    const char *first,
        *host; /* names of the first argument on a device, and of one in host memory */
} call_arrays;

/* -1 with an exception set where two arrays are in different places. */
static int find_arrays(call_arrays *found, const char *name, PyObject *object) {
    if (PyTuple_Check(object)) {
        for (Py_ssize_t i = 0; i < PyTuple_Size(object); i++)
            if (find_arrays(found, name, PyTuple_GetItem(object, i))) return -1;
        return 0;
    }
    if (PyArray_Check(object) && !found->host) found->host = name;
    if (!is_device_array(object)) return 0;
    pl_cl_device *device = found->device, *other = ((device_array *)object)->buffer->device;
    if (!device) {
        found->device = other;
        found->first = name;
    } else if (device != other) {
        if (device->index == other->index)
            PyErr_Format(PyExc_ValueError,
                         "%s: %s and %s are on opencl:%d in different OpenCL contexts or queues",
                         found->spec->name, found->first, name, device->index);
        else
            PyErr_Format(
                PyExc_ValueError,
                "%s: %s is on opencl:%d and %s on opencl:%d; move one with pyloss.to_device",
                found->spec->name, found->first, device->index, name, other->index);
        return -1;
    }
    return 0;
}

/* All arrays of a call live on one device, in one context; that device, or NULL with an exception set. */
static pl_cl_device *common_device(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs) {
    call_arrays found = {.spec = spec};
    for (Py_ssize_t i = 0; i < nargs && i < spec->count; i++)
        if (find_arrays(&found, spec->param[i].name, args[i])) return NULL;
    if (!found.host) return found.device;
    PyErr_Format(
        PyExc_TypeError,
        "%s: %s is on opencl:%d and %s in host memory; move one with pyloss.to_device or .numpy()",
        spec->name, found.first, found.device->index, found.host);
    return NULL;
}

static int add_part(pl_cl_operation *operation, pl_cl_buffer *buffer) {
    for (int i = operation->part_count; i--;)
        if (operation->parts[i] == buffer) return 0;
    int count = operation->part_count;
    if (!(count & (count - 1))) { /* at 0, 1, 2, 4, ... */
        void *grown =
            realloc(operation->parts, sizeof *operation->parts * (size_t)(count ? 2 * count : 1));
        if (!grown) {
            PyErr_NoMemory();
            return -1;
        }
        operation->parts = grown;
    }
    operation->parts[operation->part_count++] = buffer;
    return 0;
}

/* What the specification is checked with in place of a device array: an ndarray of its type and shape at a number that stands for
 * its place in device memory, which nobody reads; for index arrays their values. Of a weight, the same for each of its arrays,
 * whose buffers the operation notes. */
static PyObject *stand_in(const pl_param *p, PyObject *object, pl_cl_operation *operation) {
    if (PyTuple_Check(object)) {
        PyObject *parts = PyTuple_New(PyTuple_Size(object));
        for (Py_ssize_t i = 0; parts && i < PyTuple_Size(object); i++) {
            PyObject *part = stand_in(p, PyTuple_GetItem(object, i), operation);
            if (!part || PyTuple_SetItem(parts, i, part)) Py_CLEAR(parts);
        }
        return parts;
    }
    if (!is_device_array(object)) return Py_NewRef(object);
    device_array *a = (device_array *)object;
    if (p->below || p->offsets_to) return index_values(a);
    if ((p->type == PL_T_WEIGHT || p->type == PL_T_STACK) && add_part(operation, a->buffer))
        return NULL;
    void *place = (void *)(uintptr_t)(a->buffer->address + a->offset);
    return PyArray_SimpleNewFromData(a->ndim, a->dims, kinds[a->kind].npy, place);
}

/* A result that ops.def does not let a device write in place has memory of its own there. */
static int results_apart(const pl_spec *spec, const pl_cl_place *place, Py_ssize_t nargs) {
    for (Py_ssize_t i = 0; i < nargs; i++)
        for (Py_ssize_t j = 0; j < nargs && spec->param[i].output &&
                               !spec->param[i].in_place_on_devices && place[i].buffer;
             j++)
            if (!spec->param[j].output && place[j].buffer == place[i].buffer &&
                place[j].offset == place[i].offset) {
                PyErr_Format(PyExc_ValueError,
                             "%s: %s overlaps %s; on a device a result needs memory of its own",
                             spec->name, spec->param[i].name, spec->param[j].name);
                return 0;
            }
    return 1;
}

PyObject *pl_device_run(int op, const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != spec->count) {
        pl_spec_refuse_count(spec, nargs);
        return NULL;
    }
    pl_cl_device *device = common_device(spec, args, nargs);
    if (!device) return NULL;
    PyObject *checked[PL_MAX_ARGS] = {NULL};
    pl_call call;
    pl_cl_error error;
    pl_cl_operation operation = {.device = device, .call = &call, .error = &error};
    int good = 1, failed = 0;
    for (Py_ssize_t i = 0; i < nargs && good; i++) {
        checked[i] = stand_in(&spec->param[i], args[i], &operation);
        good = checked[i] != NULL;
        if (!is_device_array(args[i])) continue;
        device_array *a = (device_array *)args[i];
        operation.place[i] = (pl_cl_place){a->buffer, a->offset};
    }
    if (good && results_apart(spec, operation.place, nargs) &&
        !pl_spec_check(spec, checked, nargs, &call)) {
        Py_BEGIN_ALLOW_THREADS
        failed = pl_cl_run(op, &operation) || (pl_profiling && pl_cl_finish(device, &error));
        Py_END_ALLOW_THREADS
        pl_spec_release(spec, &call);
        for (Py_ssize_t i = 0; i < nargs; i++)
            if (spec->param[i].output && operation.place[i].buffer)
                __atomic_add_fetch(&operation.place[i].buffer->writes, 1, __ATOMIC_RELAXED);
    } else {
        good = 0;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) Py_XDECREF(checked[i]);
    free(operation.parts);
    if (!good) return NULL;
    if (failed) {
        raise(&error, spec->name, device->index);
        return NULL;
    }
    const char *complaint = pl_cl_cache_complaint();
    if (complaint && PyErr_WarnEx(PyExc_RuntimeWarning, complaint, 1)) return NULL;
    Py_RETURN_NONE;
}

/* ---- the module's functions */

static PyObject *py_devices(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    pl_cl_error error;
    int count, failed;
    const char *reason;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_open(&count, &reason, &error);
    Py_END_ALLOW_THREADS
    if (failed) {
        raise(&error, "listing devices", -1);
        return NULL;
    }
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < count; i++) {
        const pl_cl_info *d = pl_cl_info_at(i);
        const char *kind = d->kind & CL_DEVICE_TYPE_CPU           ? "cpu"
                           : d->kind & CL_DEVICE_TYPE_GPU         ? "gpu"
                           : d->kind & CL_DEVICE_TYPE_ACCELERATOR ? "accelerator"
                                                                  : "custom";
        PyObject *item = Py_BuildValue(
            "{s:s,s:s,s:s,s:s,s:s,s:L,s:L,s:L,s:n,s:n,s:O}", "name", d->name, "platform",
            d->platform_name, "vendor", d->vendor, "driver", d->driver, "kind", kind, "memory",
            (long long)d->global_memory, "max_allocation", (long long)d->max_allocation,
            "local_memory", (long long)d->local_memory, "max_group", (Py_ssize_t)d->max_group,
            "units", (Py_ssize_t)d->units, "fp64", d->fp64 ? Py_True : Py_False);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    if (!list) return NULL;
    return Py_BuildValue("(Nz)", list, reason);
}

static PyObject *py_shape(PyObject *self, PyObject *args) {
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

static PyMethodDef functions[] = {
    {"opencl_devices", py_devices, METH_NOARGS,
     "The OpenCL devices as dicts, and why there are none, or None."},
    {"opencl_shape", py_shape, METH_VARARGS,
     "opencl_shape(group, width, block, without_fp64=False): the shape of row kernels, 0 for the "
     "device's own, and whether to do "
     "without float64; for tests and benchmarks."},
    {"opencl_trim", py_opencl_trim, METH_NOARGS,
     "Gives kept device buffers back to their drivers."},
    {NULL, NULL, 0, NULL}};

int pl_device_init(PyObject *module) {
    PyObject *type = PyType_FromSpec(&array_spec);
    if (!type) return -1;
    array_type = (PyTypeObject *)type; /* kept for the life of the process */
    if (PyModule_AddObject(module, "DeviceArray", Py_NewRef(type))) {
        Py_DECREF(type);
        return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
