/* _core.encode: the encoders of stored formats, for checked arrays. */
#include "encode.h"

#include "numpy_api.h"
#include "numbers.h"

/* The data of a C-contiguous array of `size` items, or NULL with an exception set; None gives NULL
 * where `optional`. */
static int take(PyObject *object, const char *name, int npy, npy_intp size, int optional,
                void **data) {
    *data = NULL;
    if (optional && object == Py_None) return 0;
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != npy || !PyArray_ISCARRAY_RO(array) ||
        PyArray_SIZE(array) != size) {
        PyErr_Format(PyExc_ValueError, "encode: %s must be a C-contiguous %s array of %lld values",
                     name, npy == NPY_UINT8 ? "uint8" : "float32", (long long)size);
        return -1;
    }
    *data = PyArray_DATA(array);
    return 0;
}

static PyObject *py_encode(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *number, *x, *importance, *like;
    if (!PyArg_ParseTuple(args, "OOOO", &number, &x, &importance, &like)) return NULL;
    int64_t format;
    if (pl_whole("encode", "the format", number, 0, PL_W_COUNT - 1, &format)) return NULL;
    if (!pl_encodes((int)format))
        return PyErr_Format(PyExc_ValueError, "encode: %s has no encoder here",
                            pl_formats[format].name);
    if (!PyArray_Check(x) || PyArray_NDIM((PyArrayObject *)x) != 2)
        return PyErr_Format(PyExc_ValueError, "encode: x must be a matrix");
    const npy_intp rows = PyArray_DIM((PyArrayObject *)x, 0),
                   cols = PyArray_DIM((PyArrayObject *)x, 1),
                   blocks = cols / pl_block_elements((int)format);
    if (cols % pl_block_elements((int)format))
        return PyErr_Format(PyExc_ValueError, "encode: x has %lld columns, no whole blocks of %s",
                            (long long)cols, pl_formats[format].name);
    const npy_intp shape[2] = {rows, blocks * pl_block_bytes((int)format)};
    void *values, *weights, *scales;
    if (take(x, "x", NPY_FLOAT32, rows * cols, 0, &values) ||
        take(importance, "importance", NPY_FLOAT32, cols, 1, &weights) ||
        take(like, "like", NPY_UINT8, shape[0] * shape[1], 1, &scales))
        return NULL;
    PyObject *out = pl_new_array(2, shape, NPY_UINT8);
    if (!out) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    pl_enter_call();
    pl_encode((int)format, values, weights, rows, cols, scales, PyArray_DATA((PyArrayObject *)out));
    pl_leave_call();
    Py_END_ALLOW_THREADS;
    return out;
}

PyMethodDef pl_encode_functions[] = {
    {"encode", py_encode, METH_VARARGS,
     "encode(format, x, importance, like): the bytes of a float32 matrix in a format whose scales "
     "are searched for, uint8 [rows, row bytes].\n"
     "importance, float32 [columns] or None, weighs squared errors; like, the bytes of such a "
     "matrix or None, gives its scales."},
    {NULL, NULL, 0, NULL}};
