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

int pl_cl_launch_conv_silu_forward(const pl_cl_operation *o) {
    const conv_silu_forward_places at = conv_silu_forward_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.x, at.w, at.bias, at.offsets, at.y);
    add_sizes(&l, "DKS");
    return run(&l, "conv_silu_forward", dim(o, 'N'));
}

static int conv_silu_grad(const pl_cl_operation *o, pl_cl_place slope) {
    const conv_silu_grad_places at = conv_silu_grad_places_of(o);
    pl_cl_launch first = begin(o), l = begin(o), sums = begin(o);
    pl_cl_add_places(&first, 4, at.dy, at.x, at.w, at.bias, at.offsets, slope);
    add_sizes(&first, "DKS");
    pl_cl_add_places(&l, 4, slope, at.w, at.offsets, at.dx);
    add_sizes(&l, "DKS");
    if (run(&first, "conv_silu_slope", dim(o, 'N')) || run(&l, "conv_silu_grad", dim(o, 'N')))
        return 1;
    if (!at.dw.buffer && !at.dbias.buffer) return 0;
    pl_cl_add_places(&sums, 4, slope, at.x, at.offsets, at.dw, at.dbias);
    add_sizes(&sums, "DKS");
    return run_items(&sums, "conv_silu_weight_grad", dim(o, 'D') * (dim(o, 'K') + 1));
}
int pl_cl_launch_conv_silu_grad(const pl_cl_operation *o) {
    const size_t elements = (size_t)(dim(o, 'N') * dim(o, 'D'));
    const pl_cl_place slope = pl_cl_scratch(o, (elements + 1) * sizeof(float));
    if (!slope.buffer) return 1;
    const int failed = conv_silu_grad(o, slope);
    pl_cl_buffer_release(slope.buffer);
    return failed;
}

int pl_cl_launch_conv_silu_step(const pl_cl_operation *o) {
    const conv_silu_step_places at = conv_silu_step_places_of(o);
    pl_cl_launch put = begin(o), l = begin(o);
    pl_cl_add_places(&put, 4, at.x, at.rows, at.store);
    add_sizes(&put, "D");
    if (run(&put, "conv_silu_put", dim(o, 'N'))) return 1;
    pl_cl_add_places(&l, 4, at.w, at.bias, at.q_offsets, at.k_offsets, at.store, at.y);
    add_sizes(&l, "DKS");
    return run(&l, "conv_silu_step", dim(o, 'N'));
}

/* ---- the gated delta rule */

static pl_cl_launch begin_delta(const pl_cl_operation *o) {
    return pl_cl_begin(o, pl_cl_source_delta, shape_of(o), 0);
}

int pl_cl_launch_delta_rule_forward(const pl_cl_operation *o) {
    const delta_rule_forward_args args = delta_rule_forward_args_of(o->call);
    const delta_rule_forward_places at = delta_rule_forward_places_of(o);
    pl_cl_place last = at.last;
    const size_t states = (size_t)(dim(o, 'B') * dim(o, 'H') * dim(o, 'D') * dim(o, 'E'));
    if (!last.buffer) last = pl_cl_scratch(o, (states + 1) * sizeof(float));
    if (!last.buffer) return 1;
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.q, at.k, at.v, at.g, at.beta, at.offsets, absent, absent, at.state,
                     last, at.o);
    add_sizes(&l, "GHDE");
    pl_cl_add_f32(&l, args.scale);
    pl_cl_add_f32(&l, args.eps);
    pl_cl_add_i64(&l, args.delta != 0);
    const int failed = run(&l, "delta_rule", dim(o, 'B') * dim(o, 'H'));
    if (!at.last.buffer) pl_cl_buffer_release(last.buffer);
    return failed;
}

int pl_cl_launch_delta_rule_step(const pl_cl_operation *o) {
    const delta_rule_step_args args = delta_rule_step_args_of(o->call);
    const delta_rule_step_places at = delta_rule_step_places_of(o);
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.q, at.k, at.v, at.g, at.beta, at.offsets, at.from, at.to, at.store,
                     at.store, at.o);
    add_sizes(&l, "GHDE");
    pl_cl_add_f32(&l, args.scale);
    pl_cl_add_f32(&l, args.eps);
    pl_cl_add_i64(&l, args.delta != 0);
    return run(&l, "delta_rule", dim(o, 'B') * dim(o, 'H'));
}

