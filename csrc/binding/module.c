/* The extension module: one Python function per line of ops.def, threads, buffers, instruction sets, timing. */
#include "device.h"
#include "spec.h"

#define PY_ARRAY_UNIQUE_SYMBOL pyloss_array_api
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static pl_spec specs[PL_OP_COUNT];
static const pl_table *table; /* the kernels in use */
static pl_profile profile[PL_OP_COUNT];
pl_profile pl_copied_to_devices, pl_copied_from_devices;
int pl_profiling;

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t pl_profile_begin(void) { return pl_profiling ? nanoseconds() : 0; }

void pl_profile_end(pl_profile *entry, int64_t begin, int64_t bytes) {
    if (!pl_profiling || !begin) return;
    entry->calls++;
    entry->nanoseconds += nanoseconds() - begin;
    entry->bytes += bytes;
}

/* Bytes of all arguments, for the profile. */
static int64_t call_bytes(PyObject *const *args, Py_ssize_t nargs) {
    int64_t total = 0;
    for (Py_ssize_t i = 0; i < nargs; i++) {
        PyObject *a = PyTuple_Check(args[i]) ? PyTuple_GetItem(args[i], 0) : args[i];
        total += PyArray_Check(a) ? PyArray_NBYTES((PyArrayObject *)a) : pl_device_bytes(a);
    }
    return total;
}

static _Thread_local PyObject *recording; /* the list of this thread's calls, or NULL */

/* Appends (op, *args) to the recording. */
static int note_call(int op, PyObject *const *args, Py_ssize_t nargs) {
    PyObject *number = PyLong_FromLong(op), *call = number ? PyTuple_New(nargs + 1) : NULL;
    if (!call) {
        Py_XDECREF(number);
        return -1;
    }
    PyTuple_SetItem(call, 0, number);
    for (Py_ssize_t i = 0; i < nargs; i++) PyTuple_SetItem(call, i + 1, Py_NewRef(args[i]));
    int failed = PyList_Append(recording, call);
    Py_DECREF(call);
    return failed;
}

