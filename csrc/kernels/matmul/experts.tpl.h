/* Layers of experts: each row of x is multiplied by the matrix of one expert. Rows are sorted by
 * expert: expert e owns rows [offsets[e], offsets[e + 1]). The products of all experts run
 * together, so the cost depends on the number of rows, not on how they are spread; an expert
 * without rows is not touched. Adapters are stored in mlx-lm's layout: a [E, R, I], b [E, O, R]. */
#ifndef PYLOSS_EXPERTS_TPL_H
#define PYLOSS_EXPERTS_TPL_H
#include "../kernel.h"
#include "gemm.tpl.h"
#include "linear.tpl.h"

/* One expert's product: its number, its first row and how many rows it has. */
typedef struct {
    const pl_call *call;
    int64_t expert, begin, rows;
} expert_rows;

/* Where matrix e of a float array [E, rows, cols] begins. */
INLINE pl_weight float_matrix_at(const float *data, int64_t e, int64_t rows, int64_t cols) {
    return float_matrix(data + e * rows * cols, rows, cols);
}

/* Runs `product` of every expert that has rows; with `empty` of every expert. */
static pl_status run_experts(const pl_call *call, const int32_t *offsets, int empty,
                             gemm (*product)(const expert_rows *)) {
    int64_t experts = PL_DIM(call, 'E'), count = 0;
    gemm *groups = pl_acquire((size_t)experts * sizeof *groups);
    if (!groups) return PL_NO_MEMORY;
    for (int64_t e = 0; e < experts; e++) {
        int64_t rows = offsets[e + 1] - offsets[e];
        if (rows || empty) groups[count++] = product(&(expert_rows){call, e, offsets[e], rows});
    }
    pl_status status = gemm_run_all(groups, count);
    pl_release(groups);
    return status;
}

/* The product of a layer without its adapter; x is dy on the way back. */
static gemm expert_layer(const expert_rows *r, const float *x, const pl_weight *stack, int backward,
                         const float *factor, float *out) {
    const pl_weight *w = stack + r->expert;
    int64_t k = backward ? w->rows : w->cols, n = backward ? w->cols : w->rows;
    gemm g = dense_product(act_of_floats(x + r->begin * k), r->rows, w, backward,
                           act_of_floats(out + r->begin * n));
    if (factor) g.b_row_factor = factor + r->expert * w->rows;
    return g;
}

/* y = x (row_factor[e] w[e])^T + bias[e] + scale xa b[e]^T. */
static gemm expert_forward_product(const expert_rows *r) {
    const pl_call *call = r->call;
    const experts_forward_args args = experts_forward_args_of(call);
    gemm g = expert_layer(r, args.x, args.w, 0, args.row_factor, args.y);
    if (args.bias) g.bias = args.bias + r->expert * g.n;
    if (args.xa && args.b) {
        g.rank = PL_DIM(call, 'R');
        g.low_given = args.xa + r->begin * g.rank;
        g.up = float_matrix_at(args.b, r->expert, g.n, g.rank);
        g.up_transposed = 1;
        g.up_scale = (float)args.scale;
    }
    return g;
}
pl_status KERNEL(experts_forward)(const pl_call *call) {
    const experts_forward_args args = experts_forward_args_of(call);
    return run_experts(call, args.offsets, 0, expert_forward_product);
}

/* xa = x a[e]^T; y = x (row_factor[e] w[e])^T + bias[e] + scale xa b[e]^T. */
static gemm expert_lora_forward_product(const expert_rows *r) {
    const pl_call *call = r->call;
    const experts_lora_forward_args args = experts_lora_forward_args_of(call);
    gemm g = expert_layer(r, args.x, args.w, 0, args.row_factor, args.y);
    if (args.bias) g.bias = args.bias + r->expert * g.n;
    g.rank = PL_DIM(call, 'R');
    g.low = args.xa + r->begin * g.rank;
    g.down = float_matrix_at(args.a, r->expert, g.rank, g.k);
    g.down_transposed = 1;
    g.down_scale = 1;
    g.up = float_matrix_at(args.b, r->expert, g.n, g.rank);
    g.up_transposed = 1;
    g.up_scale = (float)args.scale;
    return g;
}
pl_status KERNEL(experts_lora_forward)(const pl_call *call) {
    const experts_lora_forward_args args = experts_lora_forward_args_of(call);
    return run_experts(call, args.offsets, 0, expert_lora_forward_product);
}

/* dx (+)= dy (row_factor[e] w[e]) + dxa a[e]. */
static gemm expert_input_grad_product(const expert_rows *r) {
    const pl_call *call = r->call;
    const experts_input_grad_args args = experts_input_grad_args_of(call);
    gemm g = expert_layer(r, args.dy, args.w, 1, args.row_factor, args.dx);
    g.accumulate = args.accumulate != 0;
    if (args.dxa && args.a) {
        g.rank = PL_DIM(call, 'R');
        g.low_given = args.dxa + r->begin * g.rank;
        g.up = float_matrix_at(args.a, r->expert, g.rank, g.n);
        g.up_scale = 1;
    }
    return g;
}
pl_status KERNEL(experts_input_grad)(const pl_call *call) {
    const experts_input_grad_args args = experts_input_grad_args_of(call);
    return run_experts(call, args.offsets, 0, expert_input_grad_product);
}

/* dxa = scale dy b[e]; dx (+)= dy (row_factor[e] w[e]) + dxa a[e]. */
static gemm expert_lora_input_grad_product(const expert_rows *r) {
    const pl_call *call = r->call;
    const experts_lora_input_grad_args args = experts_lora_input_grad_args_of(call);
    gemm g = expert_layer(r, args.dy, args.w, 1, args.row_factor, args.dx);
    g.accumulate = args.accumulate != 0;
    g.rank = PL_DIM(call, 'R');
    g.low = args.dxa + r->begin * g.rank;
    g.down = float_matrix_at(args.b, r->expert, g.k, g.rank);
    g.down_scale = (float)args.scale;
    g.up = float_matrix_at(args.a, r->expert, g.rank, g.n);
    g.up_scale = 1;
    return g;
}
pl_status KERNEL(experts_lora_input_grad)(const pl_call *call) {
    const experts_lora_input_grad_args args = experts_lora_input_grad_args_of(call);
    return run_experts(call, args.offsets, 0, expert_lora_input_grad_product);
}

/* dw[e] = alpha dy^T x, summed over the rows of the expert; 0 where it has none. */
static gemm expert_weight_grad_product(const expert_rows *r) {
    const pl_call *call = r->call;
    const experts_weight_grad_args args = experts_weight_grad_args_of(call);
    int64_t o = PL_DIM(call, 'O'), i = PL_DIM(call, 'I');
    return (gemm){.m = o,
                  .n = i,
                  .k = r->rows,
                  .a = {args.dy + r->begin * o, o, 1, (float)args.alpha, 0},
                  .b = float_matrix(args.x + r->begin * i, r->rows, i),
                  .c = args.dw + r->expert * o * i};
}
pl_status KERNEL(experts_weight_grad)(const pl_call *call) {
    const experts_weight_grad_args args = experts_weight_grad_args_of(call);
    return run_experts(call, args.offsets, 1, expert_weight_grad_product);
}

#endif
