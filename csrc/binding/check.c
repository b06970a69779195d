/* Checks a call: its arguments one by one, then how they relate to each other. */
#include "check.h"

#include <stdio.h>
#include <string.h>

#include "arguments.h"
#include "numbers.h"

void pl_refuse_count(const pl_spec *spec, Py_ssize_t nargs) {
    char names[PL_MAX_ARGS * (sizeof spec->param->name + 2)] = "";
    size_t used = 0;
    for (int i = 0; i < spec->count; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "",
                                 spec->param[i].name);
    PyErr_Format(PyExc_TypeError, "%s takes %d arguments (%s), got %zd", spec->name, spec->count,
                 names, nargs);
}

static int take_argument(pl_check *c, int index) {
    const pl_spec *spec = c->spec;
    const pl_param *p = &spec->param[index];
    PyObject *object = c->args[index];
    pl_value *value = &c->call->arg[index];
    if (p->optional && object == Py_None) return 0;
    const int makes =
        object == Py_Ellipsis || (object == Py_NotImplemented && pl_may_be_narrow(p->type));
    if (makes && p->output && pl_make_output(c, index)) return -1;
    switch (p->type) {
    case PL_T_INT: return pl_whole(spec->name, p->name, object, INT64_MIN, INT64_MAX, &value->i);
    case PL_T_REAL: return pl_finite(spec->name, p->name, object, &value->f);
    case PL_T_WEIGHT: return pl_take_weight(c, index);
    case PL_T_STACK: return pl_take_stack(c, index);
    case PL_T_FLOAT: return pl_take_rows(c, index);
    default: return pl_take_array(c, index);
    }
}

static int check_constraints(const pl_check *c) {
    const pl_spec *spec = c->spec;
    for (int i = 0; i < spec->constraints; i++) {
        const char letter = spec->constraint[i].multiple, divisor = spec->constraint[i].divisor;
        const int64_t a = PL_DIM(c->call, letter), b = PL_DIM(c->call, divisor);
        const int twice = spec->constraint[i].twice;
        if (twice ? b <= a / 2 : b ? a % b == 0 : a == 0) continue;
        const char *name, *divisor_name;
        const int axis = pl_axis_of(c, letter, &name),
                  divisor_axis = pl_axis_of(c, divisor, &divisor_name);
        PyErr_Format(
            PyExc_ValueError, "%s: axis %d of %s has size %lld; it must be %s axis %d of %s, %lld",
            spec->name, axis, name, (long long)a, twice ? "at least twice" : "a multiple of",
            divisor_axis, divisor_name, (long long)b);
        return -1;
    }
    return 0;
}

/* ---- index arrays */

static int64_t items_of(const pl_param *p, const pl_call *call) {
    int64_t n = 1;
    for (int i = 0; i < p->ndim; i++) n *= pl_dim_size(&p->dim[i], call);
    return n;
}

/* Another thread may write to an index array while the kernel runs. The call reads a copy, so that
 * the kernel reads the values that were checked. */
static int copy_indices(const pl_spec *spec, pl_call *call) {
    size_t total = 0;
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        if ((p->index_limit || p->offsets_end) && call->arg[i].in)
            total += (size_t)items_of(p, call) * sizeof(int32_t);
    }
    if (!total) return 0;
    char *copy = call->indices = PyMem_Malloc(total);
    if (!copy) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        if (!(p->index_limit || p->offsets_end) || !call->arg[i].in) continue;
        const size_t bytes = (size_t)items_of(p, call) * sizeof(int32_t);
        memcpy(copy, call->arg[i].in, bytes);
        call->arg[i].in = copy;
        copy += bytes;
    }
    return 0;
}

static int check_indices(const pl_spec *spec, const pl_param *p, const int32_t *values,
                         const pl_call *call) {
    const int64_t n = items_of(p, call), limit = PL_DIM(call, p->index_limit);
    const int32_t lowest = p->index_ignored ? -1 : 0;
    for (int64_t i = 0; i < n; i++)
        if (values[i] < lowest || values[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "%s: %s at position %lld is %d, outside [0, %lld)%s",
                         spec->name, p->name, (long long)i, (int)values[i], (long long)limit,
                         p->index_ignored ? " and not ignored" : "");
            return -1;
        }
    return 0;
}

static int check_offsets(const pl_spec *spec, const pl_param *p, const int32_t *values,
                         const pl_call *call) {
    const int64_t n = items_of(p, call), end = PL_DIM(call, p->offsets_end);
    int good = n > 0 && values[0] == 0 &&
               (values[n - 1] == end || (p->offsets_may_stop && values[n - 1] < end));
    for (int64_t i = 1; i < n && good; i++) good = values[i] >= values[i - 1];
    if (good) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s must begin with 0, never decrease and end with %s%lld",
                 spec->name, p->name, p->offsets_may_stop ? "at most " : "", (long long)end);
    return -1;
}

