/* Layers of experts: each row of x meets the matrix of one expert. The rows lie sorted by expert: those of expert e are
 * [offsets[e], offsets[e + 1]). The products of all experts run together, so that the cost is that of the rows, however they
 * are spread; an expert without rows is not touched. Adapters are stored as mlx-lm has them: a [E, R, I], b [E, O, R]. */

/* One expert's product: its number, where its rows begin and how many they are. */
typedef struct {
    const pl_call *call;
    int64_t expert, begin, rows;
} expert_rows;

/* Where matrix e of a float array [E, rows, cols] begins. */
INLINE pl_weight float_matrix_at(const float *data, int64_t e, int64_t rows, int64_t cols) {
    return float_matrix(data + e * rows * cols, rows, cols);
}

/* Runs `product` of every expert that has rows, or with `empty` of every expert. */
static pl_status run_experts(const pl_call *call, const int32_t *offsets, int empty, gemm (*product)(const expert_rows *)) {
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

/* The product of a layer without its adapter; x or dy is the first argument, w the second. */
static gemm expert_layer(const expert_rows *r, int backward, const float *factor, float *out) {
    const pl_weight *w = r->call->arg[1].stack + r->expert;
    int64_t k = backward ? w->rows : w->cols, n = backward ? w->cols : w->rows;
    gemm g = dense_product((const float *)r->call->arg[0].in + r->begin * k, r->rows, w, backward, out + r->begin * n);
    if (factor) g.b_rows = factor + r->expert * w->rows;
    return g;
}

/* y = x (factor[e] w[e])^T + bias[e] + scale h b[e]^T. */
static gemm expert_forward_product(const expert_rows *r) {
    const pl_call *call = r->call;
    gemm g = expert_layer(r, 0, call->arg[7].in, call->arg[8].out);
    if (call->arg[2].in) g.bias = (const float *)call->arg[2].in + r->expert * g.n;
    if (call->arg[4].in && call->arg[5].in) {
        g.rank = PL_DIM(call, 'R');
        g.h_given = (const float *)call->arg[4].in + r->begin * g.rank;
        g.u = float_matrix_at(call->arg[5].in, r->expert, g.n, g.rank);
        g.u_transposed = 1;
        g.u_scale = (float)call->arg[6].f;
    }
    return g;
}
static pl_status experts_forward(const pl_call *call) { return run_experts(call, call->arg[3].in, 0, expert_forward_product); }

/* h = x a[e]^T; y = x (factor[e] w[e])^T + bias[e] + scale h b[e]^T. */
static gemm expert_lora_forward_product(const expert_rows *r) {
    const pl_call *call = r->call;
    gemm g = expert_layer(r, 0, call->arg[7].in, call->arg[9].out);
    if (call->arg[2].in) g.bias = (const float *)call->arg[2].in + r->expert * g.n;
    g.rank = PL_DIM(call, 'R');
    g.h = (float *)call->arg[8].out + r->begin * g.rank;
    g.p = float_matrix_at(call->arg[4].in, r->expert, g.rank, g.k);
    g.p_transposed = 1;
    g.h_scale = 1;
    g.u = float_matrix_at(call->arg[5].in, r->expert, g.n, g.rank);
    g.u_transposed = 1;
    g.u_scale = (float)call->arg[6].f;
    return g;
}
static pl_status experts_lora_forward(const pl_call *call) {
    return run_experts(call, call->arg[3].in, 0, expert_lora_forward_product);
}

/* dx (+)= dy (factor[e] w[e]) + dh a[e]. */
static gemm expert_input_grad_product(const expert_rows *r) {
    const pl_call *call = r->call;
    gemm g = expert_layer(r, 1, call->arg[6].in, call->arg[7].out);
    g.accumulate = call->arg[5].i != 0;
    if (call->arg[3].in && call->arg[4].in) {
        g.rank = PL_DIM(call, 'R');
        g.h_given = (const float *)call->arg[3].in + r->begin * g.rank;
        g.u = float_matrix_at(call->arg[4].in, r->expert, g.rank, g.n);
        g.u_scale = 1;
    }
    return g;
}
static pl_status experts_input_grad(const pl_call *call) {
    return run_experts(call, call->arg[2].in, 0, expert_input_grad_product);
}

/* dh = scale dy b[e]; dx (+)= dy (factor[e] w[e]) + dh a[e]. */
static gemm expert_lora_input_grad_product(const expert_rows *r) {
    const pl_call *call = r->call;
    gemm g = expert_layer(r, 1, call->arg[7].in, call->arg[9].out);
    g.accumulate = call->arg[6].i != 0;
    g.rank = PL_DIM(call, 'R');
    g.h = (float *)call->arg[8].out + r->begin * g.rank;
    g.p = float_matrix_at(call->arg[4].in, r->expert, g.k, g.rank);
    g.h_scale = (float)call->arg[5].f;
    g.u = float_matrix_at(call->arg[3].in, r->expert, g.rank, g.n);
    g.u_scale = 1;
    return g;
}
static pl_status experts_lora_input_grad(const pl_call *call) {
    return run_experts(call, call->arg[2].in, 0, expert_lora_input_grad_product);
}

/* dw[e] = alpha dy^T x, summed over the rows of the expert; 0 where it has none. */
static gemm expert_weight_grad_product(const expert_rows *r) {
    const pl_call *call = r->call;
    int64_t o = PL_DIM(call, 'O'), i = PL_DIM(call, 'I');
    return (gemm){.m = o,
                  .n = i,
                  .k = r->rows,
                  .a = {(const float *)call->arg[0].in + r->begin * o, o, 1, (float)call->arg[3].f},
                  .b = float_matrix((const float *)call->arg[1].in + r->begin * i, r->rows, i),
                  .c = (float *)call->arg[4].out + r->expert * o * i};
}
static pl_status experts_weight_grad(const pl_call *call) {
    return run_experts(call, call->arg[2].in, 1, expert_weight_grad_product);
}
