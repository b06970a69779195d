/* Parses ops.def's specifications and checks Python arguments against them. The only place that knows NumPy's types. */
#include "spec.h"

#define NO_IMPORT_ARRAY
#define PY_ARRAY_UNIQUE_SYMBOL pyloss_array_api
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    int npy;
} types[] = {{"f32", NPY_FLOAT32}, {"f64", NPY_FLOAT64}, {"i32", NPY_INT32}, {"i64", NPY_INT64},
             {"u8", NPY_UINT8},    {"weight", -1},       {"stack", -1},      {"float", -1},
             {"acc", -1},          {"int", -1},          {"real", -1}};

/* The types' names in messages, which are NumPy's. */
static const char *dtype_name(int npy) {
    switch (npy) {
    case NPY_FLOAT32: return "float32";
    case NPY_FLOAT64: return "float64";
    case NPY_INT32: return "int32";
    case NPY_INT64: return "int64";
    case NPY_UINT8: return "uint8";
    default: return "?";
    }
}

/* What an object is, for "not ...": its type's name, and None itself; a new reference. */
static PyObject *kind_of(PyObject *object) {
    if (object == Py_None) return PyUnicode_FromString("None");
    return PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
}

/* Raises TypeError: an argument is no array; -1. */
static int no_array(const pl_spec *spec, const pl_param *p, const char *allowed, PyObject *object) {
    PyObject *kind = kind_of(object);
    if (kind)
        PyErr_Format(PyExc_TypeError, "%s: %s must be %s, not %S", spec->name, p->name, allowed,
                     kind);
    Py_XDECREF(kind);
    return -1;
}

/* What the letters of a specification stand for in a call: the argument that gave each its size, for messages. */
typedef struct {
    PyObject *const *args;
    uint32_t bound; /* a bit for each letter */
    int by[26];     /* the number of the argument */
} letters;

static int malformed(const char *name, const char *at) {
    PyErr_Format(PyExc_SystemError, "specification of %s is malformed at '%s'", name, at);
    return -1;
}

static int is_letter(char c) { return c >= 'A' && c <= 'Z'; }

int pl_spec_parse(pl_spec *spec, const char *name, const char *text) {
    memset(spec, 0, sizeof *spec);
    spec->name = name;
    spec->text = text;
    int output = 0;
    const char *s = text;
    while (*s) {
        if (*s == ' ') {
            s++;
            continue;
        }
        if (*s == '>') {
            output = 1;
            s++;
            continue;
        }
        if (is_letter(s[0]) && s[1] == '%' && is_letter(s[2])) {
            if (spec->constraints == PL_MAX_CONSTRAINTS) return malformed(name, s);
            spec->multiple[spec->constraints] = s[0];
            spec->of[spec->constraints++] = s[2];
            s += 3;
            continue;
        }
        if (spec->count == PL_MAX_ARGS) return malformed(name, s);
        pl_param *p = &spec->param[spec->count++];
        p->output = output;
        if (*s == '=') {
            p->in_place = p->in_place_on_devices = 1;
            s++;
            if (*s == '~') {
                p->in_place_on_devices = 0;
                s++;
            }
        }
        size_t n = strcspn(s, "?:");
        if (n == 0 || n >= sizeof p->name) return malformed(name, s);
        memcpy(p->name, s, n);
        s += n;
        if (*s == '?') {
            p->optional = 1;
            s++;
        }
        if (*s++ != ':') return malformed(name, s - 1);
        n = strcspn(s, " [");
        int type = 0;
        while (type <= PL_T_REAL &&
               !(strlen(types[type].name) == n && !memcmp(types[type].name, s, n)))
            type++;
        if (type > PL_T_REAL) return malformed(name, s);
        p->type = (pl_type)type;
        s += n;
        if (*s == '[') {
            do {
                if (p->ndim == PL_MAX_DIMS) return malformed(name, s);
                pl_dim_spec *d = &p->dim[p->ndim++];
                s++;
                if (*s == '*') {
                    d->rule = '*';
                    s++;
                }
                if (is_letter(*s)) {
                    d->letter = *s++;
                    if (*s == '+' || *s == '/') {
                        d->rule = *s;
                        s += 2; /* +1 or /2 */
                    }
                } else if (*s >= '0' && *s <= '9') {
                    d->size = *s++ - '0';
                } else {
                    return malformed(name, s);
                }
            } while (*s == ',');
            if (*s++ != ']') return malformed(name, s - 1);
        }
        if (*s == '<') {
            p->below = s[1];
            s += 2;
            if (*s == '~') {
                p->below_ignored = 1;
                s++;
            }
        }
        if (*s == '^') {
            p->offsets_to = s[1];
            s += 2;
            if (*s == '~') {
                p->offsets_before = 1;
                s++;
            }
        }
        if (*s && *s != ' ') return malformed(name, s);
    }
    return 0;
}

