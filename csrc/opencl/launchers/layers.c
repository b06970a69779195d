/* Launches layers.cl. */
#include "../launch.h"
#include "args.h"
#include "places.h"

enum { ROWS = 32 }; /* rows of one part of a column sum */

/* A row for each work-item of a processor, or for each group of a GPU. */
static pl_cl_shape shape_of(const pl_cl_operation *o) {
    pl_cl_shape shape = pl_cl_is_cpu(o->device) ? (pl_cl_shape){1, 16, 8} : (pl_cl_shape){64, 4, 2};
    if (pl_cl_forced_shape.group) shape = pl_cl_forced_shape;
    while ((size_t)shape.group > o->device->info->max_group && shape.group > 1) shape.group /= 2;
    return shape;
}

static pl_cl_launch begin(const pl_cl_operation *o) {
    return pl_cl_begin(o, pl_cl_source_layers, shape_of(o), 0);
}

/* Enqueues a kernel with a group for each row. */
static int run(pl_cl_launch *l, const char *kernel, int64_t rows) {
    return pl_cl_enqueue(l, kernel, (size_t)rows, (size_t)shape_of(l->operation).group, NULL);
}

/* Enqueues a kernel with a work-item for each of n elements. */
static int run_items(pl_cl_launch *l, const char *kernel, int64_t n) {
    size_t group = (size_t)shape_of(l->operation).group;
    return pl_cl_enqueue(l, kernel, ((size_t)n + group - 1) / group, group, NULL);
}

/* Enqueues a kernel whose work-items have some columns each, for `parts` parts of the rows. */
static int run_columns(pl_cl_launch *l, const char *kernel, int64_t columns, int64_t parts) {
    pl_cl_shape shape = shape_of(l->operation);
    int64_t step = (int64_t)shape.group * shape.width;
    return pl_cl_enqueue(l, kernel, (size_t)((columns + step - 1) / step * parts),
                         (size_t)shape.group, NULL);
}

static int64_t dim(const pl_cl_operation *o, char letter) { return PL_DIM(o->call, letter); }

/* out [D] = the sum over the N rows of a (b - offset) rstd, without the arrays that are absent. */
static int sum_columns(const pl_cl_operation *o, pl_cl_place a, pl_cl_place b, pl_cl_place offset,
                       pl_cl_place rstd, pl_cl_place out) {
    int64_t n = dim(o, 'N'), d = dim(o, 'D'), parts = (n + ROWS - 1) / ROWS;
    pl_cl_place partial = pl_cl_scratch(o, (size_t)(parts * d) * sizeof(float));
    if (!partial.buffer) return 1;
    pl_cl_launch l = begin(o), join = begin(o);
    pl_cl_add_places(&l, 4, a, b, offset, rstd, partial);
    pl_cl_add_i64(&l, n);
    pl_cl_add_i64(&l, ROWS);
    pl_cl_add_i64(&l, d);
    pl_cl_add_places(&join, 4, partial, out);
    pl_cl_add_i64(&join, parts);
    pl_cl_add_i64(&join, d);
    int failed = run_columns(&l, "sum_columns", d, parts) || run_items(&join, "join_columns", d);
    pl_cl_buffer_release(partial.buffer);
    return failed;
}

static const pl_cl_place absent = {NULL, 0};

/* Adds sizes, given by their letters in ops.def. */
static void add_sizes(pl_cl_launch *l, const char *letters) {
    for (; *letters; letters++) pl_cl_add_i64(l, dim(l->operation, *letters));
}

int pl_cl_launch_rms_norm_forward(const pl_cl_operation *o) {
    const rms_norm_forward_args args = rms_norm_forward_args_of(o->call);
    const rms_norm_forward_places at = rms_norm_forward_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.w, at.y, at.rstd);
    add_sizes(&l, "D");
    pl_cl_add_f32(&l, args.eps);
    return run(&l, "rms_norm_forward", dim(o, 'N'));
}

