/* Checks array arguments: types, layouts, shapes. */
#include "arguments.h"

#include <stdio.h>
#include <string.h>

#include "numbers.h"

/* ---- types and layouts */

/* NumPy's names of types, for messages. */
static const char *dtype_name(int npy) {
    switch (npy) {
    case NPY_FLOAT32: return "float32";
    case NPY_FLOAT64: return "float64";
    case NPY_INT32: return "int32";
    case NPY_INT64: return "int64";
    case NPY_UINT8: return "uint8";
    case NPY_UINT16: return "uint16";
    default: return "?";
    }
}

static int npy_type(pl_type type, int wide) {
    switch (type) {
    case PL_T_F32:
    case PL_T_HALF:
    case PL_T_ACT: return NPY_FLOAT32; /* what a call makes unless it is told otherwise */
    case PL_T_F64: return NPY_FLOAT64;
    case PL_T_I32: return NPY_INT32;
    case PL_T_I64: return NPY_INT64;
    case PL_T_U8: return NPY_UINT8;
    case PL_T_ACC: return wide ? NPY_FLOAT64 : NPY_FLOAT32;
    default: return -1; /* not an array of one fixed type */
    }
}

int pl_float_type(PyObject *object) {
    if (!PyArray_Check(object)) return -1;
    switch (PyArray_TYPE((PyArrayObject *)object)) {
    case NPY_FLOAT32: return PL_F32;
    case NPY_FLOAT64: return PL_F64;
    case NPY_FLOAT16: return PL_F16;
    case NPY_UINT16: return PL_BF16;
    default: return -1;
    }
}

PyArrayObject *pl_plain_array(const pl_spec *spec, const pl_param *p, PyObject *object, int npy) {
    if (!PyArray_Check(object)) {
        pl_refuse_type(spec->name, p->name, "a numpy.ndarray", object);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) != npy) {
        PyErr_Format(PyExc_TypeError, "%s: %s must have dtype %s, not %S", spec->name, p->name,
                     dtype_name(npy), (PyObject *)PyArray_DESCR(array));
        return NULL;
    }
    if (!PyArray_ISCARRAY_RO(array)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: %s must be C-contiguous, aligned and in native byte order", spec->name,
                     p->name);
        return NULL;
    }
    if (p->output && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s: %s is read-only; an output must be writeable",
                     spec->name, p->name);
        return NULL;
    }
    return array;
}

/* ---- dimensions */

int pl_axis_of(const pl_check *c, char letter, const char **name) {
    const pl_param *p = &c->spec->param[c->bound_by[letter - 'A']];
    int axis = 0;
    while (axis < p->ndim - 1 && p->dim[axis].letter != letter) axis++;
    *name = p->name;
    return axis;
}

/* A new reference to the shape of an argument, for messages. A weight's handle and a stack of
 * handles have the shapes of their matrices. */
static PyObject *shape_of(PyObject *object) {
    if (!PyTuple_Check(object)) return PyObject_GetAttrString(object, "shape");
    PyObject *first = PyTuple_Size(object) ? PyTuple_GetItem(object, 0) : object;
    if (PyTuple_Check(first) && PyTuple_Size(first) > 3)
        return Py_BuildValue("(nOO)", PyTuple_Size(object), PyTuple_GetItem(first, 2),
                             PyTuple_GetItem(first, 3));
    if (PyTuple_Size(object) > 3) return PyTuple_GetSlice(object, 2, 4);
    return Py_NewRef(object);
}

/* Raises ValueError: argument `index` needs another size along an axis of the user's array; -1. */
static int refuse_size(const pl_check *c, int index, int axis, int64_t actual, int64_t expected,
                       char letter) {
    const pl_spec *spec = c->spec;
    const char *name = spec->param[index].name;
    const int other = letter ? c->bound_by[letter - 'A'] : index;
    PyObject *shape = shape_of(c->args[index]);
    PyObject *other_shape = shape ? shape_of(c->args[other]) : NULL;
    char allowed[64];
    if (axis < 0)
        snprintf(allowed, sizeof allowed, "its leading axes must make %lld rows",
                 (long long)expected);
    else snprintf(allowed, sizeof allowed, "its axis %d must be %lld", axis, (long long)expected);
    if (other_shape && other != index)
        PyErr_Format(PyExc_ValueError,
                     "%s: %s has shape %S; %s, not %lld, to go with %s of shape %S", spec->name,
                     name, shape, allowed, (long long)actual, spec->param[other].name, other_shape);
    else if (other_shape)
        PyErr_Format(PyExc_ValueError, "%s: %s has shape %S; %s, not %lld", spec->name, name, shape,
                     allowed, (long long)actual);
    Py_XDECREF(shape);
    Py_XDECREF(other_shape);
    return -1;
}

