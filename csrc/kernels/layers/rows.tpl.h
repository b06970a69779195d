/* Whole rows of a matrix: embedding, gather, put, scatter-add, combine, scale, transpose. N counts
 * rows, D is the width of a row. */
#ifndef PYLOSS_ROWS_TPL_H
#define PYLOSS_ROWS_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../quant.tpl.h"
#include "../simd/dot_f32.h"
#include "../simd/vec.h"

/* y[n,:] = w[ids[n],:]   ids [N], w [V,D] in any format, y [N,D] */
static void embedding_forward_piece(const void *context, int64_t begin, int64_t end,
                                    int worker UNUSED) {
    const pl_call *c = context;
    const embedding_forward_args args = embedding_forward_args_of(c);
    const int32_t *ids = args.ids;
    float *y = args.y;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++) decode_row(args.w, ids[i], y + i * d);
}
pl_status KERNEL(embedding_forward)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), embedding_forward_piece, c);
    return PL_OK;
}

typedef struct {
    const float *from;
    const int32_t *rows;
    float *to;
    int64_t count, width;
} row_sum_job;

/* to[rows[i],:] += from[i,:] for the columns [begin, end), in the order of i. */
static void add_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const row_sum_job *job = context;
    for (int64_t i = 0; i < job->count; i++) {
        const float *from = job->from + i * job->width;
        float *to = job->to + job->rows[i] * job->width;
        int64_t j = begin;
        for (; j + LANES <= end; j += LANES) vf_store(to + j, vf_load(to + j) + vf_load(from + j));
        for (; j < end; j++) to[j] += from[j];
    }
}
static void add_rows(const row_sum_job *job) {
    /* A piece has whole cache lines of columns, and at least 64 columns, since it visits every
     * row. */
    int64_t columns = grain_of(job->count) / 64 * 64;
    pl_parallel(job->width, columns < 64 ? 64 : columns, add_rows_piece, job);
}

/* dw[ids[n],:] += dy[n,:]   dy [N,D], ids [N], dw [V,D] */
pl_status KERNEL(embedding_grad)(const pl_call *c) {
    const embedding_grad_args args = embedding_grad_args_of(c);
    add_rows(&(row_sum_job){args.dy, args.ids, args.dw, PL_DIM(c, 'N'), PL_DIM(c, 'D')});
    return PL_OK;
}

/* y[m,:] = x[rows[m],:]   x [N,D], rows [M], y [M,D] */
static void gather_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const gather_rows_args args = gather_rows_args_of(c);
    const float *x = args.x;
    const int32_t *rows = args.rows;
    float *y = args.y;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = begin; i < end; i++) memcpy(y + i * d, x + rows[i] * d, (size_t)d * sizeof *y);
}
pl_status KERNEL(gather_rows)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'M'), PL_DIM(c, 'D'), gather_rows_piece, c);
    return PL_OK;
}

/* y[rows[m],:] = x[m,:]   x [M,D], rows [M], y [N,D]. Of equal indices the last one wins. Other
 * rows of y keep their values. */
pl_status KERNEL(put_rows)(const pl_call *c) {
    const put_rows_args args = put_rows_args_of(c);
    const float *x = args.x;
    const int32_t *rows = args.rows;
    float *y = args.y;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t i = 0; i < PL_DIM(c, 'M'); i++)
        memcpy(y + rows[i] * d, x + i * d, (size_t)d * sizeof *y);
    return PL_OK;
}

static void zero_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const row_sum_job *job = context;
    memset(job->to + begin * job->width, 0, (size_t)((end - begin) * job->width) * sizeof *job->to);
}

/* dx[n,:] = sum of dy[m,:] over all m with rows[m] = n   dy [M,D], rows [M], dx [N,D], overwritten.
 * Rows without an m become 0. */
pl_status KERNEL(scatter_add_rows)(const pl_call *c) {
    const scatter_add_rows_args args = scatter_add_rows_args_of(c);
    row_sum_job job = {args.dy, args.rows, args.dx, PL_DIM(c, 'M'), PL_DIM(c, 'D')};
    in_pieces(PL_DIM(c, 'N'), job.width, zero_piece, &job);
    add_rows(&job);
    return PL_OK;
}

