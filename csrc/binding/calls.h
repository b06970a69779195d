/* The functions _core.<operation>, recorded calls, and the kernels in use. */
#ifndef PYLOSS_BINDING_CALLS_H
#define PYLOSS_BINDING_CALLS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "spec.h"

/* Parses ops.def and takes the best kernels; -1 with SystemError set. */
int pl_calls_init(void);

extern pl_spec pl_specs[PL_OP_COUNT];
extern const pl_table *pl_kernels; /* the kernels in use, of one instruction set */

/* A function for each operation, then `record` and `replay`. */
extern PyMethodDef pl_call_functions[];

#endif
