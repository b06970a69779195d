/* Gated short convolutions over packed sequences (LFM2). A row of x has three parts of D columns,
 * b, c and v: y[n] = c[n] (bias + sum over t of w[t] u[n - K + 1 + t]) with u = b v, where rows
 * before a sequence's first one count as 0. N counts rows, S offsets, K taps of w [D,1,K].
 *
 * conv_silu is the same convolution without gates (Qwen3.5): x is u itself, and y is silu of the
 * sum. Functions with `gated` serve both. */
#ifndef PYLOSS_SHORT_CONV_TPL_H
#define PYLOSS_SHORT_CONV_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/vec.h"

typedef struct {
    const pl_call *call;
    const float *x, *bias, *dy; /* bias may be NULL; without gates dy is the sum's gradient */
    const float *given;         /* w */
    float *w;                   /* [K,D], the taps side by side */
    const int32_t *offsets;
    float *y, *dx, *dw, *dbias;
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

/* silu(x) = x sigmoid(x), and its slope. */
INLINE vf conv_sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }
INLINE vf conv_silu(vf x) { return x * conv_sigmoid(x); }
INLINE vf conv_silu_slope(vf x) {
    const vf s = conv_sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

/* n columns of a row of y; `u` as in conv_sum, whose products `multiply`. */
INLINE void conv_step(const conv_job *job, const float *x, const float *u, int64_t step,
                      const int multiply, const int gated, int64_t seen, int64_t j, float *y,
                      int64_t n) {
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const float *bias = job->bias ? job->bias + j : NULL;
    const vf sum = conv_sum(job->w + j, bias, u, step, multiply, taps, seen, d, n);
    conv_store(y, gated ? conv_load(x + d, n) * sum : conv_silu(sum), n);
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

INLINE void conv_rows(const conv_job *job, int64_t begin, int64_t end, const int gated) {
    const int64_t d = PL_DIM(job->call, 'D'), step = gated ? 3 * d : d;
    int64_t s = sequence_at(job->offsets, PL_DIM(job->call, 'S'), begin);
    for (int64_t i = begin; i < end; i++) {
        while (job->offsets[s + 1] <= i) s++;
        const int64_t seen = i - job->offsets[s] + 1;
        const float *x = job->x + i * step;
        float *y = job->y + i * d;
        CONV_COLUMNS(conv_step(job, x + j, x + j, step, gated, gated, seen, j, y + j, n));
    }
}
static void short_conv_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    conv_rows(context, begin, end, 1);
}
static void conv_silu_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    conv_rows(context, begin, end, 0);
}
static pl_status conv_forward(conv_job job, pl_range_fn piece) {
    const pl_call *c = job.call;
    job.w = taps_of(c, job.given);
    if (!job.w) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), 4 * PL_DIM(c, 'D'), piece, &job);
    pl_release(job.w);
    return PL_OK;
}
#define CONV_JOB(c, args) \
    { .call = c, .x = (args).x, .bias = (args).bias, .given = (args).w, .offsets = (args).offsets }
pl_status KERNEL(short_conv_forward)(const pl_call *c) {
    const short_conv_forward_args args = short_conv_forward_args_of(c);
    conv_job job = CONV_JOB(c, args);
    job.y = args.y;
    return conv_forward(job, short_conv_piece);
}
pl_status KERNEL(conv_silu_forward)(const pl_call *c) {
    const conv_silu_forward_args args = conv_silu_forward_args_of(c);
    conv_job job = CONV_JOB(c, args);
    job.y = args.y;
    return conv_forward(job, conv_silu_piece);
}

/* The gradient of u at row i is the sum over t of w[t] dy c at row i + K - 1 - t. */
INLINE void conv_grad_step(const conv_job *job, const float *x, const float *dy, const float *w,
                           const float *bias, int64_t seen, int64_t left, float *dx, float *partial,
                           const int gated, int64_t n) {
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const int64_t step = gated ? 3 * d : d;
    const vf g = conv_load(dy, n);
    vf du = vf_set1(0);
    for (int64_t t = left < taps ? taps - left : 0; t < taps; t++) {
        const int64_t later = taps - 1 - t;
        const vf one = conv_load(w + t * d, n) * conv_load(dy + later * d, n);
        du += gated ? one * conv_load(x + later * step + d, n) : one;
    }
    if (gated) {
        conv_store(dx + d, g * conv_sum(w, bias, x, step, 1, taps, seen, d, n), n);
        conv_store(dx, du * conv_load(x + 2 * d, n), n);
        conv_store(dx + 2 * d, du * conv_load(x, n), n);
    } else {
        conv_store(dx, du, n);
    }
    if (!partial) return;
    const vf dv = gated ? g * conv_load(x + d, n) : g;
    for (int64_t t = seen < taps ? taps - seen : 0; t < taps; t++) {
        const float *row = x - (taps - 1 - t) * step;
        float *to = partial + t * d;
        const vf u = gated ? conv_gate(row, d, n) : conv_load(row, n);
        conv_store(to, conv_load(to, n) + dv * u, n);
    }
    float *to = partial + taps * d;
    conv_store(to, conv_load(to, n) + dv, n);
}

