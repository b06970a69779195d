/* Gated short convolutions over packed sequences (LFM2). A row of x has three parts of D columns,
 * b, c and v: y[n] = c[n] (bias + sum over t of w[t] u[n - K + 1 + t]) with u = b v, where rows
 * before a sequence's first one count as 0. N counts rows, S offsets, K taps of w [D,1,K]. */
#ifndef PYLOSS_SHORT_CONV_TPL_H
#define PYLOSS_SHORT_CONV_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/vec.h"

typedef struct {
    const pl_call *call;
    const float *x, *bias, *dy; /* bias may be NULL */
    float *w;                   /* [K,D], the taps side by side */
    const int32_t *offsets;
    float *partial; /* [blocks,K+1,D], sums of the gradients of w and bias, or NULL */
    int64_t block;  /* rows of a block */
} conv_job;

/* w [D,1,K] as [K,D], to be released; NULL without memory. */
static float *taps_of(const pl_call *c, const float *w) {
    const int64_t d = PL_DIM(c, 'D'), taps = PL_DIM(c, 'K');
    float *by_tap = pl_acquire((size_t)(d * taps + 1) * sizeof *w);
    for (int64_t t = 0; by_tap && t < taps; t++)
        for (int64_t j = 0; j < d; j++) by_tap[t * d + j] = w[j * taps + t];
    return by_tap;
}

/* The sequence that has row i: the last one that begins there or before. */
INLINE int64_t sequence_at(const int32_t *offsets, int64_t count, int64_t i) {
    int64_t low = 0, high = count - 1;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (offsets[middle] <= i) low = middle;
        else high = middle;
    }
    return low;
}

/* n columns. Masked loads and stores of whole vectors are slower, stores many times on some
 * processors. */
INLINE vf conv_load(const float *p, int64_t n) {
    return n == LANES ? vf_load(p) : vf_load_part(p, n, 0);
}
INLINE void conv_store(float *p, vf v, int64_t n) {
    if (n == LANES) vf_store(p, v);
    else vf_store_part(p, v, n);
}
INLINE vf conv_gate(const float *x, int64_t d, int64_t n) {
    return conv_load(x, n) * conv_load(x + 2 * d, n);
}

/* n columns of bias + sum of w u. The sequence has `seen` rows up to this one. `u` is this row of
 * u, or with `gated` that of x; rows are `step` apart. */
INLINE vf conv_sum(const float *w, const float *bias, const float *u, int64_t step, int gated,
                   int64_t taps, int64_t seen, int64_t d, int64_t n) {
    vf sum = bias ? conv_load(bias, n) : vf_set1(0);
    for (int64_t t = seen < taps ? taps - seen : 0; t < taps; t++) {
        const float *row = u - (taps - 1 - t) * step;
        const vf one = gated ? conv_gate(row, d, n) : conv_load(row, n);
        sum += conv_load(w + t * d, n) * one;
    }
    return sum;
}

INLINE void conv_step(const conv_job *job, const float *x, const float *u, int64_t step, int gated,
                      int64_t seen, int64_t j, float *y, int64_t n) {
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const float *bias = job->bias ? job->bias + j : NULL;
    const vf sum = conv_sum(job->w + j, bias, u, step, gated, taps, seen, d, n);
    conv_store(y, conv_load(x + d, n) * sum, n);
}

/* `one` of all columns from j = 0 to d, n at a time. */
#define CONV_COLUMNS(one) \
    { \
        int64_t j = 0; \
        for (const int64_t n = LANES; j + n <= d; j += n) one; \
        if (j < d) { \
            const int64_t n = d - j; \
            one; \
        } \
    }

static void short_conv_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const conv_job *job = context;
    const int64_t d = PL_DIM(job->call, 'D');
    float *y = short_conv_forward_args_of(job->call).y;
    int64_t s = sequence_at(job->offsets, PL_DIM(job->call, 'S'), begin);
    for (int64_t i = begin; i < end; i++) {
        while (job->offsets[s + 1] <= i) s++;
        const int64_t seen = i - job->offsets[s] + 1;
        const float *x = job->x + i * 3 * d;
        CONV_COLUMNS(conv_step(job, x + j, x + j, 3 * d, 1, seen, j, y + i * d + j, n));
    }
}
pl_status KERNEL(short_conv_forward)(const pl_call *c) {
    const short_conv_forward_args args = short_conv_forward_args_of(c);
    const conv_job job = {.call = c,
                          .x = args.x,
                          .bias = args.bias,
                          .w = taps_of(c, args.w),
                          .offsets = args.offsets};
    if (!job.w) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), 4 * PL_DIM(c, 'D'), short_conv_piece, &job);
    pl_release(job.w);
    return PL_OK;
}

/* The gradient of u at row i is the sum over t of w[t] dy c at row i + K - 1 - t. */
INLINE void conv_grad_step(const conv_job *job, const float *x, const float *dy, const float *w,
                           const float *bias, int64_t seen, int64_t left, float *dx, float *partial,
                           int64_t n) {
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const vf g = conv_load(dy, n);
    conv_store(dx + d, g * conv_sum(w, bias, x, 3 * d, 1, taps, seen, d, n), n);
    vf du = vf_set1(0);
    for (int64_t t = left < taps ? taps - left : 0; t < taps; t++) {
        const int64_t later = taps - 1 - t;
        du += conv_load(w + t * d, n) * conv_load(dy + later * d, n) *
              conv_load(x + later * 3 * d + d, n);
    }
    conv_store(dx, du * conv_load(x + 2 * d, n), n);
    conv_store(dx + 2 * d, du * conv_load(x, n), n);
    if (!partial) return;
    const vf dv = g * conv_load(x + d, n);
    for (int64_t t = seen < taps ? taps - seen : 0; t < taps; t++) {
        float *to = partial + t * d;
        conv_store(to, conv_load(to, n) + dv * conv_gate(x - (taps - 1 - t) * 3 * d, d, n), n);
    }
    float *to = partial + taps * d;
    conv_store(to, conv_load(to, n) + dv, n);
}

