/* RMS norm (root mean square) of the rows of x [N,D]. */
#ifndef PYLOSS_RMS_NORM_TPL_H
#define PYLOSS_RMS_NORM_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "columns.tpl.h"
#include "../simd/dot_f32.h"

/* y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps)   x, y [N,D], w [D], rstd [N] */
static void rms_norm_forward_piece(const void *context, int64_t begin, int64_t end,
                                   int worker UNUSED) {
    const pl_call *c = context;
    const rms_norm_forward_args args = rms_norm_forward_args_of(c);
    const float *w = args.w;
    float *rstd = args.rstd;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++) {
        const float *x = args.x + i * d;
        float *y = args.y + i * d;
        float r = rstd[i] = 1.0f / sqrtf(dot(x, x, NULL, d) / (float)d + (float)args.eps);
        for (int64_t j = 0; j < d; j++) y[j] = x[j] * r * w[j];
    }
}
pl_status KERNEL(rms_norm_forward)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), rms_norm_forward_piece, c);
    return PL_OK;
}

/* dx = rstd (dy w - x rstd^2 mean(dy w x))
 * dw[d] = sum over n of dy[n,d] x[n,d] rstd[n], overwritten; dw may be NULL */
static void rms_norm_grad_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const column_job *job = context;
    const pl_call *c = job->call;
    const rms_norm_grad_args args = rms_norm_grad_args_of(c);
    const float *w = args.w, *rstd = args.rstd;
    int64_t n = PL_DIM(c, 'N'), d = job->width;
    for (int64_t b = begin; b < end; b++) {
        float *dw = job->partial ? job->partial + b * d : NULL;
        int64_t last = at_most((b + 1) * job->block_rows, n);
        if (dw) memset(dw, 0, (size_t)d * sizeof *dw);
        for (int64_t i = b * job->block_rows; i < last; i++) {
            const float *dy = args.dy + i * d, *x = args.x + i * d;
            float *dx = args.dx + i * d;
            float r = rstd[i], k = r * r * (dot(dy, x, w, d) / (float)d);
            for (int64_t j = 0; j < d; j++) dx[j] = r * (dy[j] * w[j] - k * x[j]);
            if (dw)
                for (int64_t j = 0; j < d; j++) dw[j] += dy[j] * x[j] * r;
        }
    }
}
pl_status KERNEL(rms_norm_grad)(const pl_call *c) {
    const rms_norm_grad_args args = rms_norm_grad_args_of(c);
    return sum_columns(c, PL_DIM(c, 'N'), args.dw, rms_norm_grad_piece);
}

#endif