INLINE void conv_grad_blocks(const conv_job *job, int64_t begin, int64_t end, const int gated) {
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const int64_t step = gated ? 3 * d : d;
    for (int64_t b = begin; b < end; b++) {
        float *partial = job->partial ? job->partial + b * (taps + 1) * d : NULL;
        if (partial) memset(partial, 0, (size_t)((taps + 1) * d) * sizeof *partial);
        const int64_t first = b * job->block;
        const int64_t last = at_most(first + job->block, PL_DIM(job->call, 'N'));
        int64_t s = sequence_at(job->offsets, PL_DIM(job->call, 'S'), first);
        for (int64_t i = first; i < last; i++) {
            while (job->offsets[s + 1] <= i) s++;
            const int64_t seen = i - job->offsets[s] + 1, left = job->offsets[s + 1] - i;
            CONV_COLUMNS(conv_grad_step(job, job->x + i * step + j, job->dy + i * d + j, job->w + j,
                                        job->bias ? job->bias + j : NULL, seen, left,
                                        job->dx + i * step + j, partial ? partial + j : NULL, gated,
                                        n));
        }
    }
}
static void short_conv_grad_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    conv_grad_blocks(context, begin, end, 1);
}
static void conv_silu_grad_piece(const void *context, int64_t begin, int64_t end,
                                 int worker UNUSED) {
    conv_grad_blocks(context, begin, end, 0);
}
/* The gradient of the sum under silu, in `y`. */
static void silu_slope_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const conv_job *job = context;
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    int64_t s = sequence_at(job->offsets, PL_DIM(job->call, 'S'), begin);
    for (int64_t i = begin; i < end; i++) {
        while (job->offsets[s + 1] <= i) s++;
        const int64_t seen = i - job->offsets[s] + 1;
        CONV_COLUMNS(
            conv_store(job->y + i * d + j,
                       conv_load(job->dy + i * d + j, n) *
                           conv_silu_slope(conv_sum(job->w + j, job->bias ? job->bias + j : NULL,
                                                    job->x + i * d + j, d, 0, taps, seen, d, n)),
                       n));
    }
}
static void join_taps_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const conv_job *job = context;
    const int64_t d = PL_DIM(job->call, 'D'), taps = PL_DIM(job->call, 'K');
    const int64_t blocks = (PL_DIM(job->call, 'N') + job->block - 1) / job->block;
    for (int64_t j = begin; j < end; j++)
        for (int64_t t = 0; t <= taps; t++) {
            double sum = 0;
            for (int64_t b = 0; b < blocks; b++)
                sum += (double)job->partial[(b * (taps + 1) + t) * d + j];
            if (t < taps && job->dw) job->dw[j * taps + t] = (float)sum;
            if (t == taps && job->dbias) job->dbias[j] = (float)sum;
        }
}
static pl_status conv_grad(conv_job job, pl_range_fn piece, const int gated) {
    const pl_call *c = job.call;
    const int64_t d = PL_DIM(c, 'D'), taps = PL_DIM(c, 'K'), rows = PL_DIM(c, 'N');
    const int sums = job.dw || job.dbias;
    job.w = taps_of(c, job.given);
    job.block = sums ? 32 : grain_for(rows, 8 * d);
    const int64_t blocks = (rows + job.block - 1) / job.block;
    if (job.w && sums)
        job.partial = pl_acquire((size_t)(blocks * (taps + 1) * d + 1) * sizeof(float));
    if (!gated) job.y = pl_acquire((size_t)(rows * d + 1) * sizeof(float));
    const int ready = job.w && (job.partial || !sums) && (job.y || gated);
    if (ready) {
        if (!gated) {
            in_pieces(rows, 4 * d, silu_slope_piece, &job);
            job.dy = job.y;
        }
        pl_parallel(blocks, 1, piece, &job);
        if (sums) pl_parallel(d, grain_of(blocks * (taps + 1)), join_taps_piece, &job);
    }
    if (!gated) pl_release(job.y);
    pl_release(job.partial);
    pl_release(job.w);
    return ready ? PL_OK : PL_NO_MEMORY;
}
#define CONV_GRAD_JOB(c, args) \
    { \
        .call = c, .x = (args).x, .bias = (args).bias, .given = (args).w, \
        .offsets = (args).offsets, .dy = (args).dy, .dx = (args).dx, .dw = (args).dw, \
        .dbias = (args).dbias \
    }
