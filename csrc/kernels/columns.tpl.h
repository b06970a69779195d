/* Some columns of a matrix: which matter, and those alone. */
#include "common.tpl.h"

enum { COLUMN_BLOCK = 1024 };

/* above[j] = 1 where some |x[i,j]| is above bound[i], or either is NaN   x [N,V], bound [N] */
static void columns_above_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const pl_call *c = context;
    const columns_above_args args = columns_above_args_of(c);
    const float *bound = args.bound;
    uint8_t *above = args.above;
    int64_t n = PL_DIM(c, 'N'), v = PL_DIM(c, 'V');
    for (int64_t block = begin; block < end; block++) {
        const float *x = args.x + block * COLUMN_BLOCK;
        int64_t width =
            v - block * COLUMN_BLOCK < COLUMN_BLOCK ? v - block * COLUMN_BLOCK : COLUMN_BLOCK;
        vi below[COLUMN_BLOCK / LANES];
        memset(below, 0xff, sizeof below);
        for (int64_t i = 0; i < n; i++, x += v) {
            vf b = vf_set1(bound[i]);
            int64_t j = 0;
            for (; j + LANES <= width; j += LANES) below[j / LANES] &= vf_abs(vf_load(x + j)) <= b;
            if (j < width) below[j / LANES] &= vf_abs(vf_load_part(x + j, width - j, 0)) <= b;
        }
        for (int64_t j = 0; j < width; j++)
            above[block * COLUMN_BLOCK + j] = !below[j / LANES][j % LANES];
    }
}
pl_status KERNEL(columns_above)(const pl_call *c) {
    pl_parallel((PL_DIM(c, 'V') + COLUMN_BLOCK - 1) / COLUMN_BLOCK, 1, columns_above_piece, c);
    return PL_OK;
}

/* y[:,m] = x[:,columns[m]]   x [N,V], columns [M], y [N,M] */
static void gather_columns_piece(const void *context, int64_t begin, int64_t end,
                                 int worker UNUSED) {
    const pl_call *c = context;
    const gather_columns_args args = gather_columns_args_of(c);
    const int32_t *columns = args.columns;
    int64_t v = PL_DIM(c, 'V'), m = PL_DIM(c, 'M');
    for (int64_t i = begin; i < end; i++) {
        const float *x = args.x + i * v;
        float *y = args.y + i * m;
        for (int64_t j = 0; j < m; j++) y[j] = x[columns[j]];
    }
}
pl_status KERNEL(gather_columns)(const pl_call *c) {
    pl_parallel(PL_DIM(c, 'N'), grain_of(PL_DIM(c, 'M')), gather_columns_piece, c);
    return PL_OK;
}
