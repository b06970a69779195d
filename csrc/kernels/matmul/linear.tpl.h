/* Dense layers and plain matrix products: kernels that describe one product and run it. */
#ifndef PYLOSS_LINEAR_TPL_H
#define PYLOSS_LINEAR_TPL_H
#include "../kernel.h"
#include "../simd/act.h"
#include "../widening.h"
#include "gemm.tpl.h"

/* The form of a product in int8, or FLOATS for matrices without codes for it. */
static int codes_form(int format) {
    if (pl_is_floats(format) || pl_has_table(format)) return FLOATS;
    return INT8_DOTS_COMPILED && pl_int8_dots(PL_BYTES) && pl_matmul_precision() != PL_INT8_EMULATED
               ? INT8_DOTS
               : INT8;
}
/* The form of a forward product in int8, or FLOATS. Where tiles of bfloat16 multiply many rows,
 * int8 is for few. */
static int int8_form(int64_t rows, int format) {
    const pl_precision precision = pl_matmul_precision();
    const int wanted = precision == PL_INT8 || precision == PL_INT8_EMULATED ||
                       (precision == PL_INT8_TILES && rows <= SKINNY_M);
    return wanted ? codes_form(format) : FLOATS;
}

/* The form in which a layer of this many rows multiplies. Few rows wait for memory or for the
 * expansion of B, so that bfloat16 would gain little. */
static int layer_form(int64_t rows, int backward, int format) {
    const int form = backward ? FLOATS : int8_form(rows, format);
    if (form != FLOATS || rows <= (backward ? SMALL_M : SKINNY_M)) return form;
    switch (pl_matmul_precision()) {
    case PL_INT8:
    case PL_INT8_EMULATED:
    case PL_FLOAT32: return FLOATS;
    case PL_BFLOAT16: return NATIVE_PAIRS_COMPILED && pl_has_bf16_dots() ? NATIVE_PAIRS : PAIRS;
    case PL_BFLOAT16_EMULATED: return PAIRS;
    default: return amx_form();
    }
}

/* x W^T, or x W when backward, for `rows` rows of x. run_dense runs it. */
INLINE gemm dense_product(pl_act x, int64_t rows, const pl_weight *w, int backward, pl_act out) {
    int64_t k = backward ? w->rows : w->cols;
    return (gemm){.m = rows,
                  .n = backward ? w->cols : w->rows,
                  .k = k,
                  .a = {x.data, k, 0, 1, x.narrow},
                  .b = *w,
                  .b_transposed = !backward,
                  .form = layer_form(rows, backward, w->format),
                  .c = out.data,
                  .narrow = out.narrow};
}

/* Runs a product whose A and C may be bfloat16. Tiles read and write these in place; for other
 * forms they are floats meanwhile. */
static pl_status run_dense(const gemm *given) {
    gemm g = *given;
    pl_act x = {(void *)(uintptr_t)g.a.data, g.a.narrow && !is_amx(g.form)},
           y = {g.c, g.narrow && !narrow_fits(&g)};
    widening floats[] = {{.act = &x, .n = g.m * g.k, .reads = 1},
                         {.act = &y, .n = g.m * g.n, .reads = g.accumulate, .writes = 1}};
    pl_status status = widen(floats, 2);
    if (floats[0].given.narrow) g.a.data = x.data, g.a.narrow = 0;
    if (floats[1].given.narrow) g.c = y.data, g.narrow = 0;
    if (status == PL_OK) status = gemm_run(&g);
    return narrow_again(floats, 2, status);
}

/* y [n, o] = x [n, i] (factor W)^T + bias + scale xa b. */
pl_status KERNEL(linear_forward)(const pl_call *call) {
    const linear_forward_args args = linear_forward_args_of(call);
    gemm g = dense_product(args.x, PL_DIM(call, 'N'), args.w, 0, args.y);
    g.bias = args.bias;
    g.b_row_factor = args.row_factor;
    if (args.xa && args.b) {
        g.rank = PL_DIM(call, 'R');
        g.low_given = args.xa;
        g.up = float_matrix(args.b, g.rank, g.n);
        g.up_scale = (float)args.scale;
    }
    return run_dense(&g);
}

