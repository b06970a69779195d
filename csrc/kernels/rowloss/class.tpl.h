/* Class losses of the computed type; included by rowloss_real.tpl.h.
 * Arguments: logits, labels, options..., dloss, loss, dlogits. */

typedef void (*TYPED(class_formula))(TYPED(class_row) *row, const double *option);

/* What is left of the gradient slope (by_p p + [not masked] by_mean + [label] by_label) where logits are needed again: `u` is its
 * first and last term. The logits are read before their block is written, for the gradient may lie there. */
INLINE void TYPED(write_class_row)(TYPED(reading) how, const TYPED(unwritten) *u, double by_mean) {
    REAL gradient[ROW_BLOCK], logits[ROW_BLOCK];
    for (int64_t begin = 0; begin < u->n; begin += ROW_BLOCK) {
        int64_t m = u->n - begin < ROW_BLOCK ? u->n - begin : ROW_BLOCK;
        const REAL *x = TYPED(fetch)(how.rows, u->i, begin, m, logits);
        TYPED(unwritten_part) part = TYPED(begin_writing)(u, begin, m);
        for (int64_t j = 0; j < m; j += WIDTH)
            TYPED(store)(gradient + j, TYPED(gradient_at)(&part, j, m - j), m - j);
        if (u->special_at >= begin && u->special_at < begin + m)
            gradient[u->special_at - begin] = u->special;
        V masked = VEC(set1)((REAL)-INFINITY), by = VEC(set1)((REAL)by_mean), zero = {0},
          one = VEC(set1)(1);
        for (int64_t j = 0; j < m; j += WIDTH) {
            V v = TYPED(load)(x + j, m - j, 0), g = TYPED(load)(gradient + j, m - j, 0);
            if (how.with_mean) g += VEC(select)(VEC(equal)(v, masked), zero, by);
            V t = how.softcap > 0 ? TYPED(capped)(v, VEC(set1)(how.softcap)) / how.softcap : zero;
            if (how.softcap > 0) g *= VEC(select)(VEC(equal)(v, masked), zero, one - t * t);
            TYPED(store)(gradient + j, g, m - j);
        }
        REAL *to = TYPED(target)(u->out, u->i, begin, NULL);
        if ((int)u->out->type == TYPED(native)) memcpy(to, gradient, (size_t)m * sizeof *to);
        else TYPED(put)(u->out, u->i, begin, m, gradient, 1);
    }
}

/* Rows [begin, end) of a class loss. A row with label -1 gives 0 and gradient 0. */
INLINE void TYPED(class_rows)(TYPED(family) f, TYPED(class_formula) formula, int mean_option,
                              int softcap_option, const class_args *args, const row_job *job,
                              int64_t begin, int64_t end, int worker) {
    int64_t n = PL_DIM(job->call, 'V');
    const int32_t *labels = args->labels;
    const REAL *dloss = args->dloss;
    REAL *loss = args->loss, at[1];
    const pl_rows *out = args->dlogits;
    const double *option = args->option;
    TYPED(reading) how = {.rows = args->logits, .scale = 1, .with_slope = 1};
    if (softcap_option >= 0) how.softcap = (REAL)option[softcap_option];
    if (mean_option >= 0) how.with_mean = option[mean_option] > 0;
    /* A streamed gradient waits while the next row has the other turn; the second is there only then. */
    TYPED(row_statistics) turns[2] = {TYPED(statistics_in)(TYPED(scratch)(job, worker, 0), n),
                                      TYPED(statistics_in)(TYPED(scratch)(job, worker, 1), n)};
    TYPED(unwritten) late = {0};
    int turn = 0;
    for (int64_t i = begin; i < end; i++) {
        int silent = out->data && (labels[i] < 0 || (dloss && dloss[i] == 0)),
            gradient = out->data && !silent;
        if (labels[i] < 0) {
            loss[i] = 0;
            if (silent) TYPED(put_zeros)(out, i, n);
            continue;
        }
        REAL label = TYPED(fetch)(how.rows, i, labels[i], 1, at)[0];
        V at_label = VEC(set1)(label);
        if (how.softcap > 0) at_label = TYPED(capped)(at_label, VEC(set1)(how.softcap));
        /* The plain ways are instances of their own. */
        TYPED(row_statistics) *row = &turns[turn], unkept = {.block_shift = row->block_shift};
        TYPED(reading) plain = {.rows = how.rows, .scale = 1, .with_slope = 1};
        int again = how.softcap > 0 || how.with_mean;
        if (again) {
            TYPED(take_statistics)(f, how, i, n, row, NULL, 0, 1);
        } else if (gradient) {
            TYPED(take_statistics)(f, plain, i, n, row, &late, 0, 1);
            late.out = NULL;
        } else {
            TYPED(take_statistics)(f, plain, i, n, &unkept, NULL, 0, 1);
            row = &unkept;
        }
        double log_total = log(row->total);
        TYPED(class_row) r = {.log_p = ((double)f.log_weight(at_label)[0] - (double)row->shift) -
                                       log_total,
                              .log_sum = log_total + (double)row->shift};
        if (how.with_mean)
            r.mean_log_p = (row->sum_x / (double)row->count - (double)row->shift) - log_total;
        formula(&r, option);
        loss[i] = (REAL)r.loss;
        if (silent) TYPED(put_zeros)(out, i, n); /* only now: it may lie where the logits do */
        if (!gradient) continue;
        double given = dloss ? (double)dloss[i] : 1;
        double by_p = given * (r.d_log_sum - r.d_log_p - r.d_mean_log_p), by_mean = 0;
        if (how.with_mean) by_mean = given * r.d_mean_log_p / (double)row->count;
        int64_t at_block = labels[i] / ROW_BLOCK * ROW_BLOCK;
        V prob = TYPED(block_factor)(row, at_block, how.scale, by_p);
        double by_label = given * r.d_log_p;
        late = (TYPED(unwritten)){.out = out,
                                  .i = i,
                                  .n = n,
                                  .weights = row,
                                  .scale = how.scale,
                                  .by_weights = by_p,
                                  .special_at = labels[i],
                                  .special =
                                      row->kept[labels[i]] * prob[0] +
                                      (REAL)by_label * (f.slope ? f.slope(VEC(set1)(label))[0] : 1),
                                  .stream = job->stream};
        if (again) {
            TYPED(write_class_row)(how, &late, by_mean);
            late.out = NULL;
        } else if (job->stream) turn ^= 1;
        else TYPED(write_row)(&late);
    }
    TYPED(write_row)(&late);
}
