/* Columns of a matrix: sums over the rows, and selections of columns. N counts rows, D or V
 * columns.
 *
 * A sum over the rows first sums each block of BLOCK_ROWS rows into a partial row, then adds the
 * partial rows in order, so that its bits do not depend on the number of threads. */
#ifndef PYLOSS_COLUMNS_TPL_H
#define PYLOSS_COLUMNS_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/act.h"
#include "../simd/vec.h"

/* Rows that add into one partial row. */
enum { BLOCK_ROWS = 32 };

typedef struct {
    const pl_call *call;
    float *partial; /* [blocks, D], or NULL when no sum is wanted */
    float *out;
    int64_t blocks, block_rows, width;
    float *buffers; /* of the workers, if fn needs them */
} column_job;

/* Adds the partial rows; they are few enough for float64. */
static void join_partials_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const column_job *job = context;
    for (int64_t j = begin; j < end; j++) {
        double sum = 0;
        for (int64_t i = 0; i < job->blocks; i++) sum += (double)job->partial[i * job->width + j];
        job->out[j] = (float)sum;
    }
}

/* Calls fn for the blocks of rows of `call`. fn writes each block's sum to its partial row, and
 * `out` [D] becomes the sum of the partial rows. If `out` is NULL, there are no partial rows. */
static pl_status sum_columns(const pl_call *call, int64_t rows, float *out, pl_range_fn fn,
                             float *buffers) {
    int64_t width = PL_DIM(call, 'D');
    int64_t block = out ? BLOCK_ROWS : grain_for(rows, width);
    column_job job = {call, NULL, out, (rows + block - 1) / block, block, width, buffers};
    if (out) {
        job.partial = pl_acquire((size_t)job.blocks * (size_t)width * sizeof *out);
        if (!job.partial) return PL_NO_MEMORY;
    }
    pl_parallel(job.blocks, out ? grain_of(block * width) : 1, fn, &job);
    if (out) pl_parallel(width, grain_of(job.blocks), join_partials_piece, &job);
    pl_release(job.partial);
    return PL_OK;
}

/* y[j] = sum over n of x[n,j]   x [N,D], y [D] */
static void column_sum_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const column_job *job = context;
    int64_t n = PL_DIM(job->call, 'N'), d = job->width;
    const float *x = column_sum_args_of(job->call).x;
    for (int64_t b = begin; b < end; b++) {
        float *partial = job->partial + b * d;
        int64_t last = at_most((b + 1) * BLOCK_ROWS, n);
        memset(partial, 0, (size_t)d * sizeof *partial);
        for (int64_t i = b * BLOCK_ROWS; i < last; i++)
            for (int64_t j = 0; j < d; j++) partial[j] += x[i * d + j];
    }
}
pl_status KERNEL(column_sum)(const pl_call *c) {
    const column_sum_args args = column_sum_args_of(c);
    return sum_columns(c, PL_DIM(c, 'N'), args.y, column_sum_piece, NULL);
}

/* partial[j] += sum of dy[n,j] (y[n,j] - offset[j]) over `rows` rows, the first at element `at`. */
INLINE void column_dot_rows(pl_act dy, pl_act y, const float *offset, int64_t at, int64_t d,
                            float *partial, const int rows) {
    for (int64_t j = 0; j < d; j += LANES) {
        const int64_t some = at_most(d - j, LANES);
        const vf minus = offset ? vf_load_part(offset + j, some, 0) : vf_set1(0);
        vf sum = vf_load_part(partial + j, some, 0);
        for (int r = 0; r < rows; r++)
            sum = vf_fma(act_load(dy, at + r * d + j, some),
                         act_load(y, at + r * d + j, some) - minus, sum);
        vf_store_part(partial + j, sum, some);
    }
}
INLINE void column_dot_block(pl_act dy, pl_act y, const float *offset, int64_t first, int64_t last,
                             int64_t d, float *partial) {
    memset(partial, 0, (size_t)d * sizeof *partial);
    for (; first + 4 <= last; first += 4) column_dot_rows(dy, y, offset, first * d, d, partial, 4);
    for (; first < last; first++) column_dot_rows(dy, y, offset, first * d, d, partial, 1);
}

/* out[j] = sum over n of dy[n,j] (y[n,j] - offset[j])   dy, y [N,D], offset [D] or NULL, out [D] */
static void column_dot_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const column_job *job = context;
    const column_dot_args args = column_dot_args_of(job->call);
    const int64_t n = PL_DIM(job->call, 'N'), d = job->width;
    for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * BLOCK_ROWS, last = at_most(first + BLOCK_ROWS, n);
        float *partial = job->partial + b * d;
        if (args.dy.narrow || args.y.narrow)
            column_dot_block(args.dy, args.y, args.offset, first, last, d, partial);
        else
            column_dot_block((pl_act){args.dy.data, 0}, (pl_act){args.y.data, 0}, args.offset,
                             first, last, d, partial);
    }
}
pl_status KERNEL(column_dot)(const pl_call *c) {
    const column_dot_args args = column_dot_args_of(c);
    return sum_columns(c, PL_DIM(c, 'N'), args.out, column_dot_piece, NULL);
}

enum { COLUMN_BLOCK = 1024 };

/* above[j] = 1 if any |x[i,j]| > bound[i] or either is NaN, else 0   x [N,V], bound [N] */
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
    int64_t v = PL_DIM(c, 'V'), m = PL_DIM(c, 'M'), run = 1;
    while (run < m && columns[run] == columns[0] + run) run++;
    for (int64_t i = begin; i < end; i++) {
        const float *x = args.x + i * v;
        float *y = args.y + i * m;
        if (run == m) memcpy(y, x + columns[0], (size_t)m * sizeof *y);
        else
            for (int64_t j = 0; j < m; j++) y[j] = x[columns[j]];
    }
}
pl_status KERNEL(gather_columns)(const pl_call *c) {
    if (PL_DIM(c, 'M')) in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'M'), gather_columns_piece, c);
    return PL_OK;
}

/* y = the columns of a, b and c side by side   a [N,A], b [N,B], c [N,C] or NULL, y [N,A+B+C] */
static void concat_columns_piece(const void *context, int64_t begin, int64_t end,
                                 int worker UNUSED) {
    const pl_call *call = context;
    const concat_columns_args args = concat_columns_args_of(call);
    const float *const parts[] = {args.a, args.b, args.c};
    const int64_t widths[] = {PL_DIM(call, 'A'), PL_DIM(call, 'B'), PL_DIM(call, 'C')};
    float *y = args.y + begin * (widths[0] + widths[1] + widths[2]);
    for (int64_t i = begin; i < end; i++)
        for (int p = 0; p < 3; p++) {
            if (!widths[p]) continue;
            memcpy(y, parts[p] + i * widths[p], (size_t)widths[p] * sizeof *y);
            y += widths[p];
        }
}
pl_status KERNEL(concat_columns)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'A') + PL_DIM(c, 'B') + PL_DIM(c, 'C'),
              concat_columns_piece, c);
    return PL_OK;
}

#endif
