/* Argument specifications: the text in ops.def, parsed once, and the check of a call against it. */
#ifndef PYLOSS_SPEC_H
#define PYLOSS_SPEC_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../pyloss.h"

typedef enum {
    PL_T_F32,
    PL_T_F64,
    PL_T_I32,
    PL_T_I64,
    PL_T_U8,
    PL_T_WEIGHT,
    PL_T_STACK,
    PL_T_FLOAT,
    PL_T_ACC,
    PL_T_INT,
    PL_T_REAL
} pl_type;

enum { PL_MAX_DIMS = 4, PL_MAX_CONSTRAINTS = 2, PL_MAX_STACK = 1 << 16 };

typedef struct {
    char letter; /* 0: the number `size` */
    char rule;   /* 0, '+' (one more), '/' (half), '*' (all leading dimensions) */
    int64_t size;
} pl_dim_spec;

typedef struct {
    char name[24];
    pl_type type;
    int output, optional;
    int in_place;            /* may be the same memory as an input */
    int in_place_on_devices; /* there too */
    int ndim;
    pl_dim_spec dim[PL_MAX_DIMS];
    char below;         /* index values in [0, below) */
    int below_ignored;  /* and -1 */
    char offsets_to;    /* offsets ending at this dimension */
    int offsets_before; /* or before it */
} pl_param;

typedef struct {
    const char *name, *text;
    int count;
    pl_param param[PL_MAX_ARGS];
    int constraints;
    char multiple[PL_MAX_CONSTRAINTS], of[PL_MAX_CONSTRAINTS];
} pl_spec;

/* -1 with SystemError set when the text is malformed. */
int pl_spec_parse(pl_spec *spec, const char *name, const char *text);

/* Checks `args` and fills `call`; -1 with TypeError or ValueError set. Touches no array's data but index arrays. */
int pl_spec_check(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs, pl_call *call);
/* Frees what a checked call holds. */
void pl_spec_release(const pl_spec *spec, pl_call *call);
/* Raises TypeError for a call with `nargs` arguments, which are too few or too many. */
void pl_spec_refuse_count(const pl_spec *spec, Py_ssize_t nargs);

/* A Python integer from `low` to `high`; -1 with TypeError or ValueError set, which name the operation and the number. */
int pl_whole(const char *operation, const char *name, PyObject *object, int64_t low, int64_t high,
             int64_t *value);

#endif