int pl_cl_launch_rms_norm_grad(const pl_cl_operation *o) {
    const rms_norm_grad_places at = rms_norm_grad_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.dy, at.x, at.w, at.rstd, at.dx);
    add_sizes(&l, "D");
    if (run(&l, "rms_norm_grad", dim(o, 'N'))) return 1;
    return at.dw.buffer ? sum_columns(o, at.dy, at.x, absent, at.rstd, at.dw) : 0;
}

int pl_cl_launch_rope(const pl_cl_operation *o) {
    const rope_args args = rope_args_of(o->call);
    const rope_places at = rope_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.positions, at.cos, at.sin, at.y);
    pl_cl_add_i64(&l, args.inverse != 0);
    add_sizes(&l, "HDR");
    return run(&l, "rope", dim(o, 'N'));
}

int pl_cl_launch_short_conv_forward(const pl_cl_operation *o) {
    const short_conv_forward_places at = short_conv_forward_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.w, at.bias, at.offsets, at.y);
    add_sizes(&l, "DKS");
    return run(&l, "short_conv_forward", dim(o, 'N'));
}

int pl_cl_launch_short_conv_grad(const pl_cl_operation *o) {
    const short_conv_grad_places at = short_conv_grad_places_of(o);
    pl_cl_launch l = begin(o), sums = begin(o);
    pl_cl_add_places(&l, 4, at.dy, at.x, at.w, at.bias, at.offsets, at.dx);
    add_sizes(&l, "DKS");
    if (run(&l, "short_conv_grad", dim(o, 'N'))) return 1;
    if (!at.dw.buffer && !at.dbias.buffer) return 0;
    pl_cl_add_places(&sums, 4, at.dy, at.x, at.offsets, at.dw, at.dbias);
    add_sizes(&sums, "DKS");
    return run_items(&sums, "short_conv_weight_grad", dim(o, 'D') * (dim(o, 'K') + 1));
}

int pl_cl_launch_short_conv_step(const pl_cl_operation *o) {
    const short_conv_step_places at = short_conv_step_places_of(o);
    pl_cl_launch put = begin(o), l = begin(o);
    pl_cl_add_places(&put, 4, at.x, at.rows, at.store);
    add_sizes(&put, "D");
    if (run(&put, "short_conv_put", dim(o, 'N'))) return 1;
    pl_cl_add_places(&l, 4, at.x, at.w, at.bias, at.q_offsets, at.k_offsets, at.store, at.y);
    add_sizes(&l, "DKS");
    return run(&l, "short_conv_step", dim(o, 'N'));
}

int pl_cl_launch_gather_rows(const pl_cl_operation *o) {
    const gather_rows_places at = gather_rows_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.rows, at.y);
    add_sizes(&l, "D");
    return run(&l, "gather_rows", dim(o, 'M'));
}

int pl_cl_launch_combine_rows(const pl_cl_operation *o) {
    const combine_rows_args args = combine_rows_args_of(o->call);
    const combine_rows_places at = combine_rows_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.rows, at.y);
    pl_cl_add_i64(&l, args.accumulate != 0);
    add_sizes(&l, "KD");
    return run(&l, "combine_rows", dim(o, 'N'));
}

int pl_cl_launch_scale_rows(const pl_cl_operation *o) {
    const scale_rows_places at = scale_rows_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.factor, at.y);
    add_sizes(&l, "D");
    return run(&l, "scale_rows", dim(o, 'N'));
}

int pl_cl_launch_scale_columns(const pl_cl_operation *o) {
    const scale_columns_places at = scale_columns_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.factor, at.y);
    add_sizes(&l, "D");
    return run(&l, "scale_columns", dim(o, 'N'));
}

int pl_cl_launch_adafactor_update(const pl_cl_operation *o) {
    const adafactor_update_args args = adafactor_update_args_of(o->call);
    const adafactor_update_places at = adafactor_update_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.grad, at.row, at.col, at.u);
    add_sizes(&l, "D");
    pl_cl_add_f32(&l, args.grad_scale);
    pl_cl_add_f32(&l, args.least);
    return run(&l, "adafactor_update", dim(o, 'N'));
}

int pl_cl_launch_transpose(const pl_cl_operation *o) {
    const transpose_places at = transpose_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.y);
    add_sizes(&l, "DN");
    return run(&l, "transpose", dim(o, 'N'));
}

