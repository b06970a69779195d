/* The type _core.DeviceArray: its making, copies to and from the host, and attributes. */
#include "device_array.h"

#include <string.h>

#include "device_error.h"
#include "numbers.h"
#include "profile.h"

/* Element types, by their names in Python. */
static const struct {
    const char *name;
    int npy;
    size_t bytes;
} types[] = {{"f32", NPY_FLOAT32, 4}, {"f64", NPY_FLOAT64, 8}, {"f16", NPY_FLOAT16, 2},
             {"bf16", NPY_UINT16, 2}, {"i32", NPY_INT32, 4},   {"i64", NPY_INT64, 8},
             {"i16", NPY_INT16, 2},   {"i8", NPY_INT8, 1},     {"u8", NPY_UINT8, 1},
             {"u16", NPY_INT16, 2},   {"u32", NPY_UINT32, 4},  {"u64", NPY_UINT64, 8},
             {"bool", NPY_BOOL, 1}};
enum { TYPES = sizeof types / sizeof *types };
static const double MOST_BYTES = 1e18;

static PyTypeObject *array_type;

pl_device_array *pl_device_array_of(PyObject *object) {
    return PyObject_TypeCheck(object, array_type) ? (pl_device_array *)object : NULL;
}

int pl_device_array_npy(const pl_device_array *a) { return types[a->type].npy; }

/* ---- making */

/* Sets type, shape and bytes; -1 with an exception set. */
static int set_shape(pl_device_array *a, PyObject *shape, const char *type) {
    while (a->type < TYPES && strcmp(types[a->type].name, type)) a->type++;
    if (a->type == TYPES) {
        PyErr_Format(PyExc_ValueError, "DeviceArray: there is no element type '%s'", type);
        return -1;
    }
    const Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > PL_DEVICE_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "DeviceArray: at most %d dimensions, got %zd",
                     (int)PL_DEVICE_MAX_NDIM, ndim);
        return -1;
    }
    a->ndim = (int)ndim;
    int64_t items = 1;
    double bytes = (double)types[a->type].bytes;
    for (int i = 0; i < a->ndim; i++) {
        int64_t n;
        if (pl_whole("DeviceArray", "a size of the shape", PyTuple_GetItem(shape, i), 0, INT64_MAX,
                     &n))
            return -1;
        a->dims[i] = (npy_intp)n;
        bytes *= (double)n;
    }
    if (bytes > MOST_BYTES) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < a->ndim; i++) items *= a->dims[i];
    a->bytes = (size_t)items * types[a->type].bytes;
    return 0;
}

/* Takes another library's memory: handles of context, queue and buffer, the array's offset in the
 * buffer, and the buffer's size. */
static int adopt(pl_device_array *a, PyObject *handles) {
    PyObject *given[5];
    int64_t number[5];
    if (!PyArg_ParseTuple(handles, "OOOOO", &given[0], &given[1], &given[2], &given[3], &given[4]))
        return -1;
    for (int i = 0; i < 5; i++)
        if (pl_whole("DeviceArray", "a handle", given[i], i < 3 ? INT64_MIN : 0, INT64_MAX,
                     &number[i]))
            return -1;
    const cl_context context = (cl_context)(intptr_t)number[0];
    const cl_command_queue queue = (cl_command_queue)(intptr_t)number[1];
    const cl_mem memory = (cl_mem)(intptr_t)number[2];
    const int64_t offset = number[3], size = number[4];
    if (size < offset || (size_t)(size - offset) < a->bytes) {
        PyErr_Format(
            PyExc_ValueError,
            "DeviceArray: an array of %zu bytes at offset %lld does not fit in a buffer of "
            "%lld bytes",
            a->bytes, (long long)offset, (long long)size);
        return -1;
    }
    pl_cl_error error;
    pl_cl_device *device = pl_cl_device_of(context, queue, &error);
    a->buffer = device ? pl_cl_buffer_of(device, memory, (size_t)size, &error) : NULL;
    a->offset = (size_t)offset;
    if (a->buffer) return 0;
    pl_raise_device_error(&error, "taking an array", device ? device->index : -1);
    return -1;
}