/* The argument, and the axis of it, that gave a letter its size. */
static int axis_of(const pl_spec *spec, const letters *l, char letter, const char **name) {
    const pl_param *p = &spec->param[l->by[letter - 'A']];
    int axis = 0;
    while (axis < p->ndim - 1 && p->dim[axis].letter != letter) axis++;
    *name = p->name;
    return axis;
}

/* The shape of an array, or of what a handle or a tuple of handles stands for, as messages show it; a new reference. */
static PyObject *shape_of(PyObject *object) {
    if (!PyTuple_Check(object)) return PyObject_GetAttrString(object, "shape");
    PyObject *first = PyTuple_Size(object) ? PyTuple_GetItem(object, 0) : object;
    if (PyTuple_Check(first) && PyTuple_Size(first) > 3)
        return Py_BuildValue("(nOO)", PyTuple_Size(object), PyTuple_GetItem(first, 2),
                             PyTuple_GetItem(first, 3));
    if (PyTuple_Size(object) > 3) return PyTuple_GetSlice(object, 2, 4);
    return Py_NewRef(object);
}

/* Raises ValueError: argument `index` needs another size along an axis; -1. The axis counts as the user's array has it, and
 * -1 says that it is all leading axes together. */
static int wrong_size(const pl_spec *spec, int index, int axis, int64_t actual, int64_t expected,
                      char letter, const letters *l) {
    const int by = letter ? l->by[letter - 'A'] : index;
    PyObject *mine = shape_of(l->args[index]), *other = mine ? shape_of(l->args[by]) : NULL;
    char what[64];
    if (axis < 0)
        snprintf(what, sizeof what, "its leading axes must make %lld rows", (long long)expected);
    else snprintf(what, sizeof what, "its axis %d must be %lld", axis, (long long)expected);
    if (other && by != index)
        PyErr_Format(PyExc_ValueError,
                     "%s: %s has shape %S; %s, not %lld, to go with %s of shape %S", spec->name,
                     spec->param[index].name, mine, what, (long long)actual, spec->param[by].name,
                     other);
    else if (other)
        PyErr_Format(PyExc_ValueError, "%s: %s has shape %S; %s, not %lld", spec->name,
                     spec->param[index].name, mine, what, (long long)actual);
    Py_XDECREF(mine);
    Py_XDECREF(other);
    return -1;
}

/* Dimension `i` of argument `index`, its axis `axis`, is `actual`: binds its letter, or compares with what it was bound to. */
static int match_dim(const pl_spec *spec, int index, int i, int axis, int64_t actual, pl_call *call,
                     letters *l) {
    const pl_dim_spec *d = &spec->param[index].dim[i];
    int64_t expected = d->size;
    if (d->letter) {
        int letter = d->letter - 'A';
        int64_t implied = d->rule == '+' ? actual - 1 : d->rule == '/' ? 2 * actual : actual;
        if (!(l->bound >> letter & 1)) {
            if (implied < 0) implied = 0;
            call->dim[letter] = implied;
            l->bound |= 1u << letter;
            l->by[letter] = index;
        }
        expected = call->dim[letter];
        expected = d->rule == '+' ? expected + 1 : d->rule == '/' ? expected / 2 : expected;
        if (d->rule == '/' && call->dim[letter] % 2) {
            const char *name;
            int of = axis_of(spec, l, d->letter, &name);
            PyErr_Format(PyExc_ValueError, "%s: axis %d of %s has size %lld; it must be even",
                         spec->name, of, name, (long long)call->dim[letter]);
            return -1;
        }
    }
    return actual == expected ? 0 : wrong_size(spec, index, axis, actual, expected, d->letter, l);
}

