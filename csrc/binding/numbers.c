/* Python numbers as C numbers. */
#include "numbers.h"

#include <stdio.h>

enum { LONGEST_TEXT = 40 /* of a number that a message shows */ };

int pl_refuse_type(const char *operation, const char *name, const char *allowed, PyObject *object) {
    PyObject *type = object == Py_None
                         ? PyUnicode_FromString("None")
                         : PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
    if (type)
        PyErr_Format(PyExc_TypeError, "%s: %s must be %s, not %S", operation, name, allowed, type);
    Py_XDECREF(type);
    return -1;
}

/* Replaces the TypeError or OverflowError of a conversion; -1. */
static int refuse_number(const char *operation, const char *name, const char *allowed,
                         PyObject *object) {
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        pl_refuse_type(operation, name, allowed, object);
    } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyObject *text = PyObject_Str(object); /* NULL: Python limits the digits of an integer */
        if (text && PyUnicode_GetLength(text) <= LONGEST_TEXT) {
            PyErr_Format(PyExc_ValueError, "%s: %s is %S; it must be %s", operation, name, text,
                         allowed);
        } else {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError,
                         "%s: %s is a number of more than %d digits; it must be %s", operation,
                         name, LONGEST_TEXT, allowed);
        }
        Py_XDECREF(text);
    }
    return -1;
}

int pl_whole(const char *operation, const char *name, PyObject *object, int64_t low, int64_t high,
             int64_t *value) {
    long long n = PyLong_AsLongLong(object);
    const int failed = n == -1 && PyErr_Occurred();
    if (!failed && n >= low && n <= high) {
        *value = n;
        return 0;
    }
    char allowed[96];
    snprintf(allowed, sizeof allowed, "a whole number from %lld to %lld", (long long)low,
             (long long)high);
    if (failed) return refuse_number(operation, name, allowed, object);
    PyErr_Format(PyExc_ValueError, "%s: %s is %lld; it must be %s", operation, name, n, allowed);
    return -1;
}

int pl_real(const char *operation, const char *name, PyObject *object, double *value) {
    *value = PyFloat_AsDouble(object);
    return *value == -1 && PyErr_Occurred() ? refuse_number(operation, name, "a number", object)
                                            : 0;
}

int pl_finite(const char *operation, const char *name, PyObject *object, double *value) {
    static const char allowed[] = "a finite number";
    *value = PyFloat_AsDouble(object);
    if (*value == -1 && PyErr_Occurred()) return refuse_number(operation, name, allowed, object);
    if (*value - *value == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s is %S; it must be %s", operation, name, object, allowed);
    return -1;
}