/* xa [n, r] = x a; y [n, o] = x (factor W)^T + bias + scale xa b. */
pl_status KERNEL(lora_forward)(const pl_call *call) {
    const lora_forward_args args = lora_forward_args_of(call);
    gemm g = dense_product(args.x, PL_DIM(call, 'N'), args.w, 0, args.y);
    g.bias = args.bias;
    g.b_row_factor = args.row_factor;
    g.rank = PL_DIM(call, 'R');
    g.low = args.xa;
    g.down = float_matrix(args.a, g.k, g.rank);
    g.down_scale = 1;
    g.up = float_matrix(args.b, g.rank, g.n);
    g.up_scale = (float)args.scale;
    return run_dense(&g);
}

/* dx [n, i] (+)= dy [n, o] (factor W) + dxa a^T. */
pl_status KERNEL(linear_input_grad)(const pl_call *call) {
    const linear_input_grad_args args = linear_input_grad_args_of(call);
    gemm g = dense_product(args.dy, PL_DIM(call, 'N'), args.w, 1, args.dx);
    g.b_row_factor = args.row_factor;
    g.accumulate = args.accumulate != 0;
    if (args.dxa && args.a) {
        g.rank = PL_DIM(call, 'R');
        g.low_given = args.dxa;
        g.up = float_matrix(args.a, g.n, g.rank);
        g.up_transposed = 1;
        g.up_scale = 1;
    }
    return run_dense(&g);
}

/* dw [o, i] (+)= dy^T x, in the precision of the layer's products. */
pl_status KERNEL(linear_weight_grad)(const pl_call *call) {
    const linear_weight_grad_args args = linear_weight_grad_args_of(call);
    const int64_t rows = PL_DIM(call, 'N'), out = PL_DIM(call, 'O'), in = PL_DIM(call, 'I');
    const int form = out > SKINNY_M ? layer_form(rows, 0, PL_W_F32) : FLOATS;
    return gemm_run(&(gemm){.m = out,
                            .n = in,
                            .k = rows,
                            .a = {args.dy.data, out, 1, 1, args.dy.narrow},
                            .b = act_matrix(args.x, rows, in),
                            .accumulate = args.accumulate != 0,
                            .form = form,
                            .c = args.dw});
}

/* dxa [n, r] = scale dy b^T; dx [n, i] (+)= dy (factor W) + dxa a^T. */
pl_status KERNEL(lora_input_grad)(const pl_call *call) {
    const lora_input_grad_args args = lora_input_grad_args_of(call);
    gemm g = dense_product(args.dy, PL_DIM(call, 'N'), args.w, 1, args.dx);
    g.b_row_factor = args.row_factor;
    g.accumulate = args.accumulate != 0;
    g.rank = PL_DIM(call, 'R');
    g.low = args.dxa;
    g.down = float_matrix(args.b, g.rank, g.k);
    g.down_transposed = 1;
    g.down_scale = (float)args.scale;
    g.up = float_matrix(args.a, g.n, g.rank);
    g.up_transposed = 1;
    g.up_scale = 1;
    return run_dense(&g);
}

/* c (+)= alpha a b, with a as [m, k] or [k, m] and b as [k, n] or [n, k]. */
INLINE pl_status plain_product(const pl_call *call, double alpha, pl_act a, int a_transposed,
                               pl_act b, int b_transposed, int64_t accumulate, float *c) {
    int64_t m = PL_DIM(call, 'M'), n = PL_DIM(call, 'N'), k = PL_DIM(call, 'K');
    gemm g = {.m = m,
              .n = n,
              .k = k,
              .a = {a.data, a_transposed ? m : k, a_transposed, (float)alpha, a.narrow},
              .b = act_matrix(b, b_transposed ? n : k, b_transposed ? k : n),
              .b_transposed = b_transposed,
              .accumulate = accumulate != 0,
              .c = c};
    return gemm_run(&g);
}
pl_status KERNEL(matmul_nn)(const pl_call *call) {
    const matmul_nn_args args = matmul_nn_args_of(call);
    return plain_product(call, args.alpha, act_of_floats(args.a), 0, act_of_floats(args.b), 0,
                         args.accumulate, args.c);
}
pl_status KERNEL(matmul_nt)(const pl_call *call) {
    const matmul_nt_args args = matmul_nt_args_of(call);
    return plain_product(call, args.alpha, act_of_floats(args.a), 0, act_of_floats(args.b), 1,
                         args.accumulate, args.c);
}
pl_status KERNEL(matmul_tn)(const pl_call *call) {
    const matmul_tn_args args = matmul_tn_args_of(call);
    return plain_product(call, args.alpha, args.a, 1, args.b, 0, args.accumulate, args.c);
}

#endif