/* A plain array of the parameter's type: C-contiguous, aligned, native byte order, writeable if it is an output. */
static PyArrayObject *plain_array(const pl_spec *spec, const pl_param *p, PyObject *object,
                                  int npy) {
    if (!PyArray_Check(object)) {
        no_array(spec, p, "a numpy.ndarray", object);
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
        PyErr_Format(PyExc_ValueError, "%s: %s is read-only", spec->name, p->name);
        return NULL;
    }
    return array;
}

/* Where an argument's memory begins and ends. */
typedef struct {
    const char *begin, *end;
} extent;

static int take_array(const pl_spec *spec, PyObject *object, pl_call *call, int index, letters *l,
                      extent *bytes) {
    const pl_param *p = &spec->param[index];
    int npy = p->type == PL_T_ACC ? call->wide ? NPY_FLOAT64 : NPY_FLOAT32 : types[p->type].npy;
    PyArrayObject *array = plain_array(spec, p, object, npy);
    if (!array) return -1;
    int ndim = PyArray_NDIM(array), leading = p->ndim > 0 && p->dim[0].rule == '*';
    if (leading ? ndim < p->ndim - 1 : ndim != p->ndim) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %d dimensions, expected %s%d", spec->name,
                     p->name, ndim, leading ? "at least " : "", leading ? p->ndim - 1 : p->ndim);
        return -1;
    }
    int64_t rows = 1;
    int first = ndim - p->ndim + 1; /* with leading dimensions together: the axes before this one */
    if (leading) {
        for (int i = 0; i < first; i++) rows *= PyArray_DIM(array, i);
        if (match_dim(spec, index, 0, first == 1 ? 0 : -1, rows, call, l)) return -1;
    }
    for (int i = leading; i < p->ndim; i++) {
        int axis = leading ? first + i - 1 : i;
        if (match_dim(spec, index, i, axis, PyArray_DIM(array, axis), call, l)) return -1;
    }
    call->arg[index].out = PyArray_DATA(array);
    *bytes = (extent){PyArray_DATA(array), (char *)PyArray_DATA(array) + PyArray_NBYTES(array)};
    return 0;
}

/* The element type of a `float` argument; -1 for others. bfloat16, which NumPy itself does not know, comes as its bits. */
static int float_type(PyObject *object) {
    if (!PyArray_Check(object)) return -1;
    switch (PyArray_TYPE((PyArrayObject *)object)) {
    case NPY_FLOAT32: return PL_F32;
    case NPY_FLOAT64: return PL_F64;
    case NPY_FLOAT16: return PL_F16;
    case NPY_UINT16: return PL_BF16;
    default: return -1;
    }
}

