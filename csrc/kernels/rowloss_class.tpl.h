/* Class losses of the computed type; included by rowloss_real.tpl.h. Arguments: logits, labels, options..., dloss, loss, dlogits. */

typedef void (*TYPED(class_formula))(TYPED(class_row) *row, const double *option);

/* to[i] = kept[i] * factor, past the caches if `stream`. Meanwhile `next`, in elements of `bytes`, is fetched unless it is NULL. */
INLINE void TYPED(scale_block)(const REAL *kept, int64_t n, V factor, REAL *to, int stream, const char *next, int64_t bytes) {
    int64_t i = 0;
    if (next)
        for (int64_t line = 0; line < n * bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
    if (stream) {
        for (; i < n && (uintptr_t)(to + i) % sizeof(V); i++) to[i] = kept[i] * factor[0];
        for (; i + WIDTH <= n; i += WIDTH) VEC(stream)(to + i, VEC(load)(kept + i) * factor);
    }
    for (; i + WIDTH <= n; i += WIDTH) VEC(store)(to + i, VEC(load)(kept + i) * factor);
    for (; i < n; i++) to[i] = kept[i] * factor[0];
}

/* The gradient of row i: slope (by_p p + [not masked] by_mean + [label] by_label). Of the row that comes next, `next` or NULL, what
 * the second-level cache has room for is fetched. */
INLINE void TYPED(class_gradient)(TYPED(family) f, TYPED(reading) how, const row_job *job, int64_t i,
                                  const TYPED(row_statistics) *row, double by_p, double by_mean, double by_label,
                                  const char *next) {
    const pl_call *c = job->call;
    int64_t bytes = float_bytes[how.rows->type];
    const pl_rows *out = &c->arg[c->count - 1].rows;
    int64_t n = PL_DIM(c, 'V'), label = ((const int32_t *)c->arg[1].in)[i];
    REAL buffer[ROW_BLOCK], logits[ROW_BLOCK], at_label = TYPED(fetch)(how.rows, i, label, 1, logits)[0];
    int again = how.softcap > 0 || how.with_mean;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        REAL *to = TYPED(target)(out, i, begin, buffer);
        V factor = TYPED(block_factor)(row, begin, how.scale, by_p);
        if (to == buffer && !again && (label < begin || label >= begin + m)) {
            TYPED(put)(out, i, begin, m, row->kept + begin, factor[0]);
            continue;
        }
        if (again) { /* before the gradient, which may lie where the logits do */
            const REAL *x = TYPED(fetch)(how.rows, i, begin, m, logits);
            if (x != logits) memcpy(logits, x, (size_t)m * sizeof *x);
        }
        const char *ahead = next && (begin + m) * bytes <= AHEAD_BYTES ? next + begin * bytes : NULL;
        TYPED(scale_block)(row->kept + begin, m, factor, to, job->stream && !again && to != buffer, ahead, bytes);
        if (how.with_mean) {
            V masked = VEC(set1)((REAL)-INFINITY), by = VEC(set1)((REAL)by_mean), zero = {0};
            for (int64_t j = 0; j < m; j += WIDTH) {
                V x = TYPED(load)(logits + j, m - j, 0), y = TYPED(load)(to + j, m - j, 0);
                TYPED(store)(to + j, y + VEC(select)(VEC(equal)(x, masked), zero, by), m - j);
            }
        }
        if (label >= begin && label < begin + m)
            to[label - begin] += (REAL)by_label * (f.slope ? f.slope(VEC(set1)(at_label))[0] : 1);
        if (how.softcap > 0)
            for (int64_t j = 0; j < m; j += WIDTH) {
                V x = TYPED(load)(logits + j, m - j, 0), t = TYPED(capped)(x, VEC(set1)(how.softcap)) / how.softcap;
                V slope = VEC(select)(VEC(equal)(x, VEC(set1)((REAL)-INFINITY)), VEC(set1)(0), 1 - t * t);
                TYPED(store)(to + j, TYPED(load)(to + j, m - j, 0) * slope, m - j);
            }
        TYPED(put)(out, i, begin, m, to, 1);
    }
}

/* Rows [begin, end) of a class loss. A row with label -1 gives 0 and gradient 0. */
INLINE void TYPED(class_rows)(TYPED(family) f, TYPED(class_formula) formula, int mean_option, int softcap_option,
                              const row_job *job, int64_t begin, int64_t end, int worker) {
    const pl_call *c = job->call;
    int64_t n = PL_DIM(c, 'V');
    const int32_t *labels = c->arg[1].in;
    const REAL *dloss = c->arg[c->count - 3].in;
    REAL *loss = c->arg[c->count - 2].out, *scratch = TYPED(scratch)(job, worker, 0), at[1];
    const pl_rows *out = &c->arg[c->count - 1].rows;
    double option[PL_MAX_ARGS];
    for (int o = 2; o < c->count - 3; o++) option[o - 2] = c->arg[o].f;
    TYPED(reading) how = {.rows = &c->arg[0].rows, .scale = 1, .with_slope = 1};
    if (softcap_option >= 0) how.softcap = (REAL)option[softcap_option];
    if (mean_option >= 0) how.with_mean = option[mean_option] > 0;
    for (int64_t i = begin; i < end; i++) {
        int silent = out->data && (labels[i] < 0 || (dloss && dloss[i] == 0)), gradient = out->data && !silent;
        if (labels[i] < 0) {
            loss[i] = 0;
            if (silent) TYPED(put_zeros)(out, i, n);
            continue;
        }
        V at_label = VEC(set1)(TYPED(fetch)(how.rows, i, labels[i], 1, at)[0]);
        if (how.softcap > 0) at_label = TYPED(capped)(at_label, VEC(set1)(how.softcap));
        /* The plain ways are instances of their own. */
        TYPED(row_statistics) row = TYPED(statistics_in)(scratch, n);
        TYPED(reading) plain = {.rows = how.rows, .scale = 1, .with_slope = 1};
        if (how.softcap > 0 || how.with_mean) {
            TYPED(take_statistics)(f, how, i, n, &row);
        } else if (gradient) {
            TYPED(take_statistics)(f, plain, i, n, &row);
        } else {
            row.kept = NULL;
            TYPED(take_statistics)(f, plain, i, n, &row);
        }
        double log_total = log(row.total);
        TYPED(class_row) r = {.log_p = ((double)f.log_weight(at_label)[0] - (double)row.shift) - log_total,
                              .log_sum = log_total + (double)row.shift};
        if (how.with_mean) r.mean_log_p = (row.sum_x / (double)row.count - (double)row.shift) - log_total;
        formula(&r, option);
        loss[i] = (REAL)r.loss;
        if (silent) TYPED(put_zeros)(out, i, n); /* only now: it may lie where the logits do */
        if (!gradient) continue;
        double given = dloss ? (double)dloss[i] : 1;
        double by_p = given * (r.d_log_sum - r.d_log_p - r.d_mean_log_p), by_mean = 0;
        if (how.with_mean) by_mean = given * r.d_mean_log_p / (double)row.count;
        const char *next = i + 1 < end ? pl_row(how.rows, i + 1) : NULL;
        TYPED(class_gradient)(f, how, job, i, &row, by_p, by_mean, given * r.d_log_p, next);
    }
}
