/* Optimizers: a fused in-place update of a flat parameter [N]. In the formulas g is
 * grad * grad_scale. */
#ifndef PYLOSS_OPTIM_TPL_H
#define PYLOSS_OPTIM_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/map.h"

typedef struct {
    float lr, decay, grad_scale;
    float beta1, rest1, beta2, rest2; /* rest = 1 - beta, computed in float64 */
    float eps, inverse_bias1, inverse_bias2;
} adamw_constants;

INLINE void adamw_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const adamw_constants *k = constants;
    vf g = v[0] * k->grad_scale, p = v[1];
    vf m = k->beta1 * v[2] + k->rest1 * g, s = k->beta2 * v[3] + k->rest2 * (g * g);
    p -= k->decay * p;
    p -= k->lr * (m * k->inverse_bias1) / (vf_sqrt(s * k->inverse_bias2) + k->eps);
    v[0] = p;
    v[1] = m;
    v[2] = s;
}

/* p -= lr weight_decay p
 * m = beta1 m + (1 - beta1) g
 * v = beta2 v + (1 - beta2) g^2
 * p -= lr (m / correction1) / (sqrt(v / correction2) + eps) */
static void adamw_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const adamw_args args = adamw_args_of(c);
    double lr = args.lr, beta1 = args.beta1, beta2 = args.beta2;
    adamw_constants k = {
        .lr = (float)lr,
        .decay = (float)(lr * args.weight_decay),
        .grad_scale = (float)args.grad_scale,
        .beta1 = (float)beta1,
        .rest1 = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .rest2 = (float)(1 - beta2),
        .eps = (float)args.eps,
        .inverse_bias1 = (float)(1 / args.correction1),
        .inverse_bias2 = (float)(1 / args.correction2),
    };
    float *p = args.param, *m = args.m, *v = args.v;
    map(adamw_lanes, 4, (const float *[]){args.grad, p, m, v}, 3, (float *[]){p, m, v}, begin, end,
        &k);
}
pl_status KERNEL(adamw)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, adamw_piece, c);
    return PL_OK;
}

typedef struct {
    float step, decay, grad_scale;
    float beta1, rest1, beta2, rest2, scale_v;
} adam_atan2_constants;

INLINE void adam_atan2_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const adam_atan2_constants *k = constants;
    vf g = v[0] * k->grad_scale, p = v[1];
    vf m = k->beta1 * v[2] + k->rest1 * g, s = k->beta2 * v[3] + k->rest2 * (g * g);
    /* tan^2 of the angle to the nearer axis. The root is taken beside the polynomial. Below FLT_MIN
     * the larger square is the only one above 0, unless both are 0. */
    vf y = m * m, x = s * k->scale_v;
    vf z = vf_min(y, x) / vf_max(vf_set1(0x1p-126f), vf_max(y, x)), t = vf_sqrt(z), zz = z * z;
    /* atan(t) on [0, 1]: a minimax polynomial of relative error 1.1e-7. */
    vf low = z * 0.199742138f - 0.333323926f, mid = z * 0.0996847302f - 0.140413284f;
    vf high = z * 0.0247340649f - 0.0602031313f;
    high = zz * -0.00482253497f + high;
    mid = zz * high + mid;
    low = zz * mid + low;
    vf r = z * low * t + t;
    r = vf_select(vf_less(x, y), 1.57079633f - r, r);
    r = (vf)((vi)r | ((vi)m & INT32_MIN));
    v[0] = p - k->decay * p - k->step * r;
    v[1] = m;
    v[2] = s;
}

/* p -= decay p
 * m = beta1 m + (1 - beta1) g
 * v = beta2 v + (1 - beta2) g^2
 * p -= step atan2(m, sqrt(scale_v v)), where atan2(0, 0) is 0 */
static void adam_atan2_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const adam_atan2_args args = adam_atan2_args_of(c);
    double beta1 = args.beta1, beta2 = args.beta2;
    adam_atan2_constants k = {
        .step = (float)args.step,
        .decay = (float)args.decay,
        .grad_scale = (float)args.grad_scale,
        .beta1 = (float)beta1,
        .rest1 = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .rest2 = (float)(1 - beta2),
        .scale_v = (float)args.scale_v,
    };
    float *p = args.param, *m = args.m, *v = args.v;
    map(adam_atan2_lanes, 4, (const float *[]){args.grad, p, m, v}, 3, (float *[]){p, m, v}, begin,
        end, &k);
}
pl_status KERNEL(adam_atan2)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, adam_atan2_piece, c);
    return PL_OK;
}

