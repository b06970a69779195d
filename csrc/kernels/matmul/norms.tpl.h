/* Row norms of stored matrices, plain and with an adapter, whose product is never formed. */
#ifndef PYLOSS_NORMS_TPL_H
#define PYLOSS_NORMS_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../quant.tpl.h"
#include "gemm.tpl.h"

/* The norms of stored rows: the matrix, and the one result that is wanted. */
typedef struct {
    const pl_weight *w;
    double *squares;
    float *norms;
    float *row; /* per worker [I] */
} squared_rows_job;

typedef struct {
    const pl_call *call;
    float *row;      /* per worker [I] */
    const float *wa; /* [R,O]: W a */
    const float *gb; /* [R,O]: (a^T a) b */
} norm_job;

/* squares[o] = sum of w[o,:]^2, or norms[o] = its root in float32   w [O,I] in any format */
static void squared_rows(const void *context, int64_t begin, int64_t end, int worker) {
    enum { SUMS = 8 };
    const squared_rows_job *job = context;
    const pl_weight *w = job->w;
    float *row = job->row + worker * w->cols;
    for (int64_t o = begin; o < end; o++) {
        double sum[SUMS] = {0};
        decode_row(w, o, row);
        int64_t i = 0;
        for (; i + SUMS <= w->cols; i += SUMS)
            for (int k = 0; k < SUMS; k++) sum[k] += (double)row[i + k] * row[i + k];
        for (; i < w->cols; i++) sum[0] += (double)row[i] * row[i];
        for (int k = 1; k < SUMS; k++) sum[0] += sum[k];
        if (job->squares) job->squares[o] = sum[0];
        else job->norms[o] = (float)sqrt(sum[0]);
    }
}
static pl_status run_squared_rows(squared_rows_job job) {
    job.row = pl_acquire(4 * (size_t)pl_num_threads() * (size_t)job.w->cols);
    if (!job.row) return PL_NO_MEMORY;
    pl_parallel(job.w->rows, grain_of(job.w->cols), squared_rows, &job);
    pl_release(job.row);
    return PL_OK;
}
pl_status KERNEL(row_squares)(const pl_call *c) {
    const row_squares_args args = row_squares_args_of(c);
    return run_squared_rows((squared_rows_job){.w = args.w, .squares = args.squares});
}
pl_status KERNEL(row_norms)(const pl_call *c) {
    const row_norms_args args = row_norms_args_of(c);
    return run_squared_rows((squared_rows_job){.w = args.w, .norms = args.norms});
}

/* |w[o,:] + scale (a b)[:,o]|^2, element by element. */
static double summed_square(const pl_call *c, int64_t o, float *row) {
    const adapted_norm_args args = adapted_norm_args_of(c);
    const float *a = args.a, *b = args.b;
    int64_t rank = PL_DIM(c, 'R'), columns = PL_DIM(c, 'O');
    double sum = 0;
    decode_row(args.w, o, row);
    for (int64_t i = 0; i < PL_DIM(c, 'I'); i++) {
        double product = 0;
        for (int64_t r = 0; r < rank; r++) product += (double)a[i * rank + r] * b[r * columns + o];
        double element = row[i] + args.scale * product;
        sum += element * element;
    }
    return sum;
}

static void adapted_norm_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const norm_job *job = context;
    const pl_call *c = job->call;
    const adapted_norm_args args = adapted_norm_args_of(c);
    const float *b = args.b;
    const double scale = args.scale, *squares = args.squares;
    int64_t rank = PL_DIM(c, 'R'), columns = PL_DIM(c, 'O');
    for (int64_t o = begin; o < end; o++) {
        double total = squares[o], size = squares[o];
        for (int64_t r = 0; r < rank; r++) {
            int64_t i = r * columns + o;
            double cross = 2 * scale * b[i] * job->wa[i], own = scale * scale * b[i] * job->gb[i];
            total += cross + own;
            size += fabs(cross) + fabs(own);
        }
        /* wa and gb are rounded. Where the adapter cancels most of a row, the rest would be
         * rounding. */
        if (!(8 * total >= size)) total = summed_square(c, o, job->row + worker * PL_DIM(c, 'I'));
        args.norm[o] = (float)sqrt(total);
    }
}

/* norm[o] = |w[o,:] + scale (a b)[:,o]|, from |w|^2 + 2 scale b . W a + scale^2 b . (a^T a) b
 * w [O,I] in any format, a [I,R], b [R,O], squares [O] as row_squares gives them */
pl_status KERNEL(adapted_norm)(const pl_call *c) {
    const adapted_norm_args args = adapted_norm_args_of(c);
    int64_t rank = PL_DIM(c, 'R'), o = PL_DIM(c, 'O'), depth = PL_DIM(c, 'I');
    const float *a = args.a;
    float *scratch = pl_acquire(
        4 * (size_t)(2 * rank * o + rank * depth + rank * rank + pl_num_threads() * depth));
    if (!scratch) return PL_NO_MEMORY;
    float *wa = scratch, *gb = wa + rank * o, *columns = gb + rank * o, *g = columns + rank * depth,
          *row = g + rank * rank;
    for (int64_t i = 0; i < depth; i++)
        for (int64_t r = 0; r < rank; r++) columns[r * depth + i] = a[i * rank + r];
    gemm product = {.m = rank,
                    .n = o,
                    .k = depth,
                    .a = {columns, depth, 0, 1, 0},
                    .b = *args.w,
                    .b_transposed = 1,
                    .c = wa};
    gemm inner = {.m = rank,
                  .n = rank,
                  .k = depth,
                  .a = {a, rank, 1, 1, 0},
                  .b = float_matrix(a, depth, rank),
                  .c = g};
    gemm outer = {.m = rank,
                  .n = o,
                  .k = rank,
                  .a = {g, rank, 0, 1, 0},
                  .b = float_matrix(args.b, rank, o),
                  .c = gb};
    pl_status status = gemm_run(&product);
    if (status == PL_OK) status = gemm_run(&inner);
    if (status == PL_OK) status = gemm_run(&outer);
    if (status == PL_OK)
        pl_parallel(o, grain_of(4 * rank), adapted_norm_piece, &(norm_job){c, row, wa, gb});
    pl_release(scratch);
    return status;
}

#endif
