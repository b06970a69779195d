/* Element losses: one value per element of logits x and targets t. */
#ifndef ROWLOSS_ELEMENT
#define ROWLOSS_ELEMENT
#include "job.h"
#include "rows.tpl.h"
#include "weights.tpl.h"

typedef void (*element_formula)(loss_element *e, const double *option);

INLINE void element_rows(element_formula formula, const element_args *args, const row_job *job,
                         int64_t begin, int64_t end) {
    int64_t n = PL_DIM(job->call, 'V');
    REAL from_x[ROW_BLOCK], from_t[ROW_BLOCK], to_x[ROW_BLOCK], to_t[ROW_BLOCK];
    for (int64_t i = begin; i < end; i++)
        for (int64_t at = 0; at < n; at += ROW_BLOCK) {
            int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
            const REAL *x = fetch(args->x, i, at, m, from_x), *t = fetch(args->t, i, at, m, from_t);
            const REAL *dloss = args->dloss ? (const REAL *)args->dloss + i * n + at : NULL;
            REAL *loss = (REAL *)args->loss + i * n + at;
            for (int64_t j = 0; j < m; j += WIDTH) {
                loss_element e = {.x = load_lanes(x + j, m - j, 0),
                                  .t = load_lanes(t + j, m - j, 0)};
                formula(&e, args->option);
                V given = dloss ? load_lanes(dloss + j, m - j, 0) : v_set(1), zero = {0};
                store_lanes(loss + j, e.loss, m - j);
                store_lanes(to_x + j, v_select(v_equal(given, zero), zero, e.by_x * given), m - j);
                store_lanes(to_t + j, v_select(v_equal(given, zero), zero, e.by_t * given), m - j);
            }
            for (int k = 0; k < 2; k++) {
                const pl_rows *out = k ? args->dt : args->dx;
                if (!out->data) continue;
                const REAL *from = k ? to_t : to_x;
                REAL *to = target(out, i, at, NULL);
                if (to) memcpy(to, from, (size_t)m * sizeof *to);
                else put(out, i, at, m, from, 1);
            }
        }
}

#endif