static int take_rows(const pl_spec *spec, PyObject *object, pl_call *call, int index, letters *l,
                     extent *bytes) {
    const pl_param *p = &spec->param[index];
    int type = float_type(object);
    if (type < 0) {
        if (!PyArray_Check(object)) no_array(spec, p, "a numpy.ndarray", object);
        else
            PyErr_Format(
                PyExc_TypeError,
                "%s: %s must have dtype float32, float64, float16, or uint16 for bfloat16, not %S",
                spec->name, p->name, (PyObject *)PyArray_DESCR((PyArrayObject *)object));
        return -1;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    int ndim = PyArray_NDIM(array);
    if (p->output) {
        if (!plain_array(spec, p, object, PyArray_TYPE(array))) return -1;
    } else if (!PyArray_ISALIGNED(array) || PyArray_ISBYTESWAPPED(array) ||
               (PyArray_SIZE(array) && ndim && PyArray_DIM(array, ndim - 1) > 1 &&
                PyArray_STRIDE(array, ndim - 1) != PyArray_ITEMSIZE(array))) {
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
    int64_t rows = 1;
    for (int i = 0; i < ndim - 1; i++) rows *= PyArray_DIM(array, i);
    if (match_dim(spec, index, 0, ndim == 2 ? 0 : -1, rows, call, l) ||
        match_dim(spec, index, 1, ndim - 1, PyArray_DIM(array, ndim - 1), call, l))
        return -1;
    pl_rows *r = &call->arg[index].rows;
    *r = (pl_rows){.data = PyArray_DATA(array), .inner = 1, .type = (pl_float)type};
    int64_t width = PyArray_DIM(array, ndim - 1) * PyArray_ITEMSIZE(array);
    if (p->output) {
        r->outer_stride = width;
    } else {
        if (ndim == 2) r->outer_stride = PyArray_STRIDE(array, 0);
        if (ndim == 3) {
            r->outer_stride = PyArray_STRIDE(array, 0);
            r->inner = PyArray_DIM(array, 1) ? PyArray_DIM(array, 1) : 1;
            r->inner_stride = PyArray_STRIDE(array, 1);
        }
    }
    if (PyArray_SIZE(array)) {
        int64_t outer = (rows / r->inner - 1) * r->outer_stride,
                inner = (r->inner - 1) * r->inner_stride;
        bytes->begin = r->data + (outer < 0 ? outer : 0) + (inner < 0 ? inner : 0);
        bytes->end = r->data + (outer > 0 ? outer : 0) + (inner > 0 ? inner : 0) + width;
    }
    return 0;
}

/* Bytes of a weight: a flat uint8 array, or with `optional` None, which leaves NULL. */
static int take_bytes(const pl_spec *spec, const pl_param *p, PyObject *object, int optional,
                      const uint8_t **data, int64_t *size) {
    *data = NULL;
    *size = 0;
    if (optional && object == Py_None) return 0;
    PyArrayObject *array = plain_array(spec, p, object, NPY_UINT8);
    if (!array) return -1;
    *data = PyArray_DATA(array);
    *size = PyArray_NBYTES(array);
    return 0;
}

/* Replaces the exception of a conversion, TypeError or OverflowError, by one that says what the number may be; -1. */
static int refuse_number(const char *operation, const char *name, const char *allowed,
                         PyObject *object) {
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyObject *kind = kind_of(object);
        if (kind)
            PyErr_Format(PyExc_TypeError, "%s: %s must be %s, not %S", operation, name, allowed,
                         kind);
        Py_XDECREF(kind);
    } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyObject *text = PyObject_Str(object);
        if (text && PyUnicode_GetLength(text) <= 40) {
            PyErr_Format(PyExc_ValueError, "%s: %s is %S; it must be %s", operation, name, text,
                         allowed);
        } else { /* Python does not write out more than some thousand digits */
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError,
                         "%s: %s is a number of more than 40 digits; it must be %s", operation,
                         name, allowed);
        }
        Py_XDECREF(text);
    }
    return -1;
}

int pl_whole(const char *operation, const char *name, PyObject *object, int64_t low, int64_t high,
             int64_t *value) {
    char allowed[96];
    snprintf(allowed, sizeof allowed, "a whole number from %lld to %lld", (long long)low,
             (long long)high);
    long long n = PyLong_AsLongLong(object);
    if (n == -1 && PyErr_Occurred()) return refuse_number(operation, name, allowed, object);
    if (n < low || n > high) {
        PyErr_Format(PyExc_ValueError, "%s: %s is %lld; it must be %s", operation, name, n,
                     allowed);
        return -1;
    }
    *value = n;
    return 0;
}