pl_status KERNEL(short_conv_grad)(const pl_call *c) {
    const short_conv_grad_args args = short_conv_grad_args_of(c);
    return conv_grad((conv_job)CONV_GRAD_JOB(c, args), short_conv_grad_piece, 1);
}
pl_status KERNEL(conv_silu_grad)(const pl_call *c) {
    const conv_silu_grad_args args = conv_silu_grad_args_of(c);
    return conv_grad((conv_job)CONV_GRAD_JOB(c, args), conv_silu_grad_piece, 0);
}

/* The convolution of sequences that grow: u of the N new rows goes to `rows` of `store` [M,D], in
 * which k_offsets bound the sequences; the last new row of each is the last there. */
typedef struct {
    conv_job conv; /* its offsets are those of the new rows */
    const int32_t *k_offsets, *rows;
    float *store;
} conv_store_job;
INLINE void put_rows_of(const conv_store_job *job, int64_t begin, int64_t end, const int gated) {
    const int64_t d = PL_DIM(job->conv.call, 'D'), step = gated ? 3 * d : d;
    for (int64_t i = begin; i < end; i++) {
        const float *x = job->conv.x + i * step;
        CONV_COLUMNS(conv_store(job->store + job->rows[i] * d + j,
                                gated ? conv_gate(x + j, d, n) : conv_load(x + j, n), n));
    }
}
INLINE void conv_store_rows(const conv_store_job *job, int64_t begin, int64_t end,
                            const int gated) {
    const conv_job *conv = &job->conv;
    const int64_t d = PL_DIM(conv->call, 'D'), step = gated ? 3 * d : d;
    int64_t s = sequence_at(conv->offsets, PL_DIM(conv->call, 'S'), begin);
    for (int64_t i = begin; i < end; i++) {
        while (conv->offsets[s + 1] <= i) s++;
        const int64_t row = job->k_offsets[s + 1] - (conv->offsets[s + 1] - i);
        const int64_t seen = at_least(row - job->k_offsets[s] + 1, 0);
        CONV_COLUMNS(conv_step(conv, conv->x + i * step + j, job->store + row * d + j, d, 0, gated,
                               seen, j, conv->y + i * d + j, n));
    }
}
static void put_gated_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    put_rows_of(context, begin, end, 1);
}
static void put_plain_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    put_rows_of(context, begin, end, 0);
}
static void short_conv_step_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    conv_store_rows(context, begin, end, 1);
}
static void conv_silu_step_piece(const void *context, int64_t begin, int64_t end,
                                 int worker UNUSED) {
    conv_store_rows(context, begin, end, 0);
}
static pl_status conv_store_step(conv_store_job job, pl_range_fn put, pl_range_fn piece) {
    const pl_call *c = job.conv.call;
    job.conv.w = taps_of(c, job.conv.given);
    if (!job.conv.w) return PL_NO_MEMORY;
    in_pieces(PL_DIM(c, 'N'), 3 * PL_DIM(c, 'D'), put, &job);
    in_pieces(PL_DIM(c, 'N'), 4 * PL_DIM(c, 'D'), piece, &job);
    pl_release(job.conv.w);
    return PL_OK;
}
#define CONV_STORE_JOB(c, args) \
    { \
        .conv = {.call = c, \
                 .x = (args).x, \
                 .bias = (args).bias, \
                 .given = (args).w, \
                 .offsets = (args).q_offsets, \
                 .y = (args).y}, \
        .k_offsets = (args).k_offsets, .rows = (args).rows, .store = (args).store \
    }
pl_status KERNEL(short_conv_step)(const pl_call *c) {
    const short_conv_step_args args = short_conv_step_args_of(c);
    return conv_store_step((conv_store_job)CONV_STORE_JOB(c, args), put_gated_piece,
                           short_conv_step_piece);
}
pl_status KERNEL(conv_silu_step)(const pl_call *c) {
    const conv_silu_step_args args = conv_silu_step_args_of(c);
    return conv_store_step((conv_store_job)CONV_STORE_JOB(c, args), put_plain_piece,
                           conv_silu_step_piece);
}

#undef CONV_STORE_JOB
#undef CONV_GRAD_JOB
#undef CONV_JOB
#undef CONV_COLUMNS
#endif