int pl_cl_launch_delta_rule_grad(const pl_cl_operation *o) {
    enum { PART = 32 };
    const delta_rule_grad_args args = delta_rule_grad_args_of(o->call);
    const delta_rule_grad_places at = delta_rule_grad_places_of(o);
    const int64_t groups = dim(o, 'B') * dim(o, 'G'), d = dim(o, 'D'), e = dim(o, 'E');
    if (!dim(o, 'H'))
        return pl_cl_zero(o, at.dq, dim(o, 'N') * dim(o, 'G') * d) ||
               pl_cl_zero(o, at.dk, dim(o, 'N') * dim(o, 'G') * d);
    int64_t longest = 0;
    for (int64_t s = 0; s < dim(o, 'B'); s++) {
        const int64_t rows = args.offsets[s + 1] - args.offsets[s];
        longest = rows > longest ? rows : longest;
    }
    const int64_t states = (longest + PART - 1) / PART + PART + 2;
    const int64_t each = states * d * e + 2 * (d + e);
    const pl_cl_place work = pl_cl_scratch(o, (size_t)(groups * each + 1) * sizeof(float));
    if (!work.buffer) return 1;
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.d_o, at.dlast, at.q, at.k, at.v, at.g, at.beta, at.offsets, at.state,
                     at.dq, at.dk, at.dv, at.dg, at.dbeta, at.dstate, work);
    pl_cl_add_i64(&l, each);
    pl_cl_add_i64(&l, PART);
    add_sizes(&l, "GHDE");
    pl_cl_add_f32(&l, args.scale);
    pl_cl_add_f32(&l, args.eps);
    pl_cl_add_i64(&l, args.delta != 0);
    const int failed = run(&l, "delta_rule_grad", groups);
    pl_cl_buffer_release(work.buffer);
    return failed;
}

int pl_cl_launch_delta_gates_forward(const pl_cl_operation *o) {
    const delta_gates_forward_places at = delta_gates_forward_places_of(o);
    const int64_t n = dim(o, 'N') * dim(o, 'H');
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.a, at.b, at.a_log, at.dt_bias, at.g, at.beta);
    pl_cl_add_i64(&l, n);
    add_sizes(&l, "H");
    return run_items(&l, "delta_gates_forward", n);
}

int pl_cl_launch_delta_gates_grad(const pl_cl_operation *o) {
    const delta_gates_grad_places at = delta_gates_grad_places_of(o);
    const int64_t n = dim(o, 'N') * dim(o, 'H');
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.dg, at.dbeta, at.a, at.b, at.a_log, at.dt_bias, at.da, at.db);
    pl_cl_add_i64(&l, n);
    add_sizes(&l, "H");
    return run_items(&l, "delta_gates_grad", n);
}

int pl_cl_launch_scan_gates_forward(const pl_cl_operation *o) {
    const scan_gates_forward_args args = scan_gates_forward_args_of(o->call);
    const scan_gates_forward_places at = scan_gates_forward_places_of(o);
    const int64_t n = dim(o, 'N') * dim(o, 'H');
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.x, at.a_log, at.dt_bias, at.dt, at.g);
    pl_cl_add_i64(&l, n);
    add_sizes(&l, "H");
    pl_cl_add_f32(&l, args.low);
    pl_cl_add_f32(&l, args.high);
    return run_items(&l, "scan_gates_forward", n);
}

int pl_cl_launch_scan_gates_grad(const pl_cl_operation *o) {
    const scan_gates_grad_args args = scan_gates_grad_args_of(o->call);
    const scan_gates_grad_places at = scan_gates_grad_places_of(o);
    const int64_t n = dim(o, 'N') * dim(o, 'H');
    pl_cl_launch l = begin_delta(o);
    pl_cl_add_places(&l, 4, at.ddt, at.dg, at.x, at.a_log, at.dt_bias, at.dx);
    pl_cl_add_i64(&l, n);
    add_sizes(&l, "H");
    pl_cl_add_f32(&l, args.low);
    pl_cl_add_f32(&l, args.high);
    return run_items(&l, "scan_gates_grad", n);
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
    return run(&l, "transpose", dim(o, 'E') * dim(o, 'N'));
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

int pl_cl_launch_sigmoid_scores(const pl_cl_operation *o) {
    const sigmoid_scores_places at = sigmoid_scores_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.logits, at.bias, at.scores);
    add_sizes(&l, "EN");
    return run_items(&l, "sigmoid_scores", dim(o, 'N'));
}

int pl_cl_launch_top_experts(const pl_cl_operation *o) {
    const top_experts_places at = top_experts_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.logits, at.chosen);
    add_sizes(&l, "EKN");
    return run_items(&l, "top_experts", dim(o, 'N'));
}

int pl_cl_launch_sort_visits(const pl_cl_operation *o) {
    const sort_visits_places at = sort_visits_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.chosen, at.tokens, at.visits, at.offsets);
    add_sizes(&l, "EKN");
    return run_items(&l, "sort_visits", dim(o, 'E') + 1);
}

int pl_cl_launch_visit_weights(const pl_cl_operation *o) {
    const visit_weights_args args = visit_weights_args_of(o->call);
    const visit_weights_places at = visit_weights_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.logits, at.chosen, at.visits, at.weights);
    pl_cl_add_i64(&l, args.normalize != 0);
    pl_cl_add_i64(&l, args.sigmoid != 0);
    pl_cl_add_scalar(&l, args.factor);
    add_sizes(&l, "EKN");
    return run_items(&l, "visit_weights", dim(o, 'N'));
}

int pl_cl_launch_visit_weights_grad(const pl_cl_operation *o) {
    const visit_weights_grad_args args = visit_weights_grad_args_of(o->call);
    const visit_weights_grad_places at = visit_weights_grad_places_of(o);
    pl_cl_launch l = begin(o);
    pl_cl_add_places(&l, 4, at.dweights, at.logits, at.chosen, at.visits, at.dlogits);
    pl_cl_add_i64(&l, args.normalize != 0);
    pl_cl_add_i64(&l, args.sigmoid != 0);
    pl_cl_add_scalar(&l, args.factor);
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