static int take_real(const char *operation, const char *name, PyObject *object, double *value) {
    static const char allowed[] = "a finite number";
    *value = PyFloat_AsDouble(object);
    if (*value == -1 && PyErr_Occurred()) return refuse_number(operation, name, allowed, object);
    if (*value - *value == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s is %S; it must be %s", operation, name, object, allowed);
    return -1;
}

static int power_of_two(long long n) { return n > 0 && !(n & (n - 1)); }

/* A number in the handle of a weight. */
static int take_number(const pl_spec *spec, const pl_param *p, PyObject *handle, int i,
                       int64_t *value) {
    char name[48];
    snprintf(name, sizeof name, "a number of %s", p->name);
    return pl_whole(spec->name, name, PyTuple_GetItem(handle, i), INT64_MIN, INT64_MAX, value);
}

/* The scales beside a weight's codes:
 * (size, first, scales, offsets, scale_format, table, map, nested, nested_size, nested_offset). */
static int take_groups(const pl_spec *spec, const pl_param *p, PyObject *object, pl_weight *w) {
    if (!PyTuple_Check(object) || PyTuple_Size(object) != 10) {
        PyErr_Format(PyExc_TypeError, "%s: the groups of %s must be a tuple of 10", spec->name,
                     p->name);
        return -1;
    }
    pl_groups *g = &w->groups;
    static const int number_at[] = {0, 1, 4, 8}, bytes_at[] = {2, 3, 5, 6, 7};
    int64_t number[4];
    for (int i = 0; i < 4; i++)
        if (take_number(spec, p, object, number_at[i], &number[i])) return -1;
    double offset =
        PyFloat_AsDouble(PyTuple_GetItem(object, 9)); /* a file's, which may be anything */
    if (offset == -1 && PyErr_Occurred())
        return refuse_number(spec->name, p->name, "a number", PyTuple_GetItem(object, 9));
    g->nested_offset = (float)offset;
    const uint8_t **data[] = {&g->scales, &g->offsets, &g->table, &g->map, &g->nested};
    int64_t bytes[5];
    for (int i = 0; i < 5; i++)
        if (take_bytes(spec, p, PyTuple_GetItem(object, bytes_at[i]), i > 0, data[i], &bytes[i]))
            return -1;
    const int64_t limit = (int64_t)1 << 40;
    const int table = pl_has_table(w->format);
    if (!power_of_two(number[0]) || number[0] < 32 || number[0] > limit || number[1] < 0 ||
        number[1] > limit || number[1] % 32 || number[2] < 0 || number[2] >= PL_W_COUNT ||
        !pl_is_floats((int)number[2]) ||
        (g->map && (!power_of_two(number[3]) || number[3] > limit))) {
        PyErr_Format(PyExc_ValueError,
                     "%s: %s cannot have groups of %lld from %lld with scales of format %lld in "
                     "groups of %lld",
                     spec->name, p->name, (long long)number[0], (long long)number[1],
                     (long long)number[2], (long long)number[3]);
        return -1;
    }
    g->size = number[0];
    g->first = number[1];
    g->scale_format = (int)number[2];
    g->nested_size = number[3];
    if ((g->offsets != NULL) == table || (g->table != NULL) != table || (g->map && !table) ||
        (g->map != NULL) != (g->nested != NULL)) {
        PyErr_Format(PyExc_ValueError, "%s: %s has groups with other parts than its format %d has",
                     spec->name, p->name, w->format);
        return -1;
    }
    int64_t groups = (g->first + w->rows * w->cols + g->size - 1) / g->size;
    int64_t item = g->map ? 1 : pl_block_bytes(g->scale_format),
            outer = g->map ? (groups + g->nested_size - 1) / g->nested_size : 0;
    const int64_t needed[] = {groups * item, table ? 0 : groups * item, table ? 64 : 0,
                              g->map ? 1024 : 0, 4 * outer};
    static const char *const names[] = {"scales", "offsets", "table", "map", "nested"};
    for (int i = 0; i < 5; i++)
        if (bytes[i] < needed[i]) {
            PyErr_Format(PyExc_ValueError, "%s: the %s of %s have %lld bytes where %lld are needed",
                         spec->name, names[i], p->name, (long long)bytes[i], (long long)needed[i]);
            return -1;
        }
    return 0;
}

/* The handle of a pyloss Weight: (bytes, format, rows, cols, head_dim), and for the formats that have them the groups. */
static int take_handle(const pl_spec *spec, const pl_param *p, PyObject *object, pl_weight *w) {
    Py_ssize_t parts = PyTuple_Size(object);
    if (parts != 5 && parts != 6) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be a tuple (bytes, format, rows, cols, head_dim) or with groups "
                     "after these",
                     spec->name, p->name);
        return -1;
    }
    int64_t number[4];
    for (int i = 0; i < 4; i++)
        if (take_number(spec, p, object, i + 1, &number[i])) return -1;
    int64_t size;
    if (take_bytes(spec, p, PyTuple_GetItem(object, 0), 0, &w->data, &size)) return -1;
    if (number[0] < 0 || number[0] >= PL_W_COUNT) {
        PyErr_Format(PyExc_ValueError, "%s: %s has unknown format %lld", spec->name, p->name,
                     (long long)number[0]);
        return -1;
    }
    int64_t block = pl_block_elements((int)number[0]), limit = (int64_t)1 << 40;
    if (number[1] < 0 || number[2] < 0 || number[1] > limit || number[2] > limit ||
        number[2] % block ||
        (number[3] && (number[3] < 0 || number[3] % 2 || number[1] % number[3]))) {
        PyErr_Format(PyExc_ValueError,
                     "%s: %s cannot be %lld rows of %lld in blocks of %lld with heads of %lld",
                     spec->name, p->name, (long long)number[1], (long long)number[2],
                     (long long)block, (long long)number[3]);
        return -1;
    }
    w->format = (int)number[0];
    w->rows = number[1];
    w->cols = number[2];
    w->head_dim = number[3];
    w->row_bytes = w->cols / block * pl_block_bytes(w->format);
    /* In floating point first: the product of two bounded numbers may still pass 2^63. */
    if ((double)w->rows * (double)w->row_bytes > 9e17 || size != w->rows * w->row_bytes) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %lld bytes where %lld rows need %lld each",
                     spec->name, p->name, (long long)size, (long long)w->rows,
                     (long long)w->row_bytes);
        return -1;
    }
    if (pl_has_groups(w->format) != (parts == 6)) {
        PyErr_Format(PyExc_ValueError, "%s: %s of format %d must come %s groups", spec->name,
                     p->name, w->format, parts == 6 ? "without" : "with");
        return -1;
    }
    return parts == 6 ? take_groups(spec, p, PyTuple_GetItem(object, 5), w) : 0;
}

