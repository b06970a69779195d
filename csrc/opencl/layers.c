/* Launches layers.cl. */
#include "runtime.h"

#include <string.h>

enum { ROWS = 32 }; /* rows that add into one part of a sum over columns */

/* A processor's core takes a row; on others a group does. */
static pl_cl_shape shape_of(const pl_cl_operation *o) {
    pl_cl_shape shape = pl_cl_is_cpu(o->device) ? (pl_cl_shape){1, 16, 8} : (pl_cl_shape){64, 4, 2};
    if (pl_cl_forced_shape.group) shape = pl_cl_forced_shape;
    while ((size_t)shape.group > o->device->info->max_group && shape.group > 1) shape.group /= 2;
    return shape;
}

static pl_cl_launch begin(const pl_cl_operation *o) { return pl_cl_begin(o, pl_cl_source_layers, shape_of(o), 0); }

/* A kernel with a group for each row. */
static int run(pl_cl_launch *l, const char *kernel, int64_t rows) {
    return pl_cl_enqueue(l, kernel, (size_t)rows, (size_t)shape_of(l->operation).group, NULL);
}

/* A kernel with a work-item for each of n elements. */
static int run_items(pl_cl_launch *l, const char *kernel, int64_t n) {
    size_t group = (size_t)shape_of(l->operation).group;
    return pl_cl_enqueue(l, kernel, ((size_t)n + group - 1) / group, group, NULL);
}

/* A kernel whose work-items have columns of their own, for so many parts of the rows. */
static int run_columns(pl_cl_launch *l, const char *kernel, int64_t columns, int64_t parts) {
    pl_cl_shape shape = shape_of(l->operation);
    int64_t step = (int64_t)shape.group * shape.width;
    return pl_cl_enqueue(l, kernel, (size_t)((columns + step - 1) / step * parts), (size_t)shape.group, NULL);
}

static int64_t dim(const pl_cl_operation *o, char letter) { return PL_DIM(o->call, letter); }

/* out [d] = the sum over n rows of a (b - offset) rstd, as far as these are there. */
static int sum_columns(const pl_cl_operation *o, pl_cl_place a, pl_cl_place b, pl_cl_place offset, pl_cl_place rstd,
                       pl_cl_place out, int64_t n) {
    int64_t d = dim(o, 'D'), parts = (n + ROWS - 1) / ROWS;
    pl_cl_place partial = pl_cl_scratch(o, (size_t)(parts * d) * sizeof(float));
    if (!partial.buffer) return 1;
    pl_cl_launch l = begin(o), join = begin(o);
    const pl_cl_place places[] = {a, b, offset, rstd, partial};
    for (int i = 0; i < 5; i++) pl_cl_add_place(&l, places[i], 4);
    pl_cl_add_i64(&l, n);
    pl_cl_add_i64(&l, ROWS);
    pl_cl_add_i64(&l, d);
    pl_cl_add_place(&join, partial, 4);
    pl_cl_add_place(&join, out, 4);
    pl_cl_add_i64(&join, parts);
    pl_cl_add_i64(&join, d);
    int failed = run_columns(&l, "sum_columns", d, parts) || run_items(&join, "join_columns", d);
    pl_cl_buffer_release(partial.buffer);
    return failed;
}

/* Kernels whose arguments are some of the call's, in this order: arrays of 4-byte elements and then of bytes by their numbers
 * (see pl_cl_add_arrays), a flag, sizes by their letters, a number; -1 and "" where there are none. `over` is the size that a
 * group has one of, or with `items` a work-item. */
typedef struct {
    const char *name, *arrays, *bytes;
    int flag;
    const char *sizes;
    int real;
    char over;
    int items;
} plain_kernel;

