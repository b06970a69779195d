/* Checks weight arguments. A weight is a float32 matrix, or the handle of a pyloss.weights.Weight:
 * the tuple (bytes, format, rows, cols, head_dim), which ends with a tuple of groups where the
 * format keeps its scales beside the codes. */
#include "arguments.h"

#include <stdio.h>
#include <string.h>

#include "numbers.h"

enum { HANDLE_ITEMS = 5, GROUPS_ITEMS = 10 };
static const int64_t LARGEST = (int64_t)1 << 40; /* rows, columns, elements of a group */

/* An item of a tuple, an integer from `low` to `high`; `name` is what errors call it. */
static int take_whole(const pl_spec *spec, const pl_param *p, PyObject *tuple, int item,
                      const char *name, int64_t low, int64_t high, int64_t *value) {
    char full_name[64];
    snprintf(full_name, sizeof full_name, "%s of %s", name, p->name);
    return pl_whole(spec->name, full_name, PyTuple_GetItem(tuple, item), low, high, value);
}

/* An item of a tuple, a flat uint8 array; None leaves NULL where it is optional. */
static int take_bytes(const pl_spec *spec, const pl_param *p, PyObject *tuple, int item,
                      int optional, const uint8_t **data, int64_t *size) {
    PyObject *object = PyTuple_GetItem(tuple, item);
    *data = NULL;
    *size = 0;
    if (optional && object == Py_None) return 0;
    PyArrayObject *array = pl_plain_array(spec, p, object, NPY_UINT8);
    if (!array) return -1;
    *data = PyArray_DATA(array);
    *size = PyArray_NBYTES(array);
    return 0;
}

static int refuse_group_size(const pl_spec *spec, const pl_param *p, const char *name, int64_t size,
                             int64_t smallest) {
    if (size >= smallest && !(size & (size - 1))) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s of %s is %lld; it must be a power of two from %lld on",
                 spec->name, name, p->name, (long long)size, (long long)smallest);
    return -1;
}

/* (size, first, scales, offsets, scale_format, table, map, nested, nested_size, nested_offset): the
 * members of pl_groups. */
static int take_groups(const pl_spec *spec, const pl_param *p, PyObject *object, pl_weight *w) {
    if (!PyTuple_Check(object) || PyTuple_Size(object) != GROUPS_ITEMS) {
        PyErr_Format(PyExc_TypeError, "%s: the groups of %s must be a tuple of %d", spec->name,
                     p->name, GROUPS_ITEMS);
        return -1;
    }
    pl_groups *g = &w->groups;
    int64_t scale_format;
    if (take_whole(spec, p, object, 0, "the group size", 0, LARGEST, &g->size) ||
        take_whole(spec, p, object, 1, "the first element", 0, LARGEST, &g->first) ||
        take_whole(spec, p, object, 4, "the scales' format", 0, PL_W_COUNT - 1, &scale_format) ||
        take_whole(spec, p, object, 8, "the nested group size", 0, LARGEST, &g->nested_size))
        return -1;
    double nested_offset; /* from a file: any float is possible */
    char offset_name[64];
    snprintf(offset_name, sizeof offset_name, "the nested offset of %s", p->name);
    if (pl_real(spec->name, offset_name, PyTuple_GetItem(object, 9), &nested_offset)) return -1;
    g->nested_offset = (float)nested_offset;
    int64_t scales, offsets, table, map, nested; /* bytes */
    if (take_bytes(spec, p, object, 2, 0, &g->scales, &scales) ||
        take_bytes(spec, p, object, 3, 1, &g->offsets, &offsets) ||
        take_bytes(spec, p, object, 5, 1, &g->table, &table) ||
        take_bytes(spec, p, object, 6, 1, &g->map, &map) ||
        take_bytes(spec, p, object, 7, 1, &g->nested, &nested))
        return -1;
    if (refuse_group_size(spec, p, "the group size", g->size, 32)) return -1;
    if (g->first % 32) {
        PyErr_Format(PyExc_ValueError,
                     "%s: the first element of %s is %lld; it must be a multiple of 32", spec->name,
                     p->name, (long long)g->first);
        return -1;
    }
    g->scale_format = (int)scale_format;
    if (!pl_is_floats(g->scale_format)) {
        PyErr_Format(PyExc_ValueError, "%s: the scales of %s have format %s; they must be floats",
                     spec->name, p->name, pl_formats[g->scale_format].name);
        return -1;
    }
    if (g->map && refuse_group_size(spec, p, "the nested group size", g->nested_size, 1)) return -1;
    const int has_table = pl_has_table(w->format);
    if ((g->offsets != NULL) == has_table || (g->table != NULL) != has_table ||
        (g->map && !has_table) || (g->map != NULL) != (g->nested != NULL)) {
        PyErr_Format(PyExc_ValueError, "%s: the groups of %s must have %s, as its format %s asks",
                     spec->name, p->name,
                     has_table ? "scales and a table, and map and nested both or neither"
                               : "scales and offsets alone",
                     pl_formats[w->format].name);
        return -1;
    }
    const int64_t groups = (g->first + w->rows * w->cols + g->size - 1) / g->size;
    const int64_t item = g->map ? 1 : pl_block_bytes(g->scale_format);
    const int64_t nested_groups = g->map ? (groups + g->nested_size - 1) / g->nested_size : 0;
    const struct {
        const char *name;
        int64_t bytes, needed;
    } parts[] = {{"scales", scales, groups * item},
                 {"offsets", offsets, has_table ? 0 : groups * item},
                 {"table", table, has_table ? 64 : 0},
                 {"map", map, g->map ? 1024 : 0},
                 {"nested", nested, 4 * nested_groups}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i].bytes < parts[i].needed) {
            PyErr_Format(PyExc_ValueError, "%s: %s of %s has %lld bytes; it must have %lld",
                         spec->name, parts[i].name, p->name, (long long)parts[i].bytes,
                         (long long)parts[i].needed);
            return -1;
        }
    return 0;
}