int pl_match_dim(pl_check *c, int index, int i, int axis, int64_t actual) {
    const pl_dim_spec *d = &c->spec->param[index].dim[i];
    if (d->letter) {
        const int letter = d->letter - 'A';
        if (!(c->bound >> letter & 1)) {
            const int64_t size = d->rule == '+' ? actual - 1 : d->rule == '/' ? 2 * actual : actual;
            c->call->dim[letter] = size < 0 ? 0 : size;
            c->bound |= 1u << letter;
            c->bound_by[letter] = index;
        }
        if (d->rule == '/' && c->call->dim[letter] % 2) {
            const char *name;
            const int odd_axis = pl_axis_of(c, d->letter, &name);
            PyErr_Format(PyExc_ValueError, "%s: axis %d of %s has size %lld; it must be even",
                         c->spec->name, odd_axis, name, (long long)c->call->dim[letter]);
            return -1;
        }
    }
    const int64_t expected = pl_dim_size(d, c->call);
    return actual == expected ? 0 : refuse_size(c, index, axis, actual, expected, d->letter);
}

/* ---- arguments */

/* The shape of an output whose dimensions are known; leading axes are those of the argument that
 * gave their letter its size. Its number of axes, or -1. */
static int shape_to_make(const pl_check *c, const pl_param *p, npy_intp *dims) {
    int ndim = 0;
    for (int i = 0; i < p->ndim; i++) {
        const pl_dim_spec *d = &p->dim[i];
        if (d->letter && !(c->bound >> (d->letter - 'A') & 1)) return -1;
        const int from = d->letter ? c->bound_by[d->letter - 'A'] : 0;
        const pl_param *other = &c->spec->param[from];
        if (d->rule != '*' || other->dim[0].rule != '*' || !PyArray_Check(c->args[from])) {
            dims[ndim++] = (npy_intp)pl_dim_size(d, c->call);
            continue;
        }
        PyArrayObject *array = (PyArrayObject *)c->args[from];
        const int leading = PyArray_NDIM(array) - other->ndim + 1;
        if (leading + p->ndim - 1 > 8) return -1;
        for (int k = 0; k < leading; k++) dims[ndim++] = PyArray_DIM(array, k);
    }
    return ndim;
}

int pl_make_output(pl_check *c, int index) {
    const pl_spec *spec = c->spec;
    const pl_param *p = &spec->param[index];
    const int accumulates = index == spec->count - 1 && pl_accumulates(spec, c->call);
    npy_intp dims[8 + PL_MAX_DIMS];
    const int npy =
        c->args[index] == Py_NotImplemented ? NPY_UINT16 : npy_type(p->type, c->call->wide);
    const int ndim = npy < 0 || !c->may_make ? -1 : shape_to_make(c, p, dims);
    if (ndim < 0 || p->updated || accumulates) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be given", spec->name, p->name);
        return -1;
    }
    PyObject *array = pl_new_array(ndim, dims, npy);
    if (!array) return -1;
    c->args[index] = array;
    return 0;
}