int pl_cl_launch_scale_rows_grad(const pl_cl_operation *o) {
    const scale_rows_grad_places at = scale_rows_grad_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.dy, at.x, at.factor, at.dx, at.dfactor);
    add_sizes(&l, "D");
    return run(&l, "scale_rows_grad", dim(o, 'N'));
}

int pl_cl_launch_columns_above(const pl_cl_operation *o) {
    const columns_above_places at = columns_above_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.bound);
    pl_cl_add_place(&l, at.above, 1);
    add_sizes(&l, "NV");
    return run_items(&l, "columns_above", dim(o, 'V'));
}

int pl_cl_launch_gather_columns(const pl_cl_operation *o) {
    const gather_columns_places at = gather_columns_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.columns, at.y);
    add_sizes(&l, "VM");
    return run(&l, "gather_columns", dim(o, 'N'));
}

int pl_cl_launch_concat_columns(const pl_cl_operation *o) {
    const concat_columns_places at = concat_columns_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.a, at.b, at.c, at.y);
    add_sizes(&l, "ABC");
    return run(&l, "concat_columns", dim(o, 'N'));
}

int pl_cl_launch_top_experts(const pl_cl_operation *o) {
    const top_experts_places at = top_experts_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.logits, at.chosen);
    add_sizes(&l, "EKN");
    return run_items(&l, "top_experts", dim(o, 'N'));
}

int pl_cl_launch_visit_weights(const pl_cl_operation *o) {
    const visit_weights_args args = visit_weights_args_of(o->call);
    const visit_weights_places at = visit_weights_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.logits, at.chosen, at.visits, at.weights);
    pl_cl_add_i64(&l, args.normalize != 0);
    add_sizes(&l, "EKN");
    return run_items(&l, "visit_weights", dim(o, 'N'));
}

int pl_cl_launch_visit_weights_grad(const pl_cl_operation *o) {
    const visit_weights_grad_args args = visit_weights_grad_args_of(o->call);
    const visit_weights_grad_places at = visit_weights_grad_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.dweights, at.logits, at.chosen, at.visits, at.dlogits);
    pl_cl_add_i64(&l, args.normalize != 0);
    add_sizes(&l, "EKN");
    return run_items(&l, "visit_weights_grad", dim(o, 'N'));
}

int pl_cl_launch_column_sum(const pl_cl_operation *o) {
    const column_sum_places at = column_sum_places_of(o);
    return sum_columns(o, at.x, absent, absent, absent, at.y);
}

int pl_cl_launch_column_dot(const pl_cl_operation *o) {
    const column_dot_places at = column_dot_places_of(o);
    return sum_columns(o, at.dy, at.y, at.offset, absent, at.out);
}

/* to[rows[m],:] += from[m,:] for m < count, or with `put` = from[m,:]. */
static int add_rows(const pl_cl_operation *o, pl_cl_place from, pl_cl_place rows, pl_cl_place to,
                    int64_t count, int put) {
    int64_t parts = 4 * o->device->info->units;
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, from, rows, to);
    pl_cl_add_i64(&l, put);
    pl_cl_add_i64(&l, count);
    pl_cl_add_i64(&l, parts);
    pl_cl_add_i64(&l, dim(o, 'D'));
    return run_columns(&l, "add_rows", dim(o, 'D'), parts);
}

int pl_cl_launch_embedding_grad(const pl_cl_operation *o) {
    const embedding_grad_places at = embedding_grad_places_of(o);
    return add_rows(o, at.dy, at.ids, at.dw, dim(o, 'N'), 0);
}

int pl_cl_launch_put_rows(const pl_cl_operation *o) {
    const put_rows_places at = put_rows_places_of(o);
    return add_rows(o, at.x, at.rows, at.y, dim(o, 'M'), 1);
}

int pl_cl_launch_scatter_add_rows(const pl_cl_operation *o) {
    const scatter_add_rows_places at = scatter_add_rows_places_of(o);
    return pl_cl_zero(o, at.dx, dim(o, 'N') * dim(o, 'D')) ||
           add_rows(o, at.dy, at.rows, at.dx, dim(o, 'M'), 0);
}
