/* Cosine distance of two rows of logits. Classes that either row masks are left out. */
#ifndef ROWLOSS_COSINE
#define ROWLOSS_COSINE
#include "job.h"
#include "rows.tpl.h"
#include "statistics.tpl.h"

/* A vector of both rows, with 0 where either is masked. */
INLINE void cosine_vectors(const REAL *q, const REAL *p, int64_t n, V *x, V *y) {
    V masked = v_set((REAL)-INFINITY), zero = {0}, a = load_lanes(q, n, 0), b = load_lanes(p, n, 0);
    *x = v_select(v_equal(a, masked), zero, v_select(v_equal(b, masked), zero, a));
    *y = v_select(v_equal(a, masked), zero, v_select(v_equal(b, masked), zero, b));
}

/* The sums of x y, x x and y y over row i. */
INLINE void cosine_sums(row_reading in_q, row_reading in_p, int64_t i, int64_t n, double *sums) {
    REAL from_q[ROW_BLOCK], from_p[ROW_BLOCK];
    sums[0] = sums[1] = sums[2] = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        const REAL *q = read_block(in_q, i, begin, m, from_q),
                   *p = read_block(in_p, i, begin, m, from_p);
        /* Short sums of vectors keep the digits of a float. */
        for (int64_t at = 0; at < m; at += 32 * WIDTH) {
            int64_t end = m - at < 32 * WIDTH ? m : at + 32 * WIDTH;
            V xy = {0}, xx = {0}, yy = {0}, x, y;
            for (int64_t j = at; j < end; j += WIDTH) {
                cosine_vectors(q + j, p + j, end - j, &x, &y);
                xy += x * y, xx += x * x, yy += y * y;
            }
            sums[0] += (double)v_sum(xy);
            sums[1] += (double)v_sum(xx);
            sums[2] += (double)v_sum(yy);
        }
    }
}

/* The gradient of a row's block: own * x + other * y, times the slope of the cap. */
INLINE void cosine_gradient(const REAL *x, const REAL *y, int64_t n, double own, double other,
                            REAL softcap, int swapped, REAL *to) {
    V by_own = v_set((REAL)own), by_other = v_set((REAL)other), a, b;
    for (int64_t j = 0; j < n; j += WIDTH) {
        cosine_vectors(x + j, y + j, n - j, &a, &b);
        V d = swapped ? b * by_own + a * by_other : a * by_own + b * by_other;
        if (softcap > 0)
            d *= cap_slope(load_lanes((swapped ? y : x) + j, n - j, 0), v_set(softcap));
        store_lanes(to + j, d, n - j);
    }
}

/* Rows [begin, end): 1 - x y / (|x| |y|); 1, with gradient 0, where a row is 0. */
static void cosine_rows(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const row_job *job = context;
    const cosine_args args = cosine_args_of(job->call);
    int64_t n = PL_DIM(job->call, 'V');
    const REAL *dloss = args.dloss;
    REAL *loss = args.loss, from_q[ROW_BLOCK], from_p[ROW_BLOCK], to_q[ROW_BLOCK], to_p[ROW_BLOCK];
    /* A scale without a cap changes no angle. */
    row_reading in_q = {.rows = args.q,
                        .prepare = args.softcap_q > 0,
                        .factor = (REAL)args.scale_q,
                        .softcap = (REAL)args.softcap_q};
    row_reading in_p = {.rows = args.p,
                        .prepare = args.softcap_p > 0,
                        .factor = (REAL)args.scale_p,
                        .softcap = (REAL)args.softcap_p};
    for (int64_t i = begin; i < end; i++) {
        int counted = !args.labels || args.labels[i] >= 0;
        double sums[3], given = dloss ? (double)dloss[i] : 1;
        if (counted) cosine_sums(in_q, in_p, i, n, sums);
        int zero = !counted || sums[1] == 0 || sums[2] == 0;
        double norms = zero ? 1 : sqrt(sums[1]) * sqrt(sums[2]),
               cosine = zero ? 0 : sums[0] / norms;
        double distance = 1 - cosine;
        loss[i] = (REAL)(!counted ? 0 : distance < 0 ? 0 : distance);
        if (zero || given == 0) {
            if (args.dq->data) put_zeros(args.dq, i, n);
            if (args.dp->data) put_zeros(args.dp, i, n);
            continue;
        }
        double by_q = given * (in_q.prepare ? args.scale_q : 1),
               by_p = given * (in_p.prepare ? args.scale_p : 1);
        for (int64_t at = 0; (args.dq->data || args.dp->data) && at < n; at += ROW_BLOCK) {
            int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
            const REAL *q = read_block(in_q, i, at, m, from_q),
                       *p = read_block(in_p, i, at, m, from_p);
            cosine_gradient(q, p, m, by_q * cosine / sums[1], -by_q / norms, in_q.softcap, 0, to_q);
            cosine_gradient(q, p, m, by_p * cosine / sums[2], -by_p / norms, in_p.softcap, 1, to_p);
            for (int side = 0; side < 2; side++) {
                const pl_rows *out = side ? args.dp : args.dq;
                if (!out->data) continue;
                const REAL *from = side ? to_p : to_q;
                REAL *to = target(out, i, at, NULL);
                if (to) memcpy(to, from, (size_t)m * sizeof *to);
                else put(out, i, at, m, from, 1);
            }
        }
    }
}

#endif
