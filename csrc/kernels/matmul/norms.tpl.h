/* Row norms of stored matrices, plain and with an adapter, whose product is never formed, and the
 * gradient by the lengths m that DoRA gives the adapted rows. */
#ifndef PYLOSS_NORMS_TPL_H
#define PYLOSS_NORMS_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../quant.tpl.h"
#include "../simd/act.h"
#include "../simd/dot_f32.h"
#include "gemm.tpl.h"
#include "linear.tpl.h"

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
    float *columns;  /* [R,I]: a^T */
    float *g;        /* [R,R]: a^T a */
    const float *wa; /* [R,O]: W a */
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

static void norm_columns_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const norm_job *job = context;
    const float *a = adapted_norm_args_of(job->call).a;
    const int64_t rank = PL_DIM(job->call, 'R'), depth = PL_DIM(job->call, 'I');
    for (int64_t i = begin; i < end; i++)
        for (int64_t r = 0; r < rank; r++) job->columns[r * depth + i] = a[i * rank + r];
}
static void norm_gram_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const norm_job *job = context;
    const int64_t rank = PL_DIM(job->call, 'R'), depth = PL_DIM(job->call, 'I');
    for (int64_t i = begin; i < end; i++)
        for (int64_t r = 0; r <= i; r++)
            job->g[i * rank + r] = job->g[r * rank + i] =
                dot(job->columns + i * depth, job->columns + r * depth, NULL, depth);
}

/* Of LANES rows at a time. */
static void adapted_norm_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const norm_job *job = context;
    const pl_call *c = job->call;
    const adapted_norm_args args = adapted_norm_args_of(c);
    const double scale = args.scale;
    const int64_t rank = PL_DIM(c, 'R'), columns = PL_DIM(c, 'O');
    for (int64_t first = begin * LANES; first < at_most(end * LANES, columns); first += LANES) {
        const int64_t some = at_most(columns - first, LANES);
        double total[LANES] = {0}, size[LANES] = {0};
        for (int64_t l = 0; l < some; l++) total[l] = size[l] = args.squares[first + l];
        for (int64_t r = 0; r < rank; r++) {
            float b[LANES], wa[LANES], gb[LANES];
            vf sum = vf_set1(0);
            for (int64_t s = 0; s < rank; s++)
                sum = vf_fma(vf_set1(job->g[r * rank + s]),
                             vf_load_part(args.b + s * columns + first, some, 0), sum);
            vf_store(gb, sum);
            vf_store(b, vf_load_part(args.b + r * columns + first, some, 0));
            vf_store(wa, vf_load_part(job->wa + r * columns + first, some, 0));
            for (int l = 0; l < LANES; l++) {
                const double cross = 2 * scale * b[l] * wa[l], own = scale * scale * b[l] * gb[l];
                total[l] += cross + own;
                size[l] += fabs(cross) + fabs(own);
            }
        }
        /* wa and gb are rounded. Where the adapter cancels most of a row, the rest would be
         * rounding. */
        for (int64_t l = 0; l < some; l++) {
            if (!(8 * total[l] >= size[l]))
                total[l] = summed_square(c, first + l, job->row + worker * PL_DIM(c, 'I'));
            args.norm[first + l] = (float)sqrt(total[l]);
        }
    }
}

/* norm[o] = |w[o,:] + scale (a b)[:,o]|, from |w|^2 + 2 scale b . W a + scale^2 b . (a^T a) b
 * With products in half precision a is rounded to bytes in W a, where W has codes for that: some
 * 0.5 % of the middle term, which is small beside the first.
 * w [O,I] in any format, a [I,R], b [R,O], squares [O] as row_squares gives them */
