/* The function _core.encode. */
#ifndef PYLOSS_BINDING_ENCODE_H
#define PYLOSS_BINDING_ENCODE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../pyloss.h"

extern PyMethodDef pl_encode_functions[];

#endif
