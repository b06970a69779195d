/* Calls of operations: on the host or a device, counted and recorded where that is asked. */
#include "calls.h"

#include "check.h"
#include "device_array.h"
#include "device_call.h"
#include "numpy_api.h"
#include "profile.h"

pl_spec pl_specs[PL_OP_COUNT];
const pl_table *pl_kernels;

static _Thread_local PyObject *recording; /* the list of this thread's calls, or NULL */

int pl_calls_init(void) {
    static const struct {
        const char *name, *text;
    } lines[] = {
#define PL_OP(name, spec) {#name, spec},
#include "../ops.def"
    };
    for (int i = 0; i < PL_OP_COUNT; i++) {
        const char *malformed = pl_spec_parse(&pl_specs[i], lines[i].name, lines[i].text);
        if (!malformed) continue;
        PyErr_Format(PyExc_SystemError, "the specification of %s is malformed at '%s'",
                     lines[i].name, malformed);
        return -1;
    }
    for (int i = 0; pl_table_at(i); i++) pl_kernels = pl_table_at(i);
    return 0;
}

/* ---- running */

/* Bytes of all arrays of a call, for the profile. */
static int64_t call_bytes(PyObject *const *args, Py_ssize_t nargs) {
    int64_t total = 0;
    for (Py_ssize_t i = 0; i < nargs; i++) {
        PyObject *object = PyTuple_Check(args[i]) ? PyTuple_GetItem(args[i], 0) : args[i];
        const pl_device_array *array = pl_device_array_of(object);
        if (PyArray_Check(object)) total += PyArray_NBYTES((PyArrayObject *)object);
        else if (array) total += (int64_t)array->bytes;
    }
    return total;
}

/* Appends (op, *args) to the recording. */
static int record_call(int op, PyObject *const *args, Py_ssize_t nargs) {
    PyObject *number = PyLong_FromLong(op), *call = number ? PyTuple_New(nargs + 1) : NULL;
    if (!call) {
        Py_XDECREF(number);
        return -1;
    }
    PyTuple_SetItem(call, 0, number);
    for (Py_ssize_t i = 0; i < nargs; i++) PyTuple_SetItem(call, i + 1, Py_NewRef(args[i]));
    const int failed = PyList_Append(recording, call);
    Py_DECREF(call);
    return failed;
}

static PyObject *host_call(int op, PyObject *const *args, Py_ssize_t nargs) {
    pl_call call;
    if (pl_check_call(&pl_specs[op], args, nargs, &call)) return NULL;
    pl_kernel kernel = pl_kernels->kernel[op];
    pl_status status;
    Py_BEGIN_ALLOW_THREADS
    pl_enter_call();
    status = kernel(&call);
    pl_leave_call();
    Py_END_ALLOW_THREADS
    pl_release_call(&pl_specs[op], &call);
    if (status == PL_NO_MEMORY) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *run(int op, PyObject *const *args, Py_ssize_t nargs) {
    if (recording && record_call(op, args, nargs)) return NULL;
    const int64_t begin = pl_profile_begin();
    PyObject *done = pl_is_device_call(args, nargs) ? pl_device_call(op, &pl_specs[op], args, nargs)
                                                    : host_call(op, args, nargs);
    if (done && begin) pl_profile_end(op, begin, call_bytes(args, nargs));
    return done;
}

/* ---- recorded calls */

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

/* ---- the functions */

#define PL_OP(name, spec) \
    static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t nargs) { \
        (void)self; \
        return run(PL_OP_##name, args, nargs); \
    }
#include "../ops.def"

PyMethodDef pl_call_functions[] = {
#define PL_OP(name, spec) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, spec},
#include "../ops.def"
    {"record", py_record, METH_VARARGS,
     "record(on): starts or stops recording this thread's calls. Returns the calls so far, or None "
     "if none were recorded."},
    {"replay", py_replay, METH_O,
     "replay(calls): checks and runs recorded calls, on the same arrays."},
    {NULL, NULL, 0, NULL}};