pl_status KERNEL(adapted_norm)(const pl_call *c) {
    const adapted_norm_args args = adapted_norm_args_of(c);
    const int64_t rank = PL_DIM(c, 'R'), o = PL_DIM(c, 'O'), depth = PL_DIM(c, 'I');
    float *scratch = pl_acquire(sizeof *scratch *
                                (size_t)(rank * (o + depth + rank) + pl_num_threads() * depth));
    if (!scratch) return PL_NO_MEMORY;
    float *wa = scratch, *columns = wa + rank * o, *g = columns + rank * depth,
          *row = g + rank * rank;
    const norm_job job = {c, row, columns, g, wa};
    pl_parallel(depth, grain_of(2 * rank), norm_columns_piece, &job);
    const gemm product = {.m = rank,
                          .n = o,
                          .k = depth,
                          .a = {columns, depth, 0, 1, 0},
                          .b = *args.w,
                          .b_transposed = 1,
                          .form = pl_matmul_precision() == PL_FLOAT32 ? FLOATS
                                                                      : codes_form(args.w->format),
                          .c = wa};
    const pl_status status = gemm_run(&product);
    if (status == PL_OK) {
        pl_parallel(rank, grain_of(rank * depth / 2), norm_gram_piece, &job);
        pl_parallel((o + LANES - 1) / LANES, grain_of(LANES * rank), adapted_norm_piece, &job);
    }
    pl_release(scratch);
    return status;
}

/* A factor m / norm below this leaves too few digits of x W^T in y to divide it out. */
#define SMALL_FACTOR 0x1p-10f

typedef struct {
    const pl_call *call;
    float *row; /* per worker [2, I] */
} magnitude_job;

/* sum over n of dy[n,o] (w[o,:] + scale (a b)[:,o]) x[n,:] */
static double magnitude_sum(const magnitude_grad_args *args, const pl_call *c, int64_t o,
                            float *row) {
    const int64_t columns = PL_DIM(c, 'O'), depth = PL_DIM(c, 'I'), rank = PL_DIM(c, 'R');
    float *expanded = row + depth;
    double total = 0;
    decode_row(args->w, o, row);
    for (int64_t n = 0; n < PL_DIM(c, 'N'); n++) {
        const float *x = act_floats(act_at(args->x, n * depth), depth, expanded);
        double product = 0, low = 0;
        for (int64_t i = 0; i < depth; i++) product += (double)row[i] * x[i];
        for (int64_t r = 0; r < rank; r++)
            low += (double)args->xa[n * rank + r] * args->b[r * columns + o];
        total += act_load(args->dy, n * columns + o, 1)[0] * (product + args->scale * low);
    }
    return total;
}
static void magnitude_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const magnitude_job *job = context;
    const magnitude_grad_args args = magnitude_grad_args_of(job->call);
    float *row = job->row + 2 * worker * PL_DIM(job->call, 'I');
    for (int64_t o = begin; o < end; o++) {
        const float m = args.m[o], norm = args.norm[o];
        if (norm != 0 && fabsf(m / norm) < SMALL_FACTOR)
            args.dm[o] = (float)(magnitude_sum(&args, job->call, o, row) / norm);
        else args.dm[o] = m == 0 ? 0 : args.dots[o] / m;
    }
}

/* dm[o] = sum over n of dy[n,o] (w[o,:] + scale (a b)[:,o]) x[n,:] / norm[o], 0 where that is 0
 * Where m is not tiny, the sum is dots[o] norm / m: dots has the columns' sums of dy (y - bias).
 * dots, m, norm [O], dy [N,O], x [N,I], w [O,I] in any format, xa [N,R], b [R,O], dm [O] */
pl_status KERNEL(magnitude_grad)(const pl_call *c) {
    const int64_t depth = PL_DIM(c, 'I');
    float *row = pl_acquire(sizeof *row * 2 * (size_t)pl_num_threads() * (size_t)depth);
    if (!row) return PL_NO_MEMORY;
    pl_parallel(PL_DIM(c, 'O'), grain_of(64), magnitude_piece, &(magnitude_job){c, row});
    pl_release(row);
    return PL_OK;
}

#endif
