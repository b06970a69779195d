/* Pair losses: two rows of logits, q and p. */
#ifndef ROWLOSS_PAIR
#define ROWLOSS_PAIR
#include "gradient.tpl.h"
#include "job.h"
#include "rows.tpl.h"
#include "statistics.tpl.h"
#include "weights.tpl.h"

typedef void (*pair_formula)(pair_element *e, const double *option);

/* One of the two rows: its weights, the derivatives that wait for their sum, and that sum. Capped
 * logits are kept where the walk then writes the derivatives. */
typedef struct {
    row_statistics row;
    REAL *by, *logits;
    double sum;
} pair_side;

/* The statistics of one of two rows. All pair losses share these instructions. */
static NOINLINE void pair_statistics(row_reading in, int64_t i, int64_t n, row_statistics *row,
                                     const pending_gradient *pending, int walk) {
    take_statistics(FAMILY(softmax), in, i, n, row, pending, walk, 2);
}

/* The gradient of row i: factor (by - prob * sum), prob from the kept weights. With `direct`, by
 * sums to 0 and is the gradient itself. */
INLINE pending_gradient pair_gradient(const row_job *job, const pl_rows *out, int64_t i,
                                      const pair_side *s, REAL scale, double factor, int direct) {
    return (pending_gradient){.out = out,
                              .i = i,
                              .n = PL_DIM(job->call, 'V'),
                              .values = s->by,
                              .by_values = factor,
                              .weights = direct ? NULL : &s->row,
                              .scale = scale,
                              .by_weights = -factor * s->sum,
                              .special_at = -1,
                              .stream = job->stream};
}

/* The gradients that a walk over two rows is to prepare. */
typedef struct {
    int want_q, want_p;
} pair_mode;

/* What all elements of a block share: the shifts, scale = 1 / temperature, the logarithm of the
 * totals' ratio, and the factors of the kept weights. */
typedef struct {
    V shift_q, shift_p, scale, log_totals, factor_q, factor_p;
} pair_constants;

/* A vector of both rows; returns its part of the loss. */
INLINE V pair_step(pair_formula formula, const double *option, pair_mode mode, const REAL *xq,
                   const REAL *xp, const REAL *kept_q, const REAL *kept_p, const pair_constants *c,
                   V *by_q, V *by_p) {
    pair_element e = {.q = v_load(kept_q) * c->factor_q, .p = v_load(kept_p) * c->factor_p};
    /* log(q / p) = scale ((x_q - shift_q) - (x_p - shift_p)) - (log total_q - log total_p):
     * large common parts are subtracted first. */
    e.log_ratio =
        ((v_load(xq) - c->shift_q) - (v_load(xp) - c->shift_p)) * c->scale - c->log_totals;
    formula(&e, option);
    if (mode.want_q) *by_q = e.by_q;
    if (mode.want_p) *by_p = e.by_p;
    return e.loss;
}

/* The n elements of a block, filled up to whole vectors: in place, or in `buffer`. */
INLINE const REAL *whole_vectors(const REAL *x, int64_t n, REAL fill, REAL *buffer) {
    if (n % WIDTH == 0) return x;
    if (x != buffer) memcpy(buffer, x, (size_t)n * sizeof *x);
    for (; n % WIDTH; n++) buffer[n] = fill;
    return buffer;
}

/* Multiplies a block's derivatives and weights by the slope of the cap, at its capped logits z. */
static void cap_gradient(const REAL *z, int64_t n, REAL softcap, REAL *by, REAL *kept) {
    for (int64_t j = 0; j < n; j += WIDTH) {
        V slope = cap_slope(load_lanes(z + j, n - j, 0), v_set(softcap));
        store_lanes(by + j, load_lanes(by + j, n - j, 0) * slope, n - j);
        if (kept != by) store_lanes(kept + j, load_lanes(kept + j, n - j, 0) * slope, n - j);
    }
}