int pl_take_array(pl_check *c, int index) {
    const pl_spec *spec = c->spec;
    const pl_param *p = &spec->param[index];
    /* Kernels of devices, whose calls make no arrays, take float32 alone. */
    const int narrow =
        c->may_make && pl_may_be_narrow(p->type) && pl_float_type(c->args[index]) == PL_BF16;
    PyArrayObject *array = pl_plain_array(spec, p, c->args[index],
                                          narrow ? NPY_UINT16 : npy_type(p->type, c->call->wide));
    if (!array) return -1;
    const int ndim = PyArray_NDIM(array), leading = p->ndim > 0 && p->dim[0].rule == '*';
    if (leading ? ndim < p->ndim - 1 : ndim != p->ndim) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %d dimensions, expected %s%d", spec->name,
                     p->name, ndim, leading ? "at least " : "", leading ? p->ndim - 1 : p->ndim);
        return -1;
    }
    const int leading_axes = leading ? ndim - p->ndim + 1 : 0;
    if (leading) {
        int64_t rows = 1;
        for (int i = 0; i < leading_axes; i++) rows *= PyArray_DIM(array, i);
        if (pl_match_dim(c, index, 0, leading_axes == 1 ? 0 : -1, rows)) return -1;
    }
    for (int i = leading; i < p->ndim; i++) {
        const int axis = leading_axes + i - leading;
        if (pl_match_dim(c, index, i, axis, PyArray_DIM(array, axis))) return -1;
    }
    char *data = PyArray_DATA(array);
    if (p->type == PL_T_ACT) c->call->arg[index].act = (pl_act){data, narrow};
    else c->call->arg[index].out = data;
    c->call->narrow |= (uint32_t)narrow << index;
    c->extent[index] = (pl_extent){data, data + PyArray_NBYTES(array)};
    return 0;
}

/* Whether rows of a strided input can be read: elements of a row are contiguous and aligned. */
static int readable_rows(PyArrayObject *array) {
    const int last = PyArray_NDIM(array) - 1;
    return PyArray_ISALIGNED(array) && !PyArray_ISBYTESWAPPED(array) &&
           (!PyArray_SIZE(array) || last < 0 || PyArray_DIM(array, last) <= 1 ||
            PyArray_STRIDE(array, last) == PyArray_ITEMSIZE(array));
}

int pl_take_rows(pl_check *c, int index) {
    const pl_spec *spec = c->spec;
    const pl_param *p = &spec->param[index];
    PyObject *object = c->args[index];
    const int type = pl_float_type(object);
    if (type < 0) {
        if (!PyArray_Check(object))
            return pl_refuse_type(spec->name, p->name, "a numpy.ndarray", object);
        PyErr_Format(
            PyExc_TypeError,
            "%s: %s must have dtype float32, float64, float16, or uint16 for bfloat16, not %S",
            spec->name, p->name, (PyObject *)PyArray_DESCR((PyArrayObject *)object));
        return -1;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    const int ndim = PyArray_NDIM(array);
    if (p->output) {
        if (!pl_plain_array(spec, p, object, PyArray_TYPE(array))) return -1;
    } else if (!readable_rows(array)) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: %s must be contiguous along its last axis, aligned and in native byte order",
            spec->name, p->name);
        return -1;
    }
    if (ndim < 1 || (!p->output && ndim > 3)) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %d dimensions, expected 1 to 3", spec->name,
                     p->name, ndim);
        return -1;
    }
    int64_t count = 1;
    for (int i = 0; i < ndim - 1; i++) count *= PyArray_DIM(array, i);
    if (pl_match_dim(c, index, 0, ndim == 2 ? 0 : -1, count) ||
        pl_match_dim(c, index, 1, ndim - 1, PyArray_DIM(array, ndim - 1)))
        return -1;
    pl_rows *rows = &c->call->arg[index].rows;
    *rows = (pl_rows){.data = PyArray_DATA(array), .inner = 1, .type = (pl_float)type};
    const int64_t width = PyArray_DIM(array, ndim - 1) * PyArray_ITEMSIZE(array);
    if (p->output) {
        rows->outer_stride = width;
    } else if (ndim == 2) {
        rows->outer_stride = PyArray_STRIDE(array, 0);
    } else if (ndim == 3) {
        rows->outer_stride = PyArray_STRIDE(array, 0);
        rows->inner = PyArray_DIM(array, 1) ? PyArray_DIM(array, 1) : 1;
        rows->inner_stride = PyArray_STRIDE(array, 1);
    }
    if (PyArray_SIZE(array)) { /* strides may be negative */
        const int64_t outer = (count / rows->inner - 1) * rows->outer_stride,
                      inner = (rows->inner - 1) * rows->inner_stride;
        c->extent[index] = (pl_extent){
            rows->data + (outer < 0 ? outer : 0) + (inner < 0 ? inner : 0),
            rows->data + (outer > 0 ? outer : 0) + (inner > 0 ? inner : 0) + width,
        };
    }
    return 0;
}
