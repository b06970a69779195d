/* Row maps, from a row of logits to probabilities or their logarithms; and the largest element. */
#ifndef ROWLOSS_MAP
#define ROWLOSS_MAP
#include "job.h"
#include "rows.tpl.h"
#include "statistics.tpl.h"
#include "weights.tpl.h"

/* y = w / sum w, dx = slope y (dy - sum y dy); or with `logarithm`
 * y = log(w / sum w), dx = slope (dy - w / sum w * sum dy). */
INLINE void map_rows(weight_family f, const int logarithm, const pl_rows *in, const pl_rows *dy,
                     const pl_rows *y, const pl_rows *dx, const row_job *job, int64_t begin,
                     int64_t end, int worker) {
    int64_t n = PL_DIM(job->call, 'V');
    REAL from_x[ROW_BLOCK], from_dy[ROW_BLOCK], buffer[ROW_BLOCK];
    row_reading reading = {.rows = in, .scale = 1};
    row_statistics row = statistics_in(scratch_part(job, worker, 0), n);
    for (int64_t i = begin; i < end; i++) {
        take_statistics(f, reading, i, n, &row, NULL, 0, 1);
        /* Two subtractions: the sum of these would be rounded to the digits of a large shift. */
        V shift = v_set(row.shift), log_total = v_set((REAL)log(row.total));
        double dot = 0;
        /* The first pass writes y and takes the sum, the second writes dx. */
        for (int pass = 0; pass < (dx->data ? 2 : 1); pass++) {
            const pl_rows *out = pass ? dx : y;
            V subtracted = v_set((REAL)dot);
            for (int64_t at = 0; at < n; at += ROW_BLOCK) {
                int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
                const REAL *x = fetch(in, i, at, m, from_x),
                           *g = dy->data ? fetch(dy, i, at, m, from_dy) : NULL;
                REAL *to = out->data ? target(out, i, at, buffer) : buffer;
                V sum = {0}, factor = block_factor(&row, at, 1, 1);
                for (int64_t j = 0; j < m; j += WIDTH) {
                    int64_t rest = m - j;
                    V v = load_lanes(x + j, rest, 0), d = g ? load_lanes(g + j, rest, 0) : v_set(0);
                    V prob = load_lanes(row.kept + at + j, rest, 0) * factor;
                    V result = logarithm ? (f.log_weight(v) - shift) - log_total : prob;
                    if (pass) result = logarithm ? d - prob * subtracted : prob * (d - subtracted);
                    if (pass && f.slope) result *= f.slope(v);
                    sum += logarithm ? d : d * prob;
                    store_lanes(to + j, result, rest);
                }
                if (!pass) dot += (double)v_sum(sum);
                if (out->data) put(out, i, at, m, to, 1);
            }
        }
    }
}

/* The position of the first largest element of row i, or of its first NaN. */
static int64_t row_argmax(const pl_rows *rows, int64_t i, int64_t n, REAL *buffer) {
    int64_t best = 0;
    REAL highest = (REAL)-INFINITY;
    for (int64_t at = 0; at < n; at += ROW_BLOCK) {
        int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
        const REAL *x = fetch(rows, i, at, m, buffer);
        V sum = {0};
        for (int64_t j = 0; j < m; j += WIDTH) {
            V v = load_lanes(x + j, m - j, 0);
            sum += v - v; /* NaN where an element is NaN or infinite */
        }
        REAL block = block_max(x, m), odd = v_sum(sum);
        if (odd != odd)
            for (int64_t j = 0; j < m; j++)
                if (x[j] != x[j]) return at + j;
        if (!(block > highest)) continue;
        highest = block;
        for (best = at; x[best - at] != block;) best++;
    }
    return best;
}

#endif
