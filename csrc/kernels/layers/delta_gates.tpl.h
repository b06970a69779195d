/* The gates of the delta rule and of the scan, and their gradients. */
#ifndef PYLOSS_DELTA_GATES_TPL_H
#define PYLOSS_DELTA_GATES_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/vec.h"

/* ---- gates: g = -e^a_log softplus(a + dt_bias) and beta = sigmoid(b) */

INLINE vf delta_softplus(vf x) { return vf_max(x, vf_set1(0)) + vf_log1p(vf_exp(-vf_abs(x))); }
INLINE vf delta_sigmoid(vf x) {
    const vf small = vf_exp(-vf_abs(x)), one = vf_set1(1);
    return vf_select(vf_less(x, vf_set1(0)), small, one) / (one + small);
}
static void delta_gates_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const delta_gates_forward_args args = delta_gates_forward_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.a + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf rate = vf_exp(vf_load_part(args.a_log + j, n, 0));
            vf_store_part(args.g + at, -rate * delta_softplus(x), n);
            vf_store_part(args.beta + at, delta_sigmoid(vf_load_part(args.b + at, n, 0)), n);
        }
}
pl_status KERNEL(delta_gates_forward)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), delta_gates_piece, c);
    return PL_OK;
}
static void delta_gates_grad_piece(const void *context, int64_t begin, int64_t end,
                                   int worker UNUSED) {
    const delta_gates_grad_args args = delta_gates_grad_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.a + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf rate = vf_exp(vf_load_part(args.a_log + j, n, 0));
            const vf beta = delta_sigmoid(vf_load_part(args.b + at, n, 0));
            const vf dg = vf_load_part(args.dg + at, n, 0),
                     dbeta = vf_load_part(args.dbeta + at, n, 0);
            vf_store_part(args.da + at, -rate * dg * delta_sigmoid(x), n);
            vf_store_part(args.db + at, dbeta * beta * (1.0f - beta), n);
        }
}
pl_status KERNEL(delta_gates_grad)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), delta_gates_grad_piece, c);
    return PL_OK;
}

/* ---- gates of the scan: dt = softplus(x + dt_bias) between low and high, g = -e^a_log dt */

static void scan_gates_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const scan_gates_forward_args args = scan_gates_forward_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    const vf low = vf_set1((float)args.low), high = vf_set1((float)args.high);
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.x + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf dt = vf_min(high, vf_max(low, delta_softplus(x)));
            vf_store_part(args.dt + at, dt, n);
            vf_store_part(args.g + at, -vf_exp(vf_load_part(args.a_log + j, n, 0)) * dt, n);
        }
}
pl_status KERNEL(scan_gates_forward)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), scan_gates_piece, c);
    return PL_OK;
}
static void scan_gates_grad_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    const scan_gates_grad_args args = scan_gates_grad_args_of(context);
    const int64_t h = PL_DIM((const pl_call *)context, 'H');
    const vf low = vf_set1((float)args.low), high = vf_set1((float)args.high), none = vf_set1(0);
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < h; j += LANES) {
            const int64_t n = at_most(h - j, LANES), at = i * h + j;
            const vf x = vf_load_part(args.x + at, n, 0) + vf_load_part(args.dt_bias + j, n, 0);
            const vf rate = vf_exp(vf_load_part(args.a_log + j, n, 0)), dt = delta_softplus(x);
            const vf by_dt =
                vf_load_part(args.ddt + at, n, 0) - rate * vf_load_part(args.dg + at, n, 0);
            const vf inside = vf_select(vf_less(high, dt), none, by_dt * delta_sigmoid(x));
            vf_store_part(args.dx + at, vf_select(vf_less(dt, low), none, inside), n);
        }
}
pl_status KERNEL(scan_gates_grad)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 16 * PL_DIM(c, 'H'), scan_gates_grad_piece, c);
    return PL_OK;
}

#endif
