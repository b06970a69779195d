/* The check of a call, argument by argument: each pl_take_* function checks one argument against
 * its declaration and fills its pl_value. They return -1 with TypeError or ValueError set. */
#ifndef PYLOSS_BINDING_ARGUMENTS_H
#define PYLOSS_BINDING_ARGUMENTS_H

#include "numpy_api.h"
#include "spec.h"

enum { PL_MAX_STACK = 1 << 16 /* matrices */ };

/* Where an argument's memory begins and ends. */
typedef struct {
    const char *begin, *end;
} pl_extent;

/* A call that is being checked. */
typedef struct {
    const pl_spec *spec;
    PyObject **args;               /* `...` is replaced by the array that the call makes */
    pl_call *call;                 /* filled by the check */
    int may_make;                  /* whether the call may make arrays */
    pl_extent extent[PL_MAX_ARGS]; /* begin == end: the argument has no memory */
    uint32_t bound;                /* bit i: the letter 'A' + i has its size, in call->dim */
    int bound_by[26];              /* the argument that gave the letter its size */
} pl_check;

/* arrays.c */

/* A C-contiguous, aligned array of type `npy` in native byte order, writeable if it is an output;
 * NULL with an exception set for any other object. */
PyArrayObject *pl_plain_array(const pl_spec *spec, const pl_param *p, PyObject *object, int npy);
/* The PL_F32, ... of an array that a `float` argument takes; -1 for other objects. bfloat16, a type
 * that NumPy lacks, comes as uint16. */
int pl_float_type(PyObject *object);
/* An array of one fixed type, or of the `acc`, `half` or `act` type. */
int pl_take_array(pl_check *c, int index);
/* Puts a new array in the place of an output that is `...`, or NotImplemented for one in bfloat16;
 * the caller owns it. */
int pl_make_output(pl_check *c, int index);
/* A `float` argument. */
int pl_take_rows(pl_check *c, int index);
/* Dimension `i` of argument `index`, which is its axis `axis` (-1: all leading axes together), has
 * the size `actual`: gives the dimension's letter this size, or compares it. */
int pl_match_dim(pl_check *c, int index, int i, int axis, int64_t actual);
/* The axis of the argument that gave `letter` its size, and the argument's name. */
int pl_axis_of(const pl_check *c, char letter, const char **name);

/* weights.c */

int pl_take_weight(pl_check *c, int index);
/* Allocates the stack of the call; pl_release_call frees it, also after an error. */
int pl_take_stack(pl_check *c, int index);
pl_extent pl_weight_extent(const pl_weight *w);

#endif
