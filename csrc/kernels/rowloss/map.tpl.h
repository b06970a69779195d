/* Row maps of the computed type, and the largest element of a row; included by rowloss_real.tpl.h.
 * Arguments of a map: x, dy, y, dx. */

/* y = w / sum w, dx = slope y (dy - sum y dy); or y = log(w / sum w), dx = slope (dy - w / sum w * sum dy). */
INLINE void TYPED(map_rows)(TYPED(family) f, const int logarithm, const pl_rows *in,
                            const pl_rows *dy, const pl_rows *y, const pl_rows *dx,
                            const row_job *job, int64_t begin, int64_t end, int worker) {
    int64_t n = PL_DIM(job->call, 'V');
    REAL from_x[ROW_BLOCK], from_dy[ROW_BLOCK], buffer[ROW_BLOCK];
    TYPED(reading) how = {.rows = in, .scale = 1};
    TYPED(row_statistics) row = TYPED(statistics_in)(TYPED(scratch)(job, worker, 0), n);
    for (int64_t i = begin; i < end; i++) {
        TYPED(take_statistics)(f, how, i, n, &row, NULL, 0, 1);
        V log_sum = VEC(set1)((REAL)(log(row.total) + (double)row.shift));
        double dot = 0;
        /* First y and the sum, then dx. */
        for (int pass = 0; pass < (dx->data ? 2 : 1); pass++) {
            const pl_rows *out = pass ? dx : y;
            V less = VEC(set1)((REAL)dot);
            for (int64_t at = 0; at < n; at += ROW_BLOCK) {
                int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
                const REAL *x = TYPED(fetch)(in, i, at, m, from_x),
                           *g = dy->data ? TYPED(fetch)(dy, i, at, m, from_dy) : NULL;
                REAL *to = out->data ? TYPED(target)(out, i, at, buffer) : buffer;
                V sum = {0}, factor = TYPED(block_factor)(&row, at, 1, 1);
                for (int64_t j = 0; j < m; j += WIDTH) {
                    int64_t left = m - j;
                    V v = TYPED(load)(x + j, left, 0),
                      d = g ? TYPED(load)(g + j, left, 0) : VEC(set1)(0);
                    V prob = TYPED(load)(row.kept + at + j, left, 0) * factor;
                    V result = logarithm ? f.log_weight(v) - log_sum : prob;
                    if (pass) result = logarithm ? d - prob * less : prob * (d - less);
                    if (pass && f.slope) result *= f.slope(v);
                    sum += logarithm ? d : d * prob;
                    TYPED(store)(to + j, result, left);
                }
                if (!pass) dot += (double)VEC(sum)(sum);
                if (out->data) TYPED(put)(out, i, at, m, to, 1);
            }
        }
    }
}

/* The position of the first largest element of row i, or of its first NaN. */
static int64_t TYPED(row_argmax)(const pl_rows *rows, int64_t i, int64_t n, REAL *buffer) {
    int64_t best = 0;
    REAL highest = (REAL)-INFINITY;
    for (int64_t at = 0; at < n; at += ROW_BLOCK) {
        int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
        const REAL *x = TYPED(fetch)(rows, i, at, m, buffer);
        V sum = {0};
        for (int64_t j = 0; j < m; j += WIDTH) {
            V v = TYPED(load)(x + j, m - j, 0);
            sum += v - v; /* NaN where an element is NaN or infinite */
        }
        REAL block = TYPED(block_max)(x, m), odd = VEC(sum)(sum);
        if (odd != odd)
            for (int64_t j = 0; j < m; j++)
                if (x[j] != x[j]) return at + j;
        if (!(block > highest)) continue;
        highest = block;
        for (best = at; x[best - at] != block;) best++;
    }
    return best;
}
