/* Pair losses of the computed type; included by rowloss_real.tpl.h.
 * Arguments: q, p, temperature, options..., dloss, loss, dq, dp. */

typedef void (*TYPED(pair_formula))(TYPED(pair_element) *e, const double *option);

/* What one of the two rows needs: its weights, its derivatives where they have to wait for their sum, and that sum. */
typedef struct {
    TYPED(row_statistics) row;
    REAL *by;
    double sum;
} TYPED(pair_side);

/* The gradient of row i: factor (by - prob * sum), prob from the kept weights. Where by sums to 0 it is the gradient itself. */
INLINE TYPED(unwritten)
    TYPED(pair_gradient)(const row_job *job, const pl_rows *out, int64_t i,
                         const TYPED(pair_side) *s, REAL scale, double factor, int direct) {
    return (TYPED(unwritten)){.out = out,
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

/* What a walk over two rows is asked for. */
typedef struct {
    int want_q, want_p;
} TYPED(pair_mode);

/* `left` elements of the two rows at once; returns their part of the loss. */
INLINE V TYPED(pair_step)(TYPED(pair_formula) formula, const double *option, TYPED(pair_mode) mode,
                          const REAL *xq, const REAL *xp, const REAL *kept_q, const REAL *kept_p,
                          int64_t left, const V constants[6], V *by_q, V *by_p) {
    V max_q = constants[0], max_p = constants[1], scale = constants[2], offset = constants[3];
    TYPED(pair_element) e = {.q = TYPED(load)(kept_q, left, 0) * constants[4],
                             .p = TYPED(load)(kept_p, left, 0) * constants[5]};
    /* log(q / p) = scale ((x_q - max_q) - (x_p - max_p)) - (log total_q - log total_p): large common parts go first. */
    e.log_ratio =
        ((TYPED(load)(xq, left, 0) - max_q) - (TYPED(load)(xp, left, 0) - max_p)) * scale - offset;
    formula(&e, option);
    if (left < WIDTH) /* lanes past the end of a row may hold anything */
        for (int64_t l = left; l < WIDTH; l++) e.loss[l] = e.by_q[l] = e.by_p[l] = 0;
    if (mode.want_q) *by_q = e.by_q;
    if (mode.want_p) *by_p = e.by_p;
    return e.loss;
}

/* Row i after the statistics of both: the loss; by_q and by_p kept and summed where wanted. */
INLINE double TYPED(pair_walk)(TYPED(pair_formula) formula, const pair_args *args, int64_t n,
                               int64_t i, REAL scale, TYPED(pair_side) *q, TYPED(pair_side) *p,
                               TYPED(pair_mode) mode) {
    REAL from_q[ROW_BLOCK], from_p[ROW_BLOCK];
    V constants[6] = {VEC(set1)(q->row.shift), VEC(set1)(p->row.shift), VEC(set1)(scale),
                      VEC(set1)((REAL)(log(q->row.total) - log(p->row.total)))};
    double total = 0;
    q->sum = p->sum = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK, j = 0;
        const REAL *xq = TYPED(fetch)(args->q, i, begin, m, from_q),
                   *xp = TYPED(fetch)(args->p, i, begin, m, from_p);
        const REAL *kept_q = q->row.kept + begin, *kept_p = p->row.kept + begin;
        REAL *to_q = q->by + begin, *to_p = p->by + begin;
        constants[4] = TYPED(block_factor)(&q->row, begin, scale, 1);
        constants[5] = TYPED(block_factor)(&p->row, begin, scale, 1);
        V sum = {0}, sum_q = {0}, sum_p = {0}, by_q = {0}, by_p = {0};
#define STEP(left) \
    do { \
        sum += TYPED(pair_step)(formula, args->option, mode, xq + j, xp + j, kept_q + j, \
                                kept_p + j, left, constants, &by_q, &by_p); \
        if (mode.want_q) sum_q += by_q; \
        if (mode.want_q) TYPED(store)(to_q + j, by_q, left); \
        if (mode.want_p) sum_p += by_p; \
        if (mode.want_p) TYPED(store)(to_p + j, by_p, left); \
    } while (0)
        for (; j + WIDTH <= m; j += WIDTH) STEP(WIDTH);
        if (j < m) STEP(m - j);
#undef STEP
        total += (double)VEC(sum)(sum);
        if (mode.want_q) q->sum += (double)VEC(sum)(sum_q);
        if (mode.want_p) p->sum += (double)VEC(sum)(sum_p);
    }
    return total < 0 ? 0 : total; /* a divergence is not negative, but rounding may be */
}

/* With q_direct, the table says that by_q sums to 0. */
INLINE void TYPED(pair_rows)(TYPED(pair_formula) formula, const int q_direct, const pair_args *args,
                             const row_job *job, int64_t begin, int64_t end, int worker) {
    int64_t n = PL_DIM(job->call, 'V');
    const REAL *dloss = args->dloss;
    REAL *loss = args->loss;
    const pl_rows *dq = args->dq, *dp = args->dp;
    double inverse = 1 / args->temperature;
    REAL scale = (REAL)inverse;
#define SIDE(first) \
    {.row = TYPED(statistics_in)(TYPED(scratch)(job, worker, first), n), \
     .by = TYPED(scratch)(job, worker, first + 1)}
    /* A streamed gradient of q waits while the next row has the other turn; the second is there only then. */
    TYPED(pair_side) p = SIDE(0), turns[2] = {SIDE(2), SIDE(4)};
#undef SIDE
    if (q_direct) /* nothing needs its weights once the walk has been there */
        for (int t = 0; t < 2; t++) turns[t].by = turns[t].row.kept;
    TYPED(unwritten) late = {0};
    int turn = 0;
    TYPED(reading) how_q = {.rows = args->q, .scale = scale},
                   how_p = {.rows = args->p, .scale = scale};
    for (int64_t i = begin; i < end; i++) {
        int silent = dloss && dloss[i] == 0, want_q = dq->data && !silent,
            want_p = dp->data && !silent;
        TYPED(pair_side) *q = &turns[turn];
        TYPED(take_statistics)(FAMILY(softmax), how_q, i, n, &q->row, &late, 0, 2);
        TYPED(take_statistics)(FAMILY(softmax), how_p, i, n, &p.row, &late, 1, 2);
        late.out = NULL;
        double factor = (dloss ? (double)dloss[i] : 1) * inverse, total;
#define WALK(want_q, want_p) \
    TYPED(pair_walk)(formula, args, n, i, scale, q, &p, (TYPED(pair_mode)){want_q, want_p})
        if (want_p) total = WALK(want_q, 1);
        else if (want_q) total = WALK(1, 0);
        else total = WALK(0, 0);
#undef WALK
        loss[i] = (REAL)total;
        if (dq->data && silent)
            TYPED(put_zeros)(dq, i, n); /* only now: a gradient may lie where the logits do */
        if (dp->data && silent) TYPED(put_zeros)(dp, i, n);
        if (want_p) {
            TYPED(unwritten) now = TYPED(pair_gradient)(job, dp, i, &p, scale, factor, 0);
            TYPED(write_row)(&now);
        }
        if (!want_q) continue;
        late = TYPED(pair_gradient)(job, dq, i, q, scale, factor, q_direct);
        if (job->stream) turn ^= 1;
        else TYPED(write_row)(&late);
    }
    TYPED(write_row)(&late);
}