static PyObject *run(int op, PyObject *const *args, Py_ssize_t nargs) {
    if (recording && note_call(op, args, nargs)) return NULL;
    int64_t begin = pl_profile_begin();
    if (pl_device_call(args, nargs)) {
        PyObject *done = pl_device_run(op, &specs[op], args, nargs);
        if (done && begin) pl_profile_end(&profile[op], begin, call_bytes(args, nargs));
        return done;
    }
    pl_call call;
    if (pl_spec_check(&specs[op], args, nargs, &call)) return NULL;
    pl_kernel kernel = table->kernel[op];
    pl_status status;
    Py_BEGIN_ALLOW_THREADS
    pl_enter_call();
    status = kernel(&call);
    pl_leave_call();
    Py_END_ALLOW_THREADS
    pl_spec_release(&specs[op], &call);
    if (begin) pl_profile_end(&profile[op], begin, call_bytes(args, nargs));
    if (status == PL_NO_MEMORY) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#define PL_OP(name, spec) \
    static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t nargs) { \
        (void)self; \
        return run(PL_OP_##name, args, nargs); \
    }
#include "../ops.def"

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
        int npy, bytes;
    } kinds[] = {{"f32", NPY_FLOAT32, 4},
                 {"f64", NPY_FLOAT64, 8},
                 {"i32", NPY_INT32, 4},
                 {"f16", NPY_FLOAT16, 2},
                 {"u16", NPY_UINT16, 2}};
    size_t kind = 0, count = sizeof kinds / sizeof *kinds;
    while (kind < count && strcmp(kinds[kind].name, dtype)) kind++;
    if (kind == count)
        return PyErr_Format(PyExc_ValueError,
                            "empty: dtype must be f32, f64, i32, f16 or u16, not '%s'", dtype);
    npy_intp dims[8];
    Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > 8)
        return PyErr_Format(PyExc_ValueError, "empty: at most 8 dimensions, got %zd", ndim);
    double total = kinds[kind].bytes;
    for (Py_ssize_t i = 0; i < ndim; i++) {
        int64_t n;
        if (pl_whole("empty", "a size of the shape", PyTuple_GetItem(shape, i), 0, INT64_MAX, &n))
            return NULL;
        dims[i] = (npy_intp)n;
        total *= (double)n;
    }
    if (total > 1e15) return PyErr_NoMemory();
    void *data = pl_acquire((size_t)total);
    if (!data) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(data, "pyloss.buffer", release_capsule);
    if (!capsule) {
        pl_release(data);
        return NULL;
    }
    PyObject *array = PyArray_SimpleNewFromData((int)ndim, dims, kinds[kind].npy, data);
    if (!array) {
        Py_DECREF(capsule);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array,
                              capsule)) { /* takes the capsule, also when it fails */
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static PyObject *py_ops(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < PL_OP_COUNT; i++) {
        PyObject *item = Py_BuildValue("(ss)", specs[i].name, specs[i].text);
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
    return PyUnicode_FromString(table->name);
}

/* 0 when the machine has no such instruction set. */
static int use_isa(const char *name) {
    for (int i = 0; pl_table_at(i); i++)
        if (!strcmp(pl_table_at(i)->name, name)) {
            table = pl_table_at(i);
            return 1;
        }
    return 0;
}

static PyObject *py_use_isa(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    if (!use_isa(name))
        return PyErr_Format(PyExc_ValueError, "this machine has no instruction set '%s'", name);
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

static PyObject *py_matmul_precision(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(pl_precision_names[pl_matmul_precision()]);
}

static PyObject *py_set_matmul_precision(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    for (int i = 0; pl_precision_names[i]; i++)
        if (!strcmp(pl_precision_names[i], name)) {
            pl_set_matmul_precision((pl_precision)i);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError,
                        "the precision of matrix products must be float32 or bfloat16, not '%s'",
                        name);
}

static PyObject *py_has_bf16_dots(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(pl_has_bf16_dots());
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

/* Enters what was counted, if anything, under a name, and forgets it. */
static int profile_row(PyObject *dict, const char *name, pl_profile *entry) {
    if (!entry->calls) return 0;
    PyObject *row = Py_BuildValue("(LdL)", (long long)entry->calls,
                                  1e-9 * (double)entry->nanoseconds, (long long)entry->bytes);
    int failed = !row || PyDict_SetItemString(dict, name, row);
    Py_XDECREF(row);
    *entry = (pl_profile){0, 0, 0};
    return failed;
}

static PyObject *py_profile(PyObject *self, PyObject *args) {
    (void)self;
    int on;
    if (!PyArg_ParseTuple(args, "p", &on)) return NULL;
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < PL_OP_COUNT; i++)
        if (profile_row(dict, specs[i].name, &profile[i])) Py_CLEAR(dict);
    if (dict && (profile_row(dict, "copied to devices", &pl_copied_to_devices) ||
                 profile_row(dict, "copied from devices", &pl_copied_from_devices)))
        Py_CLEAR(dict);
    memset(profile, 0, sizeof profile);
    pl_profiling = on;
    return dict;
}

static PyObject *py_record(PyObject *self, PyObject *args) {
    (void)self;
    int on;
    if (!PyArg_ParseTuple(args, "p", &on)) return NULL;
    PyObject *fresh = on ? PyList_New(0) : NULL;
    if (on && !fresh) return NULL;
    PyObject *calls = recording ? recording : Py_NewRef(Py_None);
    recording = fresh;
    return calls;
}

static PyObject *py_replay(PyObject *self, PyObject *calls) {
    (void)self;
    if (!PyList_Check(calls))
        return PyErr_Format(PyExc_TypeError, "replay: the calls must be a list, not %R",
                            Py_TYPE(calls));
    for (Py_ssize_t i = 0; i < PyList_Size(calls); i++) {
        PyObject *call = PyList_GetItem(calls, i), *args[PL_MAX_ARGS], *done;
        Py_ssize_t n = PyTuple_Check(call) ? PyTuple_Size(call) - 1 : -1;
        long op = n >= 0 && n <= PL_MAX_ARGS ? PyLong_AsLong(PyTuple_GetItem(call, 0)) : -1;
        if (op < 0 || op >= PL_OP_COUNT) {
            PyErr_Clear();
            return PyErr_Format(PyExc_ValueError, "replay: call %zd is not one that was recorded",
                                i);
        }
        for (Py_ssize_t j = 0; j < n; j++) args[j] = PyTuple_GetItem(call, j + 1);
        Py_INCREF(call); /* the list may change while the call runs */
        done = run((int)op, args, n);
        Py_DECREF(call);
        if (!done) return NULL;
        Py_DECREF(done);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
#define PL_OP(name, spec) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, spec},
#include "../ops.def"
    {"empty", py_empty, METH_VARARGS,
     "empty(shape, dtype='f32'): an uninitialised array over a reused aligned buffer."},
    {"ops", py_ops, METH_NOARGS, "All operations as (name, specification)."},
    {"formats", py_formats, METH_NOARGS,
     "The formats of weights by number, as (name, elements and bytes of a block, bits of a code "
     "where the scales lie beside)."},
    {"isas", py_isas, METH_NOARGS, "The instruction sets this machine can run, best last."},
    {"isa", py_isa, METH_NOARGS, "The instruction set in use."},
    {"use_isa", py_use_isa, METH_VARARGS,
     "Switches the kernels of the whole process; for tests and benchmarks."},
    {"num_threads", py_num_threads, METH_NOARGS, "Threads that kernels may use."},
    {"set_num_threads", py_set_num_threads, METH_O, "Sets the number of threads."},
    {"matmul_precision", py_matmul_precision, METH_NOARGS, "How dense layers multiply."},
    {"set_matmul_precision", py_set_matmul_precision, METH_VARARGS,
     "Sets how dense layers multiply: float32, bfloat16, or bfloat16-emulated, which is for "
     "tests."},
    {"has_bf16_dots", py_has_bf16_dots, METH_NOARGS,
     "Whether the processor has instructions for dots of bfloat16."},
    {"buffer_stats", py_buffer_stats, METH_NOARGS,
     "Bytes in use, cached, and the peak in use, of reused buffers."},
    {"trim", py_trim, METH_NOARGS, "Gives cached buffers back to the system."},
    {"profile", py_profile, METH_VARARGS,
     "profile(on): switches timing, clears it and returns {op: (calls, seconds, bytes)} so far, "
     "copies to and from devices too."},
    {"record", py_record, METH_VARARGS,
     "record(on): begins (again) or ends recording this thread's calls; returns those so far, or "
     "None if it did not record."},
    {"replay", py_replay, METH_O,
     "replay(calls): runs recorded calls again, on the same arrays, checked as ever."},
    {NULL, NULL, 0, NULL}};

static int module_exec(PyObject *module) {
    if (PyArray_ImportNumPyAPI()) return -1;
    static const struct {
        const char *name, *text;
    } texts[] = {
#define PL_OP(name, spec) {#name, spec},
#include "../ops.def"
    };
    for (int i = 0; i < PL_OP_COUNT; i++)
        if (pl_spec_parse(&specs[i], texts[i].name, texts[i].text)) return -1;
    if (pl_device_init(module)) return -1;
    int last = 0;
    while (pl_table_at(last + 1)) last++;
    table = pl_table_at(last);
    const char *forced = getenv("PYLOSS_ISA");
    if (forced && *forced && !use_isa(forced)) {
        char possible[128] = "";
        for (int i = 0; i <= last; i++) {
            size_t used = strlen(possible);
            snprintf(possible + used, sizeof possible - used, "%s%s", i ? ", " : "",
                     pl_table_at(i)->name);
        }
        PyErr_Format(PyExc_ImportError, "PYLOSS_ISA=%s: this machine can run %s only", forced,
                     possible);
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "The C core of pyloss.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
