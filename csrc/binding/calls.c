/* Calls of operations: on the host or a device, counted and recorded where that is asked. */
#include "calls.h"

#include "check.h"
#include "device_array.h"
#include "device_call.h"
#include "numpy_api.h"
#include "profile.h"
#include "widened.h"

#include <string.h>

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

/* The arrays that a call has made: None, the only one, or a tuple. Takes the references. */
static PyObject *returned(PyObject **made, Py_ssize_t nargs) {
    Py_ssize_t count = 0, next = 0;
    PyObject *last = NULL;
    for (Py_ssize_t i = 0; i < nargs; i++)
        if (made[i]) count++, last = made[i];
    if (count == 0) return Py_NewRef(Py_None);
    if (count == 1) return last;
    PyObject *all = PyTuple_New(count);
    for (Py_ssize_t i = 0; i < nargs; i++) {
        if (!made[i]) continue;
        if (all) PyTuple_SetItem(all, next++, made[i]);
        else Py_DECREF(made[i]);
    }
    return all;
}

static PyObject *host_call(int op, PyObject *const *args, Py_ssize_t nargs) {
    pl_call call;
    PyObject *made[PL_MAX_ARGS] = {NULL};
    if (pl_check_call(&pl_specs[op], args, nargs, &call, made)) return NULL;
    pl_status status;
    Py_BEGIN_ALLOW_THREADS
    pl_enter_call();
    status = pl_run_widened(op, &pl_specs[op], &call);
    pl_leave_call();
    Py_END_ALLOW_THREADS
    pl_release_call(&pl_specs[op], &call);
    if (status == PL_NO_MEMORY) {
        for (Py_ssize_t i = 0; i < nargs; i++) Py_XDECREF(made[i]);
        return PyErr_NoMemory();
    }
    return returned(made, nargs);
}

/* One call, on the host or a device. */
static PyObject *run_one(int op, PyObject *const *args, Py_ssize_t nargs) {
    if (recording && record_call(op, args, nargs)) return NULL;
    const int64_t begin = pl_profile_begin();
    PyObject *done = pl_is_device_call(args, nargs) ? pl_device_call(op, &pl_specs[op], args, nargs)
                                                    : host_call(op, args, nargs);
    if (done && begin) pl_profile_end(op, begin, call_bytes(args, nargs));
    return done;
}

/* The number of calls that arguments with lists stand for; -1: none is a list; -2: they are of
 * different lengths, with ValueError set. */
static Py_ssize_t count_calls(int op, PyObject *const *args, Py_ssize_t nargs) {
    Py_ssize_t count = -1;
    for (Py_ssize_t i = 0; i < nargs; i++) {
        if (!PyList_Check(args[i])) continue;
        const Py_ssize_t n = PyList_Size(args[i]);
        if (count >= 0 && n != count) {
            PyErr_Format(PyExc_ValueError,
                         "%s: its lists have %zd and %zd items; they must have "
                         "the same number",
                         pl_specs[op].name, count, n);
            return -2;
        }
        count = n;
    }
    return count;
}

/* A call with lists runs once for each of their items, in order: the Python between so many calls
 * would take longer than small kernels do. */
static PyObject *run(int op, PyObject *const *args, Py_ssize_t nargs) {
    const Py_ssize_t count = count_calls(op, args, nargs);
    if (count == -2) return NULL;
    if (count == -1) return run_one(op, args, nargs);
    if (nargs > PL_MAX_ARGS) {
        pl_refuse_count(&pl_specs[op], nargs);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item[PL_MAX_ARGS], *done = NULL;
        Py_ssize_t held = 0;
        for (; held < nargs; held++) {
            item[held] = PyList_Check(args[held]) ? PyList_GetItem(args[held], i) : args[held];
            if (!item[held]) break;
            Py_INCREF(item[held]); /* a list may change while the call runs */
        }
        if (held == nargs) done = run_one(op, item, nargs);
        while (held) Py_DECREF(item[--held]);
        if (!done) return NULL;
        Py_DECREF(done);
    }
    Py_RETURN_NONE;
}

/* ---- programs */

/* Puts a new array into a slot, with as many rows as another slot's array, and with the type and the
 * other axes of a given one. `value`: (slot, the other slot, the given array). */