static int take_handle(const pl_spec *spec, const pl_param *p, PyObject *object, pl_weight *w) {
    const Py_ssize_t items = PyTuple_Size(object);
    if (items != HANDLE_ITEMS && items != HANDLE_ITEMS + 1) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be a tuple (bytes, format, rows, cols, head_dim[, groups])",
                     spec->name, p->name);
        return -1;
    }
    int64_t format, bytes;
    if (take_whole(spec, p, object, 1, "the format", 0, PL_W_COUNT - 1, &format) ||
        take_whole(spec, p, object, 2, "the number of rows", 0, LARGEST, &w->rows) ||
        take_whole(spec, p, object, 3, "the number of columns", 0, LARGEST, &w->cols) ||
        take_whole(spec, p, object, 4, "head_dim", 0, LARGEST, &w->head_dim) ||
        take_bytes(spec, p, object, 0, 0, &w->data, &bytes))
        return -1;
    w->format = (int)format;
    const int64_t block = pl_block_elements(w->format);
    if (w->cols % block) {
        PyErr_Format(PyExc_ValueError,
                     "%s: the number of columns of %s is %lld; format %s needs a multiple of %lld",
                     spec->name, p->name, (long long)w->cols, pl_formats[w->format].name,
                     (long long)block);
        return -1;
    }
    if (w->head_dim && (w->head_dim % 2 || w->rows % w->head_dim)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: head_dim of %s is %lld; it must be 0 or an even divisor of its %lld rows",
                     spec->name, p->name, (long long)w->head_dim, (long long)w->rows);
        return -1;
    }
    w->row_bytes = w->cols / block * pl_block_bytes(w->format);
    /* In floating point first: the product may pass 2^63. */
    if ((double)w->rows * (double)w->row_bytes > 9e17 || bytes != w->rows * w->row_bytes) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %lld bytes; its %lld rows need %lld each",
                     spec->name, p->name, (long long)bytes, (long long)w->rows,
                     (long long)w->row_bytes);
        return -1;
    }
    const int has_groups = items > HANDLE_ITEMS;
    if (pl_has_groups(w->format) != has_groups) {
        PyErr_Format(PyExc_ValueError, "%s: %s of format %s must come %s groups", spec->name,
                     p->name, pl_formats[w->format].name, has_groups ? "without" : "with");
        return -1;
    }
    return has_groups ? take_groups(spec, p, PyTuple_GetItem(object, HANDLE_ITEMS), w) : 0;
}

