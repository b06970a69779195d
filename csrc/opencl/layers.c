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

static void add_arrays(pl_cl_launch *l, const int *index, int count) {
    for (int i = 0; i < count; i++) pl_cl_add_array(l, index[i], 4);
}
#define ARRAYS(l, ...) add_arrays(l, (const int[]){__VA_ARGS__}, (int)(sizeof((const int[]){__VA_ARGS__}) / sizeof(int)))

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

static int rms_norm_forward(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 3, 4);
    pl_cl_add_i64(&l, dim(o, 'D'));
    pl_cl_add_f32(&l, o->call->arg[2].f);
    return run(&l, "rms_norm_forward", dim(o, 'N'));
}

static int rms_norm_grad(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2, 3, 4);
    pl_cl_add_i64(&l, dim(o, 'D'));
    if (run(&l, "rms_norm_grad", dim(o, 'N'))) return 1;
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

static int rope(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2, 3, 5);
    pl_cl_add_i64(&l, dim(o, 'H'));
    pl_cl_add_i64(&l, dim(o, 'D') / 2);
    pl_cl_add_f32(&l, o->call->arg[4].i ? -1 : 1);
    return run(&l, "rope", dim(o, 'N'));
}

static int gather_rows(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2);
    pl_cl_add_i64(&l, dim(o, 'D'));
    return run(&l, "gather_rows", dim(o, 'M'));
}

/* Row m of argument 0 to the row of argument 2 that argument 1 names: added, or `put` in its place. */
static int add_rows(const pl_cl_operation *o, int64_t count, int put) {
    int64_t parts = 4 * o->device->info->units;
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2);
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

static int combine_rows(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 3);
    pl_cl_add_i64(&l, dim(o, 'K'));
    pl_cl_add_i64(&l, o->call->arg[2].i != 0);
    pl_cl_add_i64(&l, dim(o, 'D'));
    return run(&l, "combine_rows", dim(o, 'N'));
}

static int scale_rows(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2);
    pl_cl_add_i64(&l, dim(o, 'D'));
    return run(&l, "scale_rows", dim(o, 'N'));
}

static int scale_rows_grad(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2, 3, 4);
    pl_cl_add_i64(&l, dim(o, 'D'));
    return run(&l, "scale_rows_grad", dim(o, 'N'));
}

static int columns_above(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1);
    pl_cl_add_array(&l, 2, 1);
    pl_cl_add_i64(&l, dim(o, 'N'));
    pl_cl_add_i64(&l, dim(o, 'V'));
    return run_items(&l, "columns_above", dim(o, 'V'));
}

static int gather_columns(const pl_cl_operation *o) {
    pl_cl_launch l = begin(o);
    ARRAYS(&l, 0, 1, 2);
    pl_cl_add_i64(&l, dim(o, 'V'));
    pl_cl_add_i64(&l, dim(o, 'M'));
    return run(&l, "gather_columns", dim(o, 'N'));
}

int pl_cl_layer(const char *name, const pl_cl_operation *o) {
#define LAUNCHER(name) \
    { #name, name }
    static const struct {
        const char *name;
        int (*run)(const pl_cl_operation *);
    } all[] = {LAUNCHER(rms_norm_forward), LAUNCHER(rms_norm_grad), LAUNCHER(rope),          LAUNCHER(column_sum),
               LAUNCHER(column_dot),       LAUNCHER(gather_rows),   LAUNCHER(combine_rows),  LAUNCHER(embedding_grad),
               LAUNCHER(scatter_add_rows), LAUNCHER(scale_rows),    LAUNCHER(columns_above), LAUNCHER(scale_rows_grad),
               LAUNCHER(gather_columns),   LAUNCHER(put_rows)};
#undef LAUNCHER
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i].name, name)) return all[i].run(o);
    return -1;
}