static PyObject *make_rows(PyObject *value, PyObject *slots) {
    int slot, other;
    PyArrayObject *like;
    npy_intp shape[PL_MAX_DIMS];
    if (!PyTuple_Check(value)) return NULL;
    if (!PyArg_ParseTuple(value, "iiO!", &slot, &other, &PyArray_Type, &like)) return NULL;
    PyArrayObject *rows = (PyArrayObject *)PyList_GetItem(slots, other);
    if (!rows || !PyArray_Check(rows) || !PyArray_NDIM(rows) || !PyArray_NDIM(like) ||
        PyArray_NDIM(like) > PL_MAX_DIMS)
        return NULL;
    for (int i = 0; i < PyArray_NDIM(like); i++)
        shape[i] = i ? PyArray_DIM(like, i) : PyArray_DIM(rows, 0);
    PyObject *array = PyArray_SimpleNew(PyArray_NDIM(like), shape, PyArray_TYPE(like));
    if (array && PyList_SetItem(slots, slot, Py_NewRef(array))) Py_CLEAR(array);
    return array;
}

/* The argument j of a step, a new reference: a constant, what a slot holds, a view of it with other
 * axes, an array that the call fills, or what stands for an array that it makes. */
static PyObject *step_argument(char kind, PyObject *value, PyObject *slots) {
    if (kind == 'm') return make_rows(value, slots);
    if (kind == 'c') return Py_NewRef(value);
    if (kind == 'n') return Py_NewRef(Py_Ellipsis);
    if (kind == 'h') return Py_NewRef(Py_NotImplemented);
    if (kind == 'v' && !PyTuple_Check(value)) return NULL;
    PyObject *number = kind == 'v' ? PyTuple_GetItem(value, 0) : value;
    PyObject *held = number ? PyList_GetItem(slots, PyLong_AsSsize_t(number)) : NULL;
    if (!held || kind == 's') return Py_XNewRef(held);
    PyObject *axes = PyTuple_GetItem(value, 1);
    return axes && PyArray_Check(held) ? PyArray_Reshape((PyArrayObject *)held, axes) : NULL;
}

/* Puts the arrays that a step made into their slots, and empties slots after their last use. */
static int end_step(PyObject *made, const char *kinds, PyObject *values, PyObject *done,
                    PyObject *slots) {
    Py_ssize_t next = 0;
    for (Py_ssize_t j = 0; kinds[j]; j++) {
        if (kinds[j] != 'n' && kinds[j] != 'h') continue;
        PyObject *array = PyTuple_Check(made) ? PyTuple_GetItem(made, next++) : made;
        const Py_ssize_t slot = PyLong_AsSsize_t(PyTuple_GetItem(values, j));
        if (!array || PyList_SetItem(slots, slot, Py_NewRef(array))) return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(done); i++) {
        const Py_ssize_t slot = PyLong_AsSsize_t(PyTuple_GetItem(done, i));
        if (PyList_SetItem(slots, slot, Py_NewRef(Py_None))) return -1;
    }
    return 0;
}

static int refuse_step(void) {
    PyErr_SetString(PyExc_ValueError, "run: a step must be (operation, kinds, values, done)");
    return -1;
}

static int run_step(PyObject *step, PyObject *slots) {
    if (!PyTuple_Check(step)) return refuse_step();
    int op;
    const char *kinds;
    PyObject *values, *done, *made = NULL, *item[PL_MAX_ARGS];
    if (!PyArg_ParseTuple(step, "isO!O!", &op, &kinds, &PyTuple_Type, &values, &PyTuple_Type,
                          &done))
        return -1;
    const Py_ssize_t n = (Py_ssize_t)strlen(kinds);
    if (op < 0 || op >= PL_OP_COUNT || n > PL_MAX_ARGS || n != PyTuple_Size(values))
        return refuse_step();
    Py_ssize_t held = 0;
    for (; held < n; held++)
        if (!(item[held] = step_argument(kinds[held], PyTuple_GetItem(values, held), slots))) break;
    if (held == n) made = run_one(op, item, n);
    while (held) Py_DECREF(item[--held]);
    const int failed = !made || end_step(made, kinds, values, done, slots);
    Py_XDECREF(made);
    if (failed && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "run: a step has an argument of another kind");
    return failed ? -1 : 0;
}

static PyObject *py_run(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *steps, *slots;
    if (!PyArg_ParseTuple(args, "O!O!", &PyTuple_Type, &steps, &PyList_Type, &slots)) return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_Size(steps); i++)
        if (run_step(PyTuple_GetItem(steps, i), slots)) return NULL;
    Py_RETURN_NONE;
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

static PyObject *py_recording(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(recording != NULL);
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
    {"recording", py_recording, METH_NOARGS, "Whether this thread's calls are recorded."},
    {"run", py_run, METH_VARARGS,
     "run(steps, slots): runs the calls of a program, see pyloss/runtime/program.py."},
    {"replay", py_replay, METH_O,
     "replay(calls): checks and runs recorded calls, on the same arrays."},
    {NULL, NULL, 0, NULL}};