static pl_weight float_weight(const char *data, int64_t rows, int64_t cols) {
    return (pl_weight){.data = (const uint8_t *)data,
                       .rows = rows,
                       .cols = cols,
                       .row_bytes = 4 * cols,
                       .format = PL_W_F32};
}

/* A float32 array of so many dimensions. */
static PyArrayObject *float_array(const pl_spec *spec, const pl_param *p, PyObject *object,
                                  int ndim) {
    PyArrayObject *array = plain_array(spec, p, object, NPY_FLOAT32);
    if (array && PyArray_NDIM(array) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %d dimensions, expected %d", spec->name, p->name,
                     PyArray_NDIM(array), ndim);
        return NULL;
    }
    return array;
}

static extent weight_extent(const pl_weight *w) {
    return (extent){(const char *)w->data, (const char *)w->data + w->rows * w->row_bytes};
}

/* A float32 matrix, or a handle. */
static int take_weight(const pl_spec *spec, PyObject *object, pl_call *call, int index, letters *l,
                       extent *bytes) {
    const pl_param *p = &spec->param[index];
    pl_weight *w = &call->arg[index].w;
    memset(w, 0, sizeof *w);
    if (PyTuple_Check(object)) {
        if (take_handle(spec, p, object, w)) return -1;
    } else {
        PyArrayObject *array = float_array(spec, p, object, 2);
        if (!array) return -1;
        *w = float_weight(PyArray_DATA(array), PyArray_DIM(array, 0), PyArray_DIM(array, 1));
    }
    *bytes = weight_extent(w);
    return match_dim(spec, index, 0, 0, w->rows, call, l) ||
                   match_dim(spec, index, 1, 1, w->cols, call, l)
               ? -1
               : 0;
}

