/* The check of a whole call against its operation's declaration. */
#ifndef PYLOSS_BINDING_CHECK_H
#define PYLOSS_BINDING_CHECK_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "spec.h"

/* Fills `call`; -1 with TypeError or ValueError set. Reads no array's data but that of indices.
 * Unless `made` is NULL, an output may be `...`: then made[i], NULL before, is its new array. */
int pl_check_call(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs, pl_call *call,
                  PyObject **made);
/* Frees what a checked call holds. */
void pl_release_call(const pl_spec *spec, pl_call *call);
/* Raises TypeError for a wrong number of arguments, with their names. */
void pl_refuse_count(const pl_spec *spec, Py_ssize_t nargs);

#endif