/* ---- overlap */

static int has_memory(pl_extent extent) { return extent.begin != extent.end; }

static int overlap(pl_extent a, pl_extent b) {
    return has_memory(a) && has_memory(b) && a.begin < b.end && b.begin < a.end;
}

/* Whether argument `index` reads any of these bytes. A stack may have gaps between its matrices. */
static int reads(const pl_check *c, int index, pl_extent bytes) {
    const pl_param *p = &c->spec->param[index];
    if (!overlap(c->extent[index], bytes)) return 0;
    if (p->type != PL_T_STACK) return 1;
    const int64_t matrices = PL_DIM(c->call, p->dim[0].letter);
    for (int64_t i = 0; i < matrices; i++)
        if (overlap(pl_weight_extent(&c->call->arg[index].stack[i]), bytes)) return 1;
    return 0;
}

/* Whether output and input begin at one address and have element for element the same place, so
 * that the output may be written where the input was read. */
static int same_places(const pl_check *c, int output, int input) {
    const pl_param *a = &c->spec->param[output], *b = &c->spec->param[input];
    if (c->extent[output].begin != c->extent[input].begin) return 0;
    const int float32 = pl_may_be_float32(a->type) && pl_may_be_float32(b->type);
    if ((a->type != b->type && !float32) || a->ndim != b->ndim ||
        memcmp(a->dim, b->dim, sizeof a->dim))
        return 0;
    if ((c->call->narrow >> output & 1) != (c->call->narrow >> input & 1)) return 0;
    if (a->type != PL_T_FLOAT) return 1;
    const pl_rows *written = &c->call->arg[output].rows, *read = &c->call->arg[input].rows;
    if (written->type != read->type) return 0;
    if (read->inner == 1) return written->outer_stride == read->outer_stride;
    return read->outer_stride == read->inner * read->inner_stride &&
           written->outer_stride == read->inner_stride;
}

/* An output overlaps no other argument, unless ops.def lets it overwrite an input. */
static int check_overlap(const pl_check *c, int output) {
    const pl_spec *spec = c->spec;
    for (int i = 0; i < spec->count; i++) {
        if (i == output || !reads(c, i, c->extent[output])) continue;
        if (spec->param[output].in_place && !spec->param[i].output && same_places(c, output, i))
            continue;
        PyErr_Format(PyExc_ValueError, "%s: %s overlaps %s", spec->name, spec->param[output].name,
                     spec->param[i].name);
        return -1;
    }
    return 0;
}

/* ---- the call */

static int check(pl_check *c) {
    const pl_spec *spec = c->spec;
    pl_call *call = c->call;
    call->count = spec->count;
    for (int i = 0; i < spec->count; i++)
        if (spec->param[i].type == PL_T_FLOAT && pl_float_type(c->args[i]) == PL_F64)
            call->wide = 1;
    for (int i = 0; i < spec->count; i++)
        if (take_argument(c, i)) return -1;
    if (check_constraints(c) || copy_indices(spec, call)) return -1;
    for (int i = 0; i < spec->count; i++) {
        const pl_param *p = &spec->param[i];
        /* Empty offsets are wrong, and empty indices are not. */
        if (p->offsets_end && call->arg[i].in && check_offsets(spec, p, call->arg[i].in, call))
            return -1;
        if (!has_memory(c->extent[i])) continue;
        if (p->index_limit && check_indices(spec, p, call->arg[i].in, call)) return -1;
        if (p->output && check_overlap(c, i)) return -1;
    }
    return 0;
}

int pl_check_call(const pl_spec *spec, PyObject *const *args, Py_ssize_t nargs, pl_call *call,
                  PyObject **made) {
    memset(call, 0, sizeof *call);
    PyObject *own[PL_MAX_ARGS];
    pl_check c = {.spec = spec, .args = own, .call = call, .may_make = made != NULL};
    if (nargs != spec->count) {
        pl_refuse_count(spec, nargs);
        return -1;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) own[i] = args[i];
    const int failed = check(&c);
    for (Py_ssize_t i = 0; i < nargs; i++) {
        if (own[i] == args[i]) continue;
        if (failed) Py_DECREF(own[i]);
        else made[i] = own[i];
    }
    if (failed) pl_release_call(spec, call);
    return failed;
}

void pl_release_call(const pl_spec *spec, pl_call *call) {
    for (int i = 0; i < spec->count; i++)
        if (spec->param[i].type == PL_T_STACK) PyMem_Free((void *)call->arg[i].stack);
    PyMem_Free(call->indices);
}