static void short_conv_grad_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    const conv_job *job = context;
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    float *dx = short_conv_grad_args_of(job->call).dx;
    for (int64_t b = begin; b < end; b++) {
        float *partial = job->partial ? job->partial + b * (taps + 1) * d : NULL;
        if (partial) memset(partial, 0, (size_t)((taps + 1) * d) * sizeof *partial);
        const int64_t first = b * job->block;
        const int64_t last = at_most(first + job->block, PL_DIM(job->call, 'N'));
        int64_t s = sequence_at(job->offsets, PL_DIM(job->call, 'S'), first);
        for (int64_t i = first; i < last; i++) {
            while (job->offsets[s + 1] <= i) s++;
            const int64_t seen = i - job->offsets[s] + 1, left = job->offsets[s + 1] - i;
            CONV_COLUMNS(conv_grad_step(job, job->x + i * 3 * d + j, job->dy + i * d + j,
                                        job->w + j, job->bias ? job->bias + j : NULL, seen, left,
                                        dx + i * 3 * d + j, partial ? partial + j : NULL, n));
        }
    }
}
static void join_taps_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const conv_job *job = context;
    const short_conv_grad_args args = short_conv_grad_args_of(job->call);
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const int64_t blocks = (PL_DIM(job->call, 'N') + job->block - 1) / job->block;
    for (int64_t j = begin; j < end; j++)
        for (int64_t t = 0; t <= taps; t++) {
            double sum = 0;
            for (int64_t b = 0; b < blocks; b++)
                sum += (double)job->partial[(b * (taps + 1) + t) * d + j];
            if (t < taps && args.dw) args.dw[j * taps + t] = (float)sum;
            if (t == taps && args.dbias) args.dbias[j] = (float)sum;
        }
}
pl_status KERNEL(short_conv_grad)(const pl_call *c) {
    const short_conv_grad_args args = short_conv_grad_args_of(c);
    const int64_t d = PL_DIM(c, 'D'), taps = PL_DIM(c, 'K'), rows = PL_DIM(c, 'N');
    const int sums = args.dw || args.dbias;
    conv_job job = {.call = c,
                    .x = args.x,
                    .bias = args.bias,
                    .dy = args.dy,
                    .w = taps_of(c, args.w),
                    .offsets = args.offsets,
                    .block = sums ? 32 : grain_for(rows, 8 * d)};
    const int64_t blocks = (rows + job.block - 1) / job.block;
    if (job.w && sums)
        job.partial = pl_acquire((size_t)(blocks * (taps + 1) * d + 1) * sizeof(float));
    const int ready = job.w && (job.partial || !sums);
    if (ready) {
        pl_parallel(blocks, 1, short_conv_grad_piece, &job);
        if (sums) pl_parallel(d, grain_of(blocks * (taps + 1)), join_taps_piece, &job);
    }
    pl_release(job.partial);
    pl_release(job.w);
    return ready ? PL_OK : PL_NO_MEMORY;
}

/* The convolution of sequences that grow: u of the N new rows goes to `rows` of `store` [M,D], in
 * which k_offsets bound the sequences; the last new row of each is the last there. */
static void put_gated_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const short_conv_step_args args = short_conv_step_args_of(c);
    const int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++)
        CONV_COLUMNS(conv_store(args.store + args.rows[i] * d + j,
                                conv_gate(args.x + i * 3 * d + j, d, n), n));
}
static void short_conv_step_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    const conv_job *job = context;
    const short_conv_step_args args = short_conv_step_args_of(job->call);
    const int64_t d = PL_DIM(job->call, 'D');
    int64_t s = sequence_at(args.q_offsets, PL_DIM(job->call, 'S'), begin);
    for (int64_t i = begin; i < end; i++) {
        while (args.q_offsets[s + 1] <= i) s++;
        const int64_t row = args.k_offsets[s + 1] - (args.q_offsets[s + 1] - i);
        const int64_t seen = at_least(row - args.k_offsets[s] + 1, 0);
        CONV_COLUMNS(conv_step(job, args.x + i * 3 * d + j, args.store + row * d + j, d, 0, seen, j,
                               args.y + i * d + j, n));
    }
}
pl_status KERNEL(short_conv_step)(const pl_call *c) {
    const short_conv_step_args args = short_conv_step_args_of(c);
    const conv_job job = {.call = c, .bias = args.bias, .w = taps_of(c, args.w)};
    if (!job.w) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), 3 * PL_DIM(c, 'D'), put_gated_piece, c);
    in_pieces(PL_DIM(c, 'N'), 4 * PL_DIM(c, 'D'), short_conv_step_piece, &job);
    pl_release(job.w);
    return PL_OK;
}

#undef CONV_COLUMNS
#endif
