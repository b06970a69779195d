/* The extension module pyloss._core: what it offers beside the operations, and its start. */
#define PYLOSS_IMPORTS_NUMPY
#include "numpy_api.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "device_array.h"
#include "devices.h"
#include "encode.h"
#include "numbers.h"
#include "profile.h"

static void release_capsule(PyObject *capsule) {
    pl_release(PyCapsule_GetPointer(capsule, "pyloss.buffer"));
}

static PyObject *py_empty(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *shape;
    const char *dtype = "f32";
    if (!PyArg_ParseTuple(args, "O!|s", &PyTuple_Type, &shape, &dtype)) return NULL;
    static const struct {
        const char *name;
        int npy;
    } kinds[] = {{"f32", NPY_FLOAT32},
                 {"f64", NPY_FLOAT64},
                 {"i32", NPY_INT32},
                 {"f16", NPY_FLOAT16},
                 {"u16", NPY_UINT16}};
    size_t kind = 0, count = sizeof kinds / sizeof *kinds;
    while (kind < count && strcmp(kinds[kind].name, dtype)) kind++;
    if (kind == count)
        return PyErr_Format(PyExc_ValueError,
                            "empty: dtype must be f32, f64, i32, f16 or u16, not '%s'", dtype);
    npy_intp dims[8];
    Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > 8)
        return PyErr_Format(PyExc_ValueError, "empty: at most 8 dimensions, got %zd", ndim);
    for (Py_ssize_t i = 0; i < ndim; i++) {
        int64_t n;
        if (pl_whole("empty", "a size of the shape", PyTuple_GetItem(shape, i), 0, INT64_MAX, &n))
            return NULL;
        dims[i] = (npy_intp)n;
    }
    return pl_new_array((int)ndim, dims, kinds[kind].npy);
}