typedef struct {
    float lr, weight_decay, momentum, fresh, grad_scale;
    int nesterov;
} sgd_constants;

INLINE void sgd_plain_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const sgd_constants *k = constants;
    v[0] = v[1] - k->lr * (v[0] * k->grad_scale + k->weight_decay * v[1]);
}
INLINE void sgd_momentum_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const sgd_constants *k = constants;
    vf g = v[0] * k->grad_scale + k->weight_decay * v[1], buf = k->momentum * v[2] + k->fresh * g;
    v[0] = v[1] - k->lr * (k->nesterov ? g + k->momentum * buf : buf);
    v[1] = buf;
}

/* g += weight_decay p
 * buf = momentum buf + (1 - dampening) g
 * p -= lr (nesterov ? g + momentum buf : buf); without buf: p -= lr g */
static void sgd_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const sgd_args args = sgd_args_of(c);
    sgd_constants k = {
        .lr = (float)args.lr,
        .momentum = (float)args.momentum,
        .fresh = (float)(1 - args.dampening),
        .weight_decay = (float)args.weight_decay,
        .nesterov = args.nesterov != 0,
        .grad_scale = (float)args.grad_scale,
    };
    float *p = args.param, *buf = args.buf;
    if (buf)
        map(sgd_momentum_lanes, 3, (const float *[]){args.grad, p, buf}, 2, (float *[]){p, buf},
            begin, end, &k);
    else
        map(sgd_plain_lanes, 2, (const float *[]){args.grad, p}, 1, (float *[]){p}, begin, end, &k);
}
pl_status KERNEL(sgd)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, sgd_piece, c);
    return PL_OK;
}

typedef struct {
    float lr, decay, beta1, rest1, beta2, rest2, grad_scale;
} lion_constants;

INLINE void lion_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const lion_constants *k = constants;
    vf g = v[0] * k->grad_scale, p = v[1], m = v[2], mixed = k->beta1 * m + k->rest1 * g;
    /* The sign of 0 is 0, of NaN NaN. */
    vf sign = vf_select(vf_less(vf_set1(0), mixed), vf_set1(1),
                        vf_select(vf_less(mixed, vf_set1(0)), vf_set1(-1), mixed));
    v[0] = p - k->decay * p - k->lr * sign;
    v[1] = k->beta2 * m + k->rest2 * g;
}

/* p -= lr weight_decay p
 * p -= lr sign(beta1 m + (1 - beta1) g)
 * m = beta2 m + (1 - beta2) g */
static void lion_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const lion_args args = lion_args_of(c);
    double lr = args.lr, beta1 = args.beta1, beta2 = args.beta2;
    lion_constants k = {
        .lr = (float)lr,
        .decay = (float)(lr * args.weight_decay),
        .beta1 = (float)beta1,
        .rest1 = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .rest2 = (float)(1 - beta2),
        .grad_scale = (float)args.grad_scale,
    };
    float *p = args.param, *m = args.m;
    map(lion_lanes, 3, (const float *[]){args.grad, p, m}, 2, (float *[]){p, m}, begin, end, &k);
}
pl_status KERNEL(lion)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, lion_piece, c);
    return PL_OK;
}

typedef struct {
    float row, grad_scale, least;
} adafactor_constants;

INLINE void adafactor_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    const adafactor_constants *k = constants;
    /* In this order a NaN stays NaN. */
    vf square = vf_max(vf_set1(k->least), k->row * v[1]);
    v[0] = v[0] * k->grad_scale / vf_sqrt(square);
}

/* u[n,d] = g[n,d] / sqrt(max(least, row[n] col[d])) */
static void adafactor_update_piece(const void *context, int64_t begin, int64_t end,
                                   int worker UNUSED) {
    const pl_call *c = context;
    const adafactor_update_args args = adafactor_update_args_of(c);
    const float *row = args.row, *col = args.col;
    int64_t d = PL_DIM(c, 'D');
    adafactor_constants k = {.grad_scale = (float)args.grad_scale, .least = (float)args.least};
    for (int64_t n = begin; n < end; n++) {
        k.row = row[n];
        map(adafactor_lanes, 2, (const float *[]){args.grad + n * d, col}, 1,
            (float *[]){args.u + n * d}, 0, d, &k);
    }
}
pl_status KERNEL(adafactor_update)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), adafactor_update_piece, c);
    return PL_OK;
}

#endif