/* Row i after the statistics of both: the loss; by_q and by_p are kept and summed where wanted. */
INLINE double pair_walk(pair_formula formula, const double *option, row_reading in_q,
                        row_reading in_p, int64_t n, int64_t i, pair_side *q, pair_side *p,
                        pair_mode mode) {
    REAL scale = in_q.scale;
    REAL from_q[ROW_BLOCK], from_p[ROW_BLOCK];
    pair_constants c = {.shift_q = v_set(q->row.shift),
                        .shift_p = v_set(p->row.shift),
                        .scale = v_set(scale),
                        .log_totals = v_set((REAL)(log(q->row.total) - log(p->row.total)))};
    double total = 0;
    q->sum = p->sum = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        const REAL *xq = reread_block(in_q, i, begin, m, from_q),
                   *xp = reread_block(in_p, i, begin, m, from_p);
        REAL *kept_q = q->row.kept + begin, *kept_p = p->row.kept + begin;
        REAL *to_q = q->by + begin, *to_p = p->by + begin;
        c.factor_q = block_factor(&q->row, begin, scale, 1);
        c.factor_p = block_factor(&p->row, begin, scale, 1);
        /* Elements past the end of a row have probability 0 on both sides, and add 0. */
        xq = whole_vectors(xq, m, q->row.shift, from_q);
        xp = whole_vectors(xp, m, p->row.shift, from_p);
        whole_vectors(kept_q, m, 0, kept_q);
        whole_vectors(kept_p, m, 0, kept_p);
        V sum = {0}, sum_q = {0}, sum_p = {0}, by_q = {0}, by_p = {0};
        for (int64_t j = 0; j < m; j += WIDTH) {
            sum += pair_step(formula, option, mode, xq + j, xp + j, kept_q + j, kept_p + j, &c,
                             &by_q, &by_p);
            if (mode.want_q) sum_q += by_q;
            if (mode.want_q) v_store(to_q + j, by_q);
            if (mode.want_p) sum_p += by_p;
            if (mode.want_p) v_store(to_p + j, by_p);
        }
        total += (double)v_sum(sum);
        if (mode.want_q) q->sum += (double)v_sum(sum_q);
        if (mode.want_p) p->sum += (double)v_sum(sum_p);
        if (mode.want_q && in_q.softcap > 0)
            cap_gradient(xq, m, in_q.softcap, to_q, q->row.kept + begin);
        if (mode.want_p && in_p.softcap > 0)
            cap_gradient(xp, m, in_p.softcap, to_p, p->row.kept + begin);
    }
    return total < 0 ? 0 : total; /* a divergence is not negative, but rounding may be */
}

/* Rows [begin, end) of a pair loss. With q_direct, the table says that by_q sums to 0. */
INLINE void pair_rows(pair_formula formula, const int q_direct, const pair_args *args,
                      const row_job *job, int64_t begin, int64_t end, int worker) {
    int64_t n = PL_DIM(job->call, 'V');
    const REAL *dloss = args->dloss;
    REAL *loss = args->loss;
    const pl_rows *dq = args->dq, *dp = args->dp;
    /* Logits with a cap or a scale of their own are prepared block by block. */
    int prepare = args->softcap_q > 0 || args->softcap_p > 0 || args->scale_q != args->scale_p;
    REAL scale = prepare ? 1 : (REAL)args->scale_q;
#define SIDE(first) \
    {.row = statistics_in(scratch_part(job, worker, first), n), \
     .by = scratch_part(job, worker, first + 1), \
     .logits = scratch_part(job, worker, first + 1)}
    /* A streamed gradient of q is pending in one buffer while the next row uses the other; the
     * second buffer exists only then. */
    pair_side p = SIDE(0), buffers[2] = {SIDE(2), SIDE(4)};
#undef SIDE
    if (q_direct) /* the walk is the last to read the weights: by_q may overwrite them */
        for (int t = 0; t < 2; t++) buffers[t].by = buffers[t].row.kept;
    pending_gradient pending = {0};
    int buffer = 0;
    row_reading in_q = {.rows = args->q,
                        .scale = scale,
                        .prepare = prepare,
                        .factor = (REAL)args->scale_q,
                        .softcap = (REAL)args->softcap_q};
    row_reading in_p = {.rows = args->p,
                        .scale = scale,
                        .prepare = prepare,
                        .factor = (REAL)args->scale_p,
                        .softcap = (REAL)args->softcap_p};
    for (int64_t i = begin; i < end; i++) {
        if (args->labels && args->labels[i] < 0) {
            loss[i] = 0;
            if (dq->data) put_zeros(dq, i, n);
            if (dp->data) put_zeros(dp, i, n);
            continue;
        }
        int zero_gradient = dloss && dloss[i] == 0, want_q = dq->data && !zero_gradient,
            want_p = dp->data && !zero_gradient;
        pair_side *q = &buffers[buffer];
        if (in_q.softcap > 0) in_q.keep = q->logits;
        if (in_p.softcap > 0) in_p.keep = p.logits;
        pair_statistics(in_q, i, n, &q->row, &pending, 0);
        pair_statistics(in_p, i, n, &p.row, &pending, 1);
        pending.out = NULL;
        double given = dloss ? (double)dloss[i] : 1, total;
#define WALK(want_q, want_p) \
    pair_walk(formula, args->option, in_q, in_p, n, i, q, &p, (pair_mode){want_q, want_p})
        if (want_p) total = WALK(want_q, 1);
        else if (want_q) total = WALK(1, 0);
        else total = WALK(0, 0);
#undef WALK
        loss[i] = (REAL)total;
        /* Written only now: a gradient may lie where the logits do. */
        if (dq->data && zero_gradient) put_zeros(dq, i, n);
        if (dp->data && zero_gradient) put_zeros(dp, i, n);
        if (want_p) {
            pending_gradient now = pair_gradient(job, dp, i, &p, scale, given * args->scale_p, 0);
            write_gradient(&now);
        }
        if (!want_q) continue;
        pending = pair_gradient(job, dq, i, q, scale, given * args->scale_q, q_direct);
        if (job->stream) buffer ^= 1;
        else write_gradient(&pending);
    }
    write_gradient(&pending);
}

#endif