static const plain_kernel plain[] = {
    {"rms_norm_forward", "0134", "", -1, "D", 2, 'N', 0},
    {"rms_norm_grad", "01234", "", -1, "D", -1, 'N', 0},
    {"rope", "01235", "", 4, "HD", -1, 'N', 0},
    {"gather_rows", "012", "", -1, "D", -1, 'M', 0},
    {"combine_rows", "013", "", 2, "KD", -1, 'N', 0},
    {"scale_rows", "012", "", -1, "D", -1, 'N', 0},
    {"scale_columns", "012", "", -1, "D", -1, 'N', 0},
    {"transpose", "01", "", -1, "DN", -1, 'N', 0},
    {"scale_rows_grad", "01234", "", -1, "D", -1, 'N', 0},
    {"columns_above", "01", "2", -1, "NV", -1, 'V', 1},
    {"gather_columns", "012", "", -1, "VM", -1, 'N', 0},
    {"top_experts", "01", "", -1, "EKN", -1, 'N', 1},
    {"visit_weights", "0124", "", 3, "EKN", -1, 'N', 1},
    {"visit_weights_grad", "01235", "", 4, "EKN", -1, 'N', 1},
};

static int run_plain(const pl_cl_operation *o, const plain_kernel *k) {
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, k->arrays, 4);
    pl_cl_add_arrays(&l, k->bytes, 1);
    if (k->flag >= 0) pl_cl_add_i64(&l, o->call->arg[k->flag].i != 0);
    for (const char *size = k->sizes; *size; size++) pl_cl_add_i64(&l, dim(o, *size));
    if (k->real >= 0) pl_cl_add_f32(&l, o->call->arg[k->real].f);
    return k->items ? run_items(&l, k->name, dim(o, k->over)) : run(&l, k->name, dim(o, k->over));
}

/* The gradient by the weights, after that by the rows. */
static int sum_norm_grad(const pl_cl_operation *o) {
    const pl_cl_place *p = o->place;
    return p[5].buffer ? sum_columns(o, p[0], p[1], (pl_cl_place){NULL, 0}, p[3], p[5], dim(o, 'N')) : 0;
}

static int column_sum(const pl_cl_operation *o) {
    pl_cl_place none = {NULL, 0};
    return sum_columns(o, o->place[0], none, none, none, o->place[1], dim(o, 'N'));
}

static int column_dot(const pl_cl_operation *o) {
    return sum_columns(o, o->place[0], o->place[1], o->place[2], (pl_cl_place){NULL, 0}, o->place[3], dim(o, 'N'));
}

/* Row m of argument 0 to the row of argument 2 that argument 1 names: added, or `put` in its place. */
static int add_rows(const pl_cl_operation *o, int64_t count, int put) {
    int64_t parts = 4 * o->device->info->units;
    pl_cl_launch l = begin(o);
    pl_cl_add_arrays(&l, "012", 4);
    pl_cl_add_i64(&l, put);
    pl_cl_add_i64(&l, count);
    pl_cl_add_i64(&l, parts);
    pl_cl_add_i64(&l, dim(o, 'D'));
    return run_columns(&l, "add_rows", dim(o, 'D'), parts);
}
static int embedding_grad(const pl_cl_operation *o) { return add_rows(o, dim(o, 'N'), 0); }
static int put_rows(const pl_cl_operation *o) { return add_rows(o, dim(o, 'M'), 1); }
static int scatter_add_rows(const pl_cl_operation *o) {
    return pl_cl_zero(o, o->place[2], dim(o, 'N') * dim(o, 'D')) || add_rows(o, dim(o, 'M'), 0);
}

int pl_cl_layer(const char *name, const pl_cl_operation *o) {
    static const struct {
        const char *name;
        int (*run)(const pl_cl_operation *);
    } special[] = {{"rms_norm_grad", sum_norm_grad},
                   {"column_sum", column_sum},
                   {"column_dot", column_dot},
                   {"embedding_grad", embedding_grad},
                   {"scatter_add_rows", scatter_add_rows},
                   {"put_rows", put_rows}};
    int known = 0;
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        if (strcmp(plain[i].name, name)) continue;
        if (run_plain(o, &plain[i])) return 1;
        known = 1;
    }
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        if (!strcmp(special[i].name, name)) return special[i].run(o);
    return known ? 0 : -1;
}