PyObject *pl_new_array(int ndim, const npy_intp *dims, int npy) {
    double total = npy == NPY_FLOAT64                       ? 8
                   : npy == NPY_UINT8                       ? 1
                   : npy == NPY_FLOAT32 || npy == NPY_INT32 ? 4
                                                            : 2;
    for (int i = 0; i < ndim; i++) total *= (double)dims[i];
    if (total > 1e15) return PyErr_NoMemory();
    void *data = pl_acquire((size_t)total);
    if (!data) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(data, "pyloss.buffer", release_capsule);
    if (!capsule) {
        pl_release(data);
        return NULL;
    }
    PyObject *array = PyArray_SimpleNewFromData(ndim, dims, npy, data);
    if (!array) {
        Py_DECREF(capsule);
        return NULL;
    }
    /* It takes the capsule, also when it fails. */
    if (PyArray_SetBaseObject((PyArrayObject *)array, capsule)) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static PyObject *py_ops(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < PL_OP_COUNT; i++) {
        PyObject *item = Py_BuildValue("(ss)", pl_specs[i].name, pl_specs[i].text);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *py_formats(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < PL_W_COUNT; i++) {
        const pl_format_layout *f = &pl_formats[i];
        PyObject *item = Py_BuildValue("(siii)", f->name, f->elements, f->bytes,
                                       pl_has_groups(i) ? pl_code_bits(i) : 0);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *py_isas(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && pl_table_at(i); i++) {
        PyObject *item = PyUnicode_FromString(pl_table_at(i)->name);
        if (!item || PyList_Append(list, item)) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *py_isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(pl_kernels->name);
}

/* NULL when the machine has no such instruction set. */
static const pl_table *table_named(const char *name) {
    for (int i = 0; pl_table_at(i); i++)
        if (!strcmp(pl_table_at(i)->name, name)) return pl_table_at(i);
    return NULL;
}

/* The instruction set that is the only argument; NULL with an exception. */
static const pl_table *given_table(PyObject *args) {
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    const pl_table *table = table_named(name);
    if (!table) PyErr_Format(PyExc_ValueError, "this machine has no instruction set '%s'", name);
    return table;
}

static PyObject *py_use_isa(PyObject *self, PyObject *args) {
    (void)self;
    const pl_table *table = given_table(args);
    if (!table) return NULL;
    pl_kernels = table;
    Py_RETURN_NONE;
}

static PyObject *py_num_threads(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(pl_num_threads());
}

static PyObject *py_set_num_threads(PyObject *self, PyObject *given) {
    (void)self;
    int64_t n;
    if (pl_whole("set_num_threads", "the number of threads", given, 1, INT32_MAX, &n)) return NULL;
    pl_set_num_threads((int)n);
    Py_RETURN_NONE;
}

static PyObject *py_pieces(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    const pl_pieces found = pl_latest_pieces();
    return Py_BuildValue("(LL)", (long long)found.meetings, (long long)found.most);
}

static PyObject *py_matmul_precision(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(pl_precision_names[pl_matmul_precision()]);
}

/* The number of a precision; -1 with an error set. */
static int precision_named(const char *name) {
    for (int i = 0; pl_precision_names[i]; i++) {
        if (strcmp(pl_precision_names[i], name)) continue;
        const int tiles = i == PL_BFLOAT16_TILES || i == PL_INT8_TILES;
        const char *missing = tiles ? pl_amx_missing(1) : NULL;
        if (!missing) return i;
        PyErr_Format(PyExc_ValueError, "no products by the tile unit: %s", missing);
        return -1;
    }
    PyErr_Format(PyExc_ValueError,
                 "the precision of matrix products must be float32, bfloat16 or int8, not '%s'",
                 name);
    return -1;
}

static PyObject *py_set_matmul_precision(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    int precision = precision_named(name);
    if (precision < 0) return NULL;
    pl_set_matmul_precision((pl_precision)precision);
    Py_RETURN_NONE;
}

static PyObject *py_try_matmul_precision(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "z", &name)) return NULL;
    int precision = name ? precision_named(name) : -1;
    if (name && precision < 0) return NULL;
    pl_try_matmul_precision(precision);
    Py_RETURN_NONE;
}

static PyObject *py_amx_missing(PyObject *self, PyObject *args) {
    (void)self;
    int request;
    if (!PyArg_ParseTuple(args, "p", &request)) return NULL;
    const char *missing = pl_amx_missing(request);
    if (!missing) Py_RETURN_NONE;
    return PyUnicode_FromString(missing);
}

static PyObject *py_has_bf16_dots(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(pl_has_bf16_dots());
}

static PyObject *py_int8_dots(PyObject *self, PyObject *args) {
    (void)self;
    const pl_table *table = given_table(args);
    if (!table) return NULL;
    const char *dots = pl_int8_dots(table->bytes);
    if (!dots) Py_RETURN_NONE;
    return PyUnicode_FromString(dots);
}

static PyObject *py_buffer_stats(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    pl_buffer_stats s;
    pl_buffers_stats(&s);
    return Py_BuildValue("{s:n,s:n,s:n}", "in_use", (Py_ssize_t)s.in_use, "cached",
                         (Py_ssize_t)s.cached, "peak", (Py_ssize_t)s.peak);
}

static PyObject *py_trim(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    pl_buffers_trim();
    Py_RETURN_NONE;
}

static PyObject *py_profile(PyObject *self, PyObject *args) {
    (void)self;
    int on;
    return PyArg_ParseTuple(args, "p", &on) ? pl_profile_switch(on) : NULL;
}

static PyMethodDef functions[] = {
    {"empty", py_empty, METH_VARARGS,
     "empty(shape, dtype='f32'): an uninitialized array in a reused, aligned buffer."},
    {"ops", py_ops, METH_NOARGS, "All operations as (name, specification)."},
    {"formats", py_formats, METH_NOARGS,
     "All weight formats, by number: (name, elements and bytes of a block, bits of a code if the "
     "scales are stored beside the codes, else 0)."},
    {"isas", py_isas, METH_NOARGS, "The instruction sets that this machine can run, best last."},
    {"isa", py_isa, METH_NOARGS, "The instruction set in use."},
    {"use_isa", py_use_isa, METH_VARARGS,
     "Selects the instruction set of the whole process; for tests and benchmarks."},
    {"num_threads", py_num_threads, METH_NOARGS, "The number of threads that kernels may use."},
    {"set_num_threads", py_set_num_threads, METH_O, "Sets the number of threads."},
    {"pieces", py_pieces, METH_NOARGS,
     "Of this thread's latest call: how often threads met for its work, and the most pieces of "
     "work "
     "of a meeting."},
    {"matmul_precision", py_matmul_precision, METH_NOARGS, "The precision of dense layers."},
    {"set_matmul_precision", py_set_matmul_precision, METH_VARARGS,
     "Sets the precision of dense layers: float32, bfloat16 (one depth after the other, by the\n"
     "quickest instructions), bfloat16-emulated (by float32 ones), bfloat16-tiles (by the tile\n"
     "unit), or bfloat16-tiles-emulated."},
    {"try_matmul_precision", py_try_matmul_precision, METH_VARARGS,
     "Sets the precision of calls by this thread alone; None: the process's."},
    {"amx_missing", py_amx_missing, METH_VARARGS,
     "Why this process cannot use the tile unit, or None; whether to ask the system for it."},
    {"has_bf16_dots", py_has_bf16_dots, METH_NOARGS,
     "Whether the processor has instructions for dot products of bfloat16."},
    {"int8_dots", py_int8_dots, METH_VARARGS,
     "The processor's instructions for dots of bytes beside those of an instruction set, or None."},
    {"buffer_stats", py_buffer_stats, METH_NOARGS,
     "Bytes of reused buffers: in use, cached, and the peak of those in use."},
    {"trim", py_trim, METH_NOARGS, "Returns cached buffers to the system."},
    {"profile", py_profile, METH_VARARGS,
     "profile(on): switches counting on or off. Returns {name: (calls, seconds, bytes)} of "
     "operations and of copies to and from devices so far, and forgets them."},
    {NULL, NULL, 0, NULL}};

/* Obeys PYLOSS_ISA. */
static int select_isa(void) {
    const char *forced = getenv("PYLOSS_ISA");
    if (!forced || !*forced) return 0;
    const pl_table *table = table_named(forced);
    if (table) {
        pl_kernels = table;
        return 0;
    }
    char possible[128] = "";
    for (int i = 0; pl_table_at(i); i++) {
        const size_t used = strlen(possible);
        snprintf(possible + used, sizeof possible - used, "%s%s", i ? ", " : "",
                 pl_table_at(i)->name);
    }
    PyErr_Format(PyExc_ImportError, "PYLOSS_ISA=%s: this machine can run %s only", forced,
                 possible);
    return -1;
}

static int module_exec(PyObject *module) {
    if (PyArray_ImportNumPyAPI() || pl_calls_init() || select_isa()) return -1;
    if (PyModule_AddFunctions(module, pl_call_functions) ||
        PyModule_AddFunctions(module, pl_device_functions) ||
        PyModule_AddFunctions(module, pl_encode_functions))
        return -1;
    return pl_device_array_init(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "The C core of pyloss.", 0, functions, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