static pl_weight float_weight(const char *data, int64_t rows, int64_t cols) {
    return (pl_weight){.data = (const uint8_t *)data,
                       .rows = rows,
                       .cols = cols,
                       .row_bytes = 4 * cols,
                       .format = PL_W_F32};
}

/* A float32 array of `ndim` dimensions. */
static PyArrayObject *float_array(const pl_spec *spec, const pl_param *p, PyObject *object,
                                  int ndim) {
    PyArrayObject *array = pl_plain_array(spec, p, object, NPY_FLOAT32);
    if (array && PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %d dimensions, expected %d", spec->name, p->name,
                     PyArray_NDIM(array), ndim);
        return NULL;
    }
    return array;
}

pl_extent pl_weight_extent(const pl_weight *w) {
    const char *begin = (const char *)w->data;
    return (pl_extent){begin, begin + w->rows * w->row_bytes};
}

int pl_take_weight(pl_check *c, int index) {
    const pl_param *p = &c->spec->param[index];
    PyObject *object = c->args[index];
    pl_weight *w = &c->call->arg[index].w;
    memset(w, 0, sizeof *w);
    if (PyTuple_Check(object)) {
        if (take_handle(c->spec, p, object, w)) return -1;
    } else {
        PyArrayObject *array = float_array(c->spec, p, object, 2);
        if (!array) return -1;
        *w = float_weight(PyArray_DATA(array), PyArray_DIM(array, 0), PyArray_DIM(array, 1));
    }
    c->extent[index] = pl_weight_extent(w);
    const int failed =
        pl_match_dim(c, index, 0, 0, w->rows) || pl_match_dim(c, index, 1, 1, w->cols);
    return failed ? -1 : 0;
}

/* Matrix `i` of a stack, which is a float32 array or a tuple of handles. */
static int take_matrix(const pl_spec *spec, const pl_param *p, PyObject *object, Py_ssize_t i,
                       pl_weight *w) {
    if (!PyTuple_Check(object)) {
        PyArrayObject *array = (PyArrayObject *)object;
        const int64_t rows = PyArray_DIM(array, 1), cols = PyArray_DIM(array, 2);
        *w = float_weight((const char *)PyArray_DATA(array) + 4 * i * rows * cols, rows, cols);
        return 0;
    }
    PyObject *handle = PyTuple_GetItem(object, i);
    if (!PyTuple_Check(handle))
        return pl_refuse_type(spec->name, p->name, "a float32 array or a tuple of tuples", handle);
    return take_handle(spec, p, handle, w);
}

int pl_take_stack(pl_check *c, int index) {
    const pl_spec *spec = c->spec;
    const pl_param *p = &spec->param[index];
    PyObject *object = c->args[index];
    Py_ssize_t count;
    if (PyTuple_Check(object)) {
        count = PyTuple_Size(object);
    } else {
        PyArrayObject *array = float_array(spec, p, object, 3);
        if (!array) return -1;
        count = PyArray_DIM(array, 0);
    }
    if (count < 1 || count > PL_MAX_STACK) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %zd matrices, expected 1 to %d", spec->name,
                     p->name, count, PL_MAX_STACK);
        return -1;
    }
    pl_weight *w = PyMem_Calloc((size_t)count, sizeof *w);
    if (!w) {
        PyErr_NoMemory();
        return -1;
    }
    c->call->arg[index].stack = w;
    pl_extent *all = &c->extent[index]; /* with the gaps between matrices */
    for (Py_ssize_t i = 0; i < count; i++) {
        if (take_matrix(spec, p, object, i, &w[i])) return -1;
        if (w[i].format != w->format || w[i].rows != w->rows || w[i].cols != w->cols ||
            w[i].head_dim != w->head_dim) {
            PyErr_Format(PyExc_ValueError,
                         "%s: matrix %zd of %s must have the format, shape and row order of the "
                         "first",
                         spec->name, i, p->name);
            return -1;
        }
        const pl_extent one = pl_weight_extent(&w[i]);
        if (i == 0 || one.begin < all->begin) all->begin = one.begin;
        if (i == 0 || one.end > all->end) all->end = one.end;
    }
    const int failed = pl_match_dim(c, index, 0, 0, count) ||
                       pl_match_dim(c, index, 1, 1, w->rows) ||
                       pl_match_dim(c, index, 2, 2, w->cols);
    return failed ? -1 : 0;
}
