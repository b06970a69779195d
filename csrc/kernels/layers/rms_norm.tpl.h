/* RMS norm (root mean square) of the rows of x [N,D]. */
#ifndef PYLOSS_RMS_NORM_TPL_H
#define PYLOSS_RMS_NORM_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "columns.tpl.h"
#include "../simd/act.h"
#include "../simd/dot_f32.h"

/* Rows that are computed at a time: those that are bfloat16 have floats in the worker's buffer. */
typedef struct {
    const pl_call *call;
    float *buffers; /* NORM_ROWS for each worker, or NULL */
} norm_job;
enum { NORM_ROWS = 3 };

static pl_status norm_buffers(const pl_call *c, float **buffers) {
    *buffers = NULL;
    if (!c->narrow) return PL_OK;
    const int64_t rows = NORM_ROWS * pl_num_threads();
    *buffers = pl_acquire((size_t)(rows * PL_DIM(c, 'D')) * sizeof **buffers);
    return *buffers ? PL_OK : PL_NO_MEMORY;
}

/* y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps)   x, y [N,D], w [D], rstd [N] */
static void rms_norm_forward_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const norm_job *job = context;
    const pl_call *c = job->call;
    const rms_norm_forward_args args = rms_norm_forward_args_of(c);
    const float *w = args.w;
    float *rstd = args.rstd;
    int64_t d = PL_DIM(c, 'D');
    float *buffer = job->buffers ? job->buffers + worker * NORM_ROWS * d : NULL;
    for (int64_t i = begin; i < end; i++) {
        const pl_act to = act_at(args.y, i * d);
        const float *x = act_floats(act_at(args.x, i * d), d, buffer);
        float *y = act_target(to, buffer);
        float r = rstd[i] = 1.0f / sqrtf(dot(x, x, NULL, d) / (float)d + (float)args.eps);
        for (int64_t j = 0; j < d; j++) y[j] = x[j] * r * w[j];
        act_put(to, d, y);
    }
}
pl_status KERNEL(rms_norm_forward)(const pl_call *c) {
    norm_job job = {.call = c};
    if (norm_buffers(c, &job.buffers) != PL_OK) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), rms_norm_forward_piece, &job);
    pl_release(job.buffers);
    return PL_OK;
}

/* dx = rstd (dy w - x rstd^2 mean(dy w x))
 * dw[d] = sum over n of dy[n,d] x[n,d] rstd[n], overwritten; dw may be NULL */
static void rms_norm_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const column_job *job = context;
    const pl_call *c = job->call;
    const rms_norm_grad_args args = rms_norm_grad_args_of(c);
    const float *w = args.w, *rstd = args.rstd;
    int64_t n = PL_DIM(c, 'N'), d = job->width;
    float *buffer = job->buffers ? job->buffers + worker * NORM_ROWS * d : NULL;
    for (int64_t b = begin; b < end; b++) {
        float *dw = job->partial ? job->partial + b * d : NULL;
        int64_t last = at_most((b + 1) * job->block_rows, n);
        if (dw) memset(dw, 0, (size_t)d * sizeof *dw);
        for (int64_t i = b * job->block_rows; i < last; i++) {
            const pl_act to = act_at(args.dx, i * d);
            const float *dy = act_floats(act_at(args.dy, i * d), d, buffer),
                        *x = act_floats(act_at(args.x, i * d), d, buffer ? buffer + d : NULL);
            float *dx = act_target(to, buffer ? buffer + 2 * d : NULL);
            float r = rstd[i], k = r * r * (dot(dy, x, w, d) / (float)d);
            for (int64_t j = 0; j < d; j++) dx[j] = r * (dy[j] * w[j] - k * x[j]);
            act_put(to, d, dx);
            if (dw)
                for (int64_t j = 0; j < d; j++) dw[j] += dy[j] * x[j] * r;
        }
    }
}
pl_status KERNEL(rms_norm_grad)(const pl_call *c) {
    const rms_norm_grad_args args = rms_norm_grad_args_of(c);
    float *buffers;
    if (norm_buffers(c, &buffers) != PL_OK) return PL_NO_MEMORY;
    const pl_status status = sum_columns(c, PL_DIM(c, 'N'), args.dw, rms_norm_grad_piece, buffers);
    pl_release(buffers);
    return status;
}

#endif