/* y[0, n) (+)= the sum of k rows, n <= LANES; row r begins at x + r * stride. */
INLINE void combine_lanes(const float *x, const int32_t *rows, int64_t k, int64_t stride, int add,
                          float *y, int64_t n) {
    vf sum = !add ? vf_set1(0) : n == LANES ? vf_load(y) : vf_load_part(y, n, 0.0f);
    for (int64_t j = 0; j < k; j++) {
        const float *from = x + rows[j] * stride;
        sum += n == LANES ? vf_load(from) : vf_load_part(from, n, 0.0f);
    }
    vf_store_part(y, sum, n);
}

/* y[n,:] (+)= sum over k of x[rows[n,k],:], in the order of k   x [M,D], rows [N,K], y [N,D] */
static void combine_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const combine_rows_args args = combine_rows_args_of(c);
    int64_t d = PL_DIM(c, 'D'), k = PL_DIM(c, 'K');
    for (int64_t n = begin; n < end; n++) {
        const int32_t *rows = args.rows + n * k;
        float *y = args.y + n * d;
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES)
            combine_lanes(args.x + i, rows, k, d, args.accumulate != 0, y + i, LANES);
        if (i < d) combine_lanes(args.x + i, rows, k, d, args.accumulate != 0, y + i, d - i);
    }
}
pl_status KERNEL(combine_rows)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D') * PL_DIM(c, 'K'), combine_rows_piece, c);
    return PL_OK;
}

/* y[n,:] = factor[n] x[n,:] */
static void scale_rows_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const scale_rows_args args = scale_rows_args_of(c);
    const float *factor = args.factor;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t n = begin; n < end; n++) {
        const float *x = args.x + n * d;
        float *y = args.y + n * d;
        for (int64_t i = 0; i < d; i++) y[i] = factor[n] * x[i];
    }
}
pl_status KERNEL(scale_rows)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), scale_rows_piece, c);
    return PL_OK;
}

/* y[n,d] = factor[d] x[n,d] */
static void scale_columns_piece(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const pl_call *c = context;
    const scale_columns_args args = scale_columns_args_of(c);
    const float *factor = args.factor;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t n = begin; n < end; n++) {
        const float *x = args.x + n * d;
        float *y = args.y + n * d;
        for (int64_t i = 0; i < d; i++) y[i] = factor[i] * x[i];
    }
}
pl_status KERNEL(scale_columns)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), scale_columns_piece, c);
    return PL_OK;
}

/* y[e] = x[e]^T   x [E,N,D], y [E,D,N]. By blocks of rows: the cache lines that hold one column of a
 * block hold its next columns too. */
static void transpose_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    enum { BLOCK = 16 };
    const pl_call *c = context;
    const transpose_args args = transpose_args_of(c);
    int64_t n = PL_DIM(c, 'N'), d = PL_DIM(c, 'D'), blocks = (n + BLOCK - 1) / BLOCK;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block % blocks * BLOCK, matrix = block / blocks * n * d;
        const float *x = args.x + matrix + first * d;
        float *y = args.y + matrix + first;
        int64_t rows = n - first < BLOCK ? n - first : BLOCK;
        for (int64_t j = 0; j < d; j++)
            for (int64_t i = 0; i < rows; i++) y[j * n + i] = x[i * d + j];
    }
}
pl_status KERNEL(transpose)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'E') * ((PL_DIM(c, 'N') + 15) / 16), 16 * PL_DIM(c, 'D'), transpose_piece,
              c);
    return PL_OK;
}

/* dfactor[n] = dy[n,:] . x[n,:]; dx[n,:] = factor[n] dy[n,:] */
static void scale_rows_grad_piece(const void *context, int64_t begin, int64_t end,
                                  int worker UNUSED) {
    const pl_call *c = context;
    const scale_rows_grad_args args = scale_rows_grad_args_of(c);
    const float *factor = args.factor;
    int64_t d = PL_DIM(c, 'D');
    for (int64_t n = begin; n < end; n++) {
        const float *dy = args.dy + n * d;
        float *dx = args.dx + n * d;
        args.dfactor[n] = dot(dy, args.x + n * d, NULL, d);
        for (int64_t i = 0; i < d; i++) dx[i] = factor[n] * dy[i];
    }
}
pl_status KERNEL(scale_rows_grad)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), PL_DIM(c, 'D'), scale_rows_grad_piece, c);
    return PL_OK;
}

#endif
