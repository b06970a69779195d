/* Python numbers as C numbers, with errors that name the operation, the number and its range.
 * Every function returns -1 with TypeError or ValueError set where the object is refused. */
#ifndef PYLOSS_BINDING_NUMBERS_H
#define PYLOSS_BINDING_NUMBERS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* An integer from `low` to `high`. */
int pl_whole(const char *operation, const char *name, PyObject *object, int64_t low, int64_t high,
             int64_t *value);
/* A number; it may be infinite or NaN. */
int pl_real(const char *operation, const char *name, PyObject *object, double *value);
/* A number that is neither infinite nor NaN. */
int pl_finite(const char *operation, const char *name, PyObject *object, double *value);

/* Raises TypeError "<operation>: <name> must be <allowed>, not <type of the object>"; -1. */
int pl_refuse_type(const char *operation, const char *name, const char *allowed, PyObject *object);

#endif