/* A float32 array [count, rows, cols], or a tuple of handles of one format, shape and row order. */
static int take_stack(const pl_spec *spec, PyObject *object, pl_call *call, int index, letters *l,
                      extent *bytes) {
    const pl_param *p = &spec->param[index];
    PyArrayObject *array = NULL;
    Py_ssize_t count;
    if (PyTuple_Check(object)) {
        count = PyTuple_Size(object);
    } else {
        array = float_array(spec, p, object, 3);
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
    call->arg[index].stack = w; /* pl_spec_release frees it */
    for (Py_ssize_t i = 0; i < count; i++) {
        if (array) {
            int64_t rows = PyArray_DIM(array, 1), cols = PyArray_DIM(array, 2);
            w[i] =
                float_weight((const char *)PyArray_DATA(array) + 4 * i * rows * cols, rows, cols);
        } else {
            PyObject *handle = PyTuple_GetItem(object, i);
            if (!PyTuple_Check(handle))
                return no_array(
                    spec, p, "a float32 array or a tuple of handles, each of them a tuple", handle);
            if (take_handle(spec, p, handle, &w[i])) return -1;
        }
        if (w[i].format != w->format || w[i].rows != w->rows || w[i].cols != w->cols ||
            w[i].head_dim != w->head_dim) {
            PyErr_Format(
                PyExc_ValueError,
                "%s: matrix %zd of %s is not of the format, shape and row order of the first",
                spec->name, i, p->name);
            return -1;
        }
        /* From the first byte to the last, whatever lies between: pl_spec_check looks closer. */
        extent one = weight_extent(&w[i]);
        if (i == 0 || one.begin < bytes->begin) bytes->begin = one.begin;
        if (i == 0 || one.end > bytes->end) bytes->end = one.end;
    }
    return match_dim(spec, index, 0, 0, count, call, l) ||
                   match_dim(spec, index, 1, 1, w->rows, call, l) ||
                   match_dim(spec, index, 2, 2, w->cols, call, l)
               ? -1
               : 0;
}

void pl_spec_release(const pl_spec *spec, pl_call *call) {
    for (int i = 0; i < spec->count; i++)
        if (spec->param[i].type == PL_T_STACK) PyMem_Free((void *)call->arg[i].stack);
    PyMem_Free(call->indices);
}

static int64_t param_items(const pl_param *p, const pl_call *call) {
    int64_t n = 1;
    for (int i = 0; i < p->ndim; i++) {
        const pl_dim_spec *d = &p->dim[i];
        int64_t size = d->letter ? call->dim[d->letter - 'A'] : d->size;
        n *= d->rule == '+' ? size + 1 : d->rule == '/' ? size / 2 : size;
    }
    return n;
}

static int check_indices(const pl_spec *spec, const pl_param *p, const int32_t *values,
                         const pl_call *call) {
    int64_t n = param_items(p, call), limit = call->dim[p->below - 'A'];
    int32_t lowest = p->below_ignored ? -1 : 0;
    for (int64_t i = 0; i < n; i++)
        if (values[i] < lowest || values[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "%s: %s at position %lld is %d, outside [0, %lld)%s",
                         spec->name, p->name, (long long)i, (int)values[i], (long long)limit,
                         p->below_ignored ? " and not ignored" : "");
            return -1;
        }
    return 0;
}

static int check_offsets(const pl_spec *spec, const pl_param *p, const int32_t *values,
                         const pl_call *call) {
    int64_t n = param_items(p, call), end = call->dim[p->offsets_to - 'A'];
    int good = n > 0 && values[0] == 0 &&
               (values[n - 1] == end || (p->offsets_before && values[n - 1] < end));
    for (int64_t i = 1; i < n && good; i++) good = values[i] >= values[i - 1];
    if (good) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s must begin with 0, never decrease and end with %s%lld",
                 spec->name, p->name, p->offsets_before ? "at most " : "", (long long)end);
    return -1;
}

/* Copies the index arrays, and has the call read the copies: another thread may write to the arrays while the kernel runs, and
 * what was checked must be what is read. */
static int copy_indices(const pl_spec *spec, pl_call *call) {
    size_t total = 0;
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        if ((p->below || p->offsets_to) && call->arg[i].in)
            total += (size_t)param_items(p, call) * sizeof(int32_t);
    }
    if (!total) return 0;
    char *to = call->indices = PyMem_Malloc(total);
    if (!to) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        if (!(p->below || p->offsets_to) || !call->arg[i].in) continue;
        size_t bytes = (size_t)param_items(p, call) * sizeof(int32_t);
        memcpy(to, call->arg[i].in, bytes);
        call->arg[i].in = to;
        to += bytes;
    }
    return 0;
}

/* Whether two arguments hold the same element at the same place, so that one may be written where the other was read. */
static int same_layout(const pl_spec *spec, const pl_call *call, int i, int j) {
    const pl_param *a = &spec->param[i], *b = &spec->param[j];
    if (a->type != b->type || a->ndim != b->ndim || memcmp(a->dim, b->dim, sizeof a->dim)) return 0;
    if (a->type != PL_T_FLOAT) return 1;
    const pl_rows *r = &call->arg[i].rows, *o = &call->arg[j].rows; /* outputs have one stride */
    return r->type == o->type && (o->inner == 1 || o->outer_stride == o->inner * o->inner_stride) &&
           r->outer_stride == (o->inner == 1 ? o->outer_stride : o->inner_stride);
}

/* Whether bytes that an output has are read by the argument whose bytes overlap them: a stack may have others
 * between its matrices. */