static int allocate(pl_device_array *a, pl_cl_device *device) {
    pl_cl_error error;
    Py_BEGIN_ALLOW_THREADS
    a->buffer = pl_cl_buffer_new(device, a->bytes, &error);
    Py_END_ALLOW_THREADS
    if (a->buffer) return 0;
    pl_raise_device_error(&error, "allocating an array", device->index);
    return -1;
}

static int open_and_allocate(pl_device_array *a, int index) {
    pl_cl_error error;
    pl_cl_device *device;
    Py_BEGIN_ALLOW_THREADS
    device = pl_cl_device_at(index, &error);
    Py_END_ALLOW_THREADS
    if (device) return allocate(a, device);
    pl_raise_device_error(&error, "opening a device", -1);
    return -1;
}

static pl_device_array *new_array(PyTypeObject *type) {
    return (pl_device_array *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

/* The array; NULL where its making failed, and the array is gone. */
static PyObject *made(pl_device_array *a, int failed) {
    if (!failed) return (PyObject *)a;
    Py_DECREF(a);
    return NULL;
}

static PyObject *array_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    (void)keywords;
    PyObject *where, *shape;
    const char *kind;
    if (!PyArg_ParseTuple(args, "OO!s", &where, &PyTuple_Type, &shape, &kind)) return NULL;
    pl_device_array *a = new_array(type);
    if (!a) return NULL;
    if (set_shape(a, shape, kind)) return made(a, 1);
    if (PyTuple_Check(where)) return made(a, adopt(a, where));
    int64_t index;
    return made(a, pl_whole("DeviceArray", "the device's number", where, 0, INT32_MAX, &index) ||
                       open_and_allocate(a, (int)index));
}

static PyObject *array_fresh(PyObject *self, PyObject *args) {
    PyObject *shape;
    const char *kind;
    if (!PyArg_ParseTuple(args, "O!s", &PyTuple_Type, &shape, &kind)) return NULL;
    pl_device_array *a = new_array(Py_TYPE(self));
    if (!a) return NULL;
    pl_cl_device *device = ((pl_device_array *)self)->buffer->device;
    return made(a, set_shape(a, shape, kind) || allocate(a, device));
}

static PyObject *array_part(PyObject *self, PyObject *args) {
    const pl_device_array *base = (pl_device_array *)self;
    PyObject *shape, *given_offset;
    int64_t offset;
    if (!PyArg_ParseTuple(args, "O!O", &PyTuple_Type, &shape, &given_offset)) return NULL;
    if (pl_whole("part", "the offset", given_offset, 0, INT64_MAX, &offset)) return NULL;
    pl_device_array *a = new_array(Py_TYPE(self));
    if (!a) return NULL;
    if (set_shape(a, shape, types[base->type].name)) return made(a, 1);
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
    pl_device_array *a = (pl_device_array *)self;
    PyTypeObject *type = Py_TYPE(self);
    pl_cl_buffer_release(a->buffer);
    Py_CLEAR(a->host);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* ---- copies */

/* A C-contiguous ndarray with the array's number of bytes. */
static PyArrayObject *host_array(const pl_device_array *a, PyObject *object,
                                 const char *operation) {
    if (!PyArray_Check(object) || !PyArray_ISCARRAY_RO((PyArrayObject *)object) ||
        (size_t)PyArray_NBYTES((PyArrayObject *)object) != a->bytes) {
        PyErr_Format(PyExc_ValueError, "%s: needs a C-contiguous numpy.ndarray of %zu bytes",
                     operation, a->bytes);
        return NULL;
    }
    return (PyArrayObject *)object;
}

static PyObject *array_write(PyObject *self, PyObject *object) {
    pl_device_array *a = (pl_device_array *)self;
    const int64_t begin = pl_profile_begin();
    PyArrayObject *from = host_array(a, object, "write");
    if (!from) return NULL;
    PyObject *host = NULL;
    if (types[a->type].npy == NPY_INT32 && !(host = PyArray_NewCopy(from, NPY_CORDER))) return NULL;
    pl_cl_error error;
    int failed;
    const void *data = PyArray_DATA(from);
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_write(a->buffer, a->offset, data, a->bytes, &error);
    Py_END_ALLOW_THREADS
    Py_CLEAR(a->host);
    if (failed) {
        Py_XDECREF(host);
        pl_raise_device_error(&error, "copying to the device", a->buffer->device->index);
        return NULL;
    }
    a->host = host;
    a->host_writes = a->buffer->writes;
    pl_profile_end(PL_PROFILE_TO_DEVICES, begin, (int64_t)a->bytes);
    Py_RETURN_NONE;
}

static int copy_to_host(pl_device_array *a, void *to) {
    const int64_t begin = pl_profile_begin();
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_read(a->buffer, a->offset, to, a->bytes, &error);
    Py_END_ALLOW_THREADS
    if (failed) {
        pl_raise_device_error(&error, "copying from the device", a->buffer->device->index);
        return -1;
    }
    pl_profile_end(PL_PROFILE_FROM_DEVICES, begin, (int64_t)a->bytes);
    return 0;
}

PyObject *pl_device_array_values(pl_device_array *a) {
    if (!a->host || a->host_writes != a->buffer->writes || a->buffer->foreign) {
        PyObject *copy = PyArray_SimpleNew(a->ndim, a->dims, types[a->type].npy);
        if (!copy || copy_to_host(a, PyArray_DATA((PyArrayObject *)copy))) {
            Py_XDECREF(copy);
            return NULL;
        }
        Py_XDECREF(a->host);
        a->host = copy;
        a->host_writes = a->buffer->writes;
    }
    return Py_NewRef(a->host);
}

static PyObject *array_read(PyObject *self, PyObject *object) {
    pl_device_array *a = (pl_device_array *)self;
    PyArrayObject *to = host_array(a, object, "read");
    if (!to) return NULL;
    if (!PyArray_ISWRITEABLE(to))
        return PyErr_Format(PyExc_ValueError, "read: the numpy.ndarray is read-only");
    if (types[a->type].npy == NPY_INT32) {
        PyObject *values = pl_device_array_values(a);
        if (!values) return NULL;
        memcpy(PyArray_DATA(to), PyArray_DATA((PyArrayObject *)values), a->bytes);
        Py_DECREF(values);
    } else if (copy_to_host(a, PyArray_DATA(to))) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Bytes that overlap without being the same ones cannot be copied in place. */
static int apart(const pl_device_array *a, const pl_device_array *b) {
    return a->buffer != b->buffer || a->offset + a->bytes <= b->offset ||
           b->offset + b->bytes <= a->offset;
}

static PyObject *array_assign(PyObject *self, PyObject *object) {
    pl_device_array *a = (pl_device_array *)self;
    const pl_device_array *from = pl_device_array_of(object);
    if (!from || from->buffer->device != a->buffer->device || from->type != a->type ||
        from->bytes != a->bytes)
        return PyErr_Format(PyExc_ValueError,
                            "assign: needs a DeviceArray of the same device, type and size");
    if (from->buffer == a->buffer && from->offset == a->offset) Py_RETURN_NONE;
    if (!apart(a, from))
        return PyErr_Format(PyExc_ValueError, "assign: the arrays overlap; copy one of them");
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_copy(from->buffer, from->offset, a->buffer, a->offset, a->bytes, &error);
    Py_END_ALLOW_THREADS
    Py_CLEAR(a->host);
    if (failed) {
        pl_raise_device_error(&error, "copying an array", a->buffer->device->index);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *array_clear(PyObject *self, PyObject *unused) {
    (void)unused;
    pl_device_array *a = (pl_device_array *)self;
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_clear(a->buffer, a->offset, a->bytes, &error);
    Py_END_ALLOW_THREADS
    Py_CLEAR(a->host);
    if (failed) {
        pl_raise_device_error(&error, "clearing an array", a->buffer->device->index);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *array_wait(PyObject *self, PyObject *unused) {
    (void)unused;
    pl_cl_device *device = ((pl_device_array *)self)->buffer->device;
    pl_cl_error error;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pl_cl_finish(device, &error);
    Py_END_ALLOW_THREADS
    if (failed) {
        pl_raise_device_error(&error, "waiting", device->index);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- attributes */

static PyObject *get_shape(PyObject *self, void *unused) {
    (void)unused;
    const pl_device_array *a = (pl_device_array *)self;
    PyObject *shape = PyTuple_New(a->ndim);
    for (int i = 0; shape && i < a->ndim; i++) {
        PyObject *n = PyLong_FromSsize_t(a->dims[i]);
        if (!n || PyTuple_SetItem(shape, i, n)) Py_CLEAR(shape);
    }
    return shape;
}
static PyObject *get_kind(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(types[((pl_device_array *)self)->type].name);
}
static PyObject *get_nbytes(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(((pl_device_array *)self)->bytes);
}
static PyObject *get_index(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(((pl_device_array *)self)->buffer->device->index);
}
static PyObject *get_place(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((pl_device_array *)self)->buffer->device);
}
static PyObject *get_own(PyObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(((pl_device_array *)self)->buffer->device->own);
}
static PyObject *get_handles(PyObject *self, void *unused) {
    (void)unused;
    const pl_device_array *a = (pl_device_array *)self;
    const pl_cl_device *device = a->buffer->device;
    return Py_BuildValue("(nnnnn)", (Py_ssize_t)device->context, (Py_ssize_t)device->queue,
                         (Py_ssize_t)a->buffer->memory, (Py_ssize_t)a->offset,
                         (Py_ssize_t)a->buffer->bytes);
}

static PyMethodDef array_methods[] = {
    {"write", array_write, METH_O,
     "Copies a C-contiguous ndarray with the same number of bytes to the device."},
    {"read", array_read, METH_O,
     "Copies the elements to a C-contiguous ndarray with the same number of bytes."},
    {"assign", array_assign, METH_O,
     "Copies the elements of a DeviceArray of the same device, type and size."},
    {"clear", array_clear, METH_NOARGS, "Sets all elements to 0."},
    {"fresh", array_fresh, METH_VARARGS,
     "fresh(shape, kind): a new array on the same device, in the same context."},
    {"part", array_part, METH_VARARGS,
     "part(shape, offset): a view of the array's bytes from `offset` on."},
    {"wait", array_wait, METH_NOARGS, "Returns when the device has finished all of its work."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef array_attributes[] = {
    {"shape", get_shape, NULL, "Sizes of the axes.", NULL},
    {"kind", get_kind, NULL, "Name of the element type, as in csrc/ops.def.", NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL},
    {"index", get_index, NULL, "Number of the device.", NULL},
    {"place", get_place, NULL, "A number that arrays of one context and queue share.", NULL},
    {"own", get_own, NULL, "Whether pyloss made the context.", NULL},
    {"handles", get_handles, NULL,
     "Handles of context, queue and buffer, the offset in the buffer, and the buffer's size.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot array_slots[] = {
    {Py_tp_doc, "DeviceArray(where, shape, kind): where is a device's number, or handles."},
    {Py_tp_new, array_new},
    {Py_tp_dealloc, array_dealloc},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_attributes},
    {0, NULL}};
static PyType_Spec array_spec = {"pyloss._core.DeviceArray", sizeof(pl_device_array), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, array_slots};

int pl_device_array_init(PyObject *module) {
    PyObject *type = PyType_FromSpec(&array_spec);
    if (!type) return -1;
    array_type = (PyTypeObject *)type; /* kept for the life of the process */
    if (!PyModule_AddObject(module, "DeviceArray", Py_NewRef(type))) return 0;
    Py_DECREF(type);
    return -1;
}
