/* Element losses of the computed type; included by rowloss_real.tpl.h. Arguments: x, t, options..., dloss, loss, dx, dt. */

typedef void (*TYPED(element_formula))(TYPED(element) *e, const double *option);

INLINE void TYPED(element_rows)(TYPED(element_formula) formula, const element_args *args,
                                const row_job *job, int64_t begin, int64_t end) {
    int64_t n = PL_DIM(job->call, 'V');
    REAL from_x[ROW_BLOCK], from_t[ROW_BLOCK], to_x[ROW_BLOCK], to_t[ROW_BLOCK];
    for (int64_t i = begin; i < end; i++)
        for (int64_t at = 0; at < n; at += ROW_BLOCK) {
            int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
            const REAL *x = TYPED(fetch)(args->x, i, at, m, from_x),
                       *t = TYPED(fetch)(args->t, i, at, m, from_t);
            const REAL *dloss = args->dloss ? (const REAL *)args->dloss + i * n + at : NULL;
            REAL *loss = (REAL *)args->loss + i * n + at;
            for (int64_t j = 0; j < m; j += WIDTH) {
                TYPED(element) e = {.x = TYPED(load)(x + j, m - j, 0),
                                    .t = TYPED(load)(t + j, m - j, 0)};
                formula(&e, args->option);
                V given = dloss ? TYPED(load)(dloss + j, m - j, 0) : VEC(set1)(1), zero = {0};
                TYPED(store)(loss + j, e.loss, m - j);
                TYPED(store)(to_x + j, VEC(select)(VEC(equal)(given, zero), zero, e.by_x * given),
                             m - j);
                TYPED(store)(to_t + j, VEC(select)(VEC(equal)(given, zero), zero, e.by_t * given),
                             m - j);
            }
            for (int k = 0; k < 2; k++) {
                const pl_rows *out = k ? args->dt : args->dx;
                if (!out->data) continue;
                const REAL *from = k ? to_t : to_x;
                REAL *to = TYPED(target)(out, i, at, NULL);
                if (to) memcpy(to, from, (size_t)m * sizeof *to);
                else TYPED(put)(out, i, at, m, from, 1);
            }
        }
}
