/* An operation as its line in ops.def declares it. The text is parsed once, when the module is
 * imported; ops.def explains its language. */
#ifndef PYLOSS_BINDING_SPEC_H
#define PYLOSS_BINDING_SPEC_H

#include "../pyloss.h"

#include <string.h>

typedef enum {
    PL_T_F32,
    PL_T_F64,
    PL_T_I32,
    PL_T_I64,
    PL_T_U8,
    PL_T_WEIGHT,
    PL_T_STACK,
    PL_T_FLOAT,
    PL_T_HALF,
    PL_T_ACT,
    PL_T_ACC,
    PL_T_INT,
    PL_T_REAL,
    PL_T_COUNT
} pl_type;

enum { PL_MAX_DIMS = 4, PL_MAX_CONSTRAINTS = 2 };

/* One dimension of an argument. */
typedef struct {
    char letter;  /* 0: the dimension is the number `size` */
    char rule;    /* '+': letter + 1; '/': letter / 2; '*': all leading axes together; 0: letter */
    char more[2]; /* letters that are added, or 0 */
    int64_t size; /* used without a letter */
} pl_dim_spec;

/* One argument. */
typedef struct {
    char name[24];
    pl_type type;
    int output, optional;
    int updated;             /* an output whose values are read too */
    int in_place;            /* an output that may use the memory of an input... */
    int in_place_on_devices; /* ...in device memory too */
    int ndim;
    pl_dim_spec dim[PL_MAX_DIMS];
    char index_limit;     /* a letter: the values are indices in [0, limit); 0: they are not */
    int index_ignored;    /* an index may also be -1 */
    char offsets_end;     /* a letter: the values are offsets that end there; 0: they are not */
    int offsets_may_stop; /* the last offset may be less than the end */
} pl_param;

typedef struct {
    const char *name, *text;
    int count; /* of arguments */
    pl_param param[PL_MAX_ARGS];
    int constraints;
    struct {
        char multiple, divisor; /* letters: the first is a multiple of the second... */
        int twice;              /* ...or at least twice the second */
    } constraint[PL_MAX_CONSTRAINTS];
} pl_spec;

/* Whether an operation's call adds to the values of its last output. */
static inline int pl_accumulates(const pl_spec *spec, const pl_call *call) {
    for (int i = 0; i < spec->count; i++)
        if (!strcmp(spec->param[i].name, "accumulate")) return call->arg[i].i != 0;
    return 0;
}

/* Whether arguments of a type may be bfloat16. */
static inline int pl_may_be_narrow(pl_type type) { return type == PL_T_HALF || type == PL_T_ACT; }
/* Whether they are float32 unless they are bfloat16. */
static inline int pl_may_be_float32(pl_type type) {
    return type == PL_T_F32 || pl_may_be_narrow(type);
}

/* Parses `text`; NULL, or where in the text the error is. */
const char *pl_spec_parse(pl_spec *spec, const char *name, const char *text);

/* A dimension's size, once the letters have theirs. */
static inline int64_t pl_dim_size(const pl_dim_spec *d, const pl_call *call) {
    if (!d->letter) return d->size;
    int64_t size = PL_DIM(call, d->letter);
    for (int i = 0; i < 2 && d->more[i]; i++) size += PL_DIM(call, d->more[i]);
    return d->rule == '+' ? size + 1 : d->rule == '/' ? size / 2 : size;
}

#endif