static int reads_bytes(const pl_param *p, const pl_value *value, const pl_call *call,
                       extent bytes) {
    if (p->type != PL_T_STACK) return 1;
    for (int64_t i = 0; i < call->dim[p->dim[0].letter - 'A']; i++) {
        extent one = weight_extent(&value->stack[i]);
        if (bytes.begin < one.end && one.begin < bytes.end) return 1;
    }
    return 0;
}

/* Raises TypeError for a wrong number of arguments, with their names. */
void pl_spec_refuse_count(const pl_spec *spec, Py_ssize_t nargs) {
    char names[PL_MAX_ARGS * (sizeof spec->param->name + 2)] = "";
    size_t used = 0;
    for (int i = 0; i < spec->count; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "",
                                 spec->param[i].name);
    PyErr_Format(PyExc_TypeError, "%s takes %d arguments (%s), got %zd", spec->name, spec->count,
                 names, nargs);
}

static int check(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs, pl_call *call) {
    if (nargs != spec->count) {
        pl_spec_refuse_count(spec, nargs);
        return -1;
    }
    call->count = spec->count;
    for (int i = 0; i < spec->count; i++)
        if (spec->param[i].type == PL_T_FLOAT && float_type(args[i]) == PL_F64) call->wide = 1;
    letters l = {.args = args};
    extent bytes[PL_MAX_ARGS] = {{0}};
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        if (p->optional && args[i] == Py_None) continue;
        if (p->type == PL_T_INT) {
            if (pl_whole(spec->name, p->name, args[i], INT64_MIN, INT64_MAX, &call->arg[i].i))
                return -1;
        } else if (p->type == PL_T_REAL) {
            if (take_real(spec->name, p->name, args[i], &call->arg[i].f)) return -1;
        } else if (p->type == PL_T_WEIGHT) {
            if (take_weight(spec, args[i], call, i, &l, &bytes[i])) return -1;
        } else if (p->type == PL_T_STACK) {
            if (take_stack(spec, args[i], call, i, &l, &bytes[i])) return -1;
        } else if (p->type == PL_T_FLOAT) {
            if (take_rows(spec, args[i], call, i, &l, &bytes[i])) return -1;
        } else if (take_array(spec, args[i], call, i, &l, &bytes[i])) {
            return -1;
        }
    }
    for (int i = 0; i < spec->constraints; i++) {
        int64_t a = call->dim[spec->multiple[i] - 'A'], b = call->dim[spec->of[i] - 'A'];
        if (b ? a % b : a) {
            const char *name, *other;
            int axis = axis_of(spec, &l, spec->multiple[i], &name),
                of = axis_of(spec, &l, spec->of[i], &other);
            PyErr_Format(
                PyExc_ValueError,
                "%s: axis %d of %s has size %lld; it must be a multiple of axis %d of %s, %lld",
                spec->name, axis, name, (long long)a, of, other, (long long)b);
            return -1;
        }
    }
    if (copy_indices(spec, call)) return -1;
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        /* Before what has no bytes is left out: no offsets at all are wrong too. */
        if (p->offsets_to && call->arg[i].in && check_offsets(spec, p, call->arg[i].in, call))
            return -1;
        if (bytes[i].begin == bytes[i].end) continue;
        if (p->below && check_indices(spec, p, call->arg[i].in, call)) return -1;
        if (!p->output) continue;
        for (int j = 0; j < spec->count; j++) {
            if (j == i || bytes[j].begin == bytes[j].end) continue;
            if (bytes[i].begin >= bytes[j].end || bytes[j].begin >= bytes[i].end) continue;
            if (!reads_bytes(&spec->param[j], &call->arg[j], call, bytes[i])) continue;
            if (p->in_place && !spec->param[j].output && bytes[i].begin == bytes[j].begin &&
                same_layout(spec, call, i, j))
                continue;
            PyErr_Format(PyExc_ValueError, "%s: %s overlaps %s", spec->name, p->name,
                         spec->param[j].name);
            return -1;
        }
    }
    return 0;
}

int pl_spec_check(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs, pl_call *call) {
    memset(call, 0, sizeof *call);
    if (!check(spec, args, nargs, call)) return 0;
    pl_spec_release(spec, call);
    return -1;
}
