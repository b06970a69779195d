/* Matrix-vector products, as in generation: at most SMALL_M rows of A times a transposed B. Each
 * row of B is read once, in place, and multiplied with all rows of A as it is expanded. */
#ifndef PYLOSS_GEMV_TPL_H
#define PYLOSS_GEMV_TPL_H
#include "../pieces.h"
#include "../quant.tpl.h"
#include "../simd/dot_f32.h"
#include "../simd/vec.h"
#include "product.h"

/* The low-rank branch of one element of C. Not inlined: each instance of gemv_rows would fuse or
 * split its products differently, and a row's bits would depend on how many rows come with it. */
static __attribute__((noinline)) float gemv_branch(const gemm *g, const float *low, int64_t o) {
    const float *u = (const float *)g->up.data;
    float sum = 0;
    for (int64_t j = 0; j < g->rank; j++)
        sum += g->up_scale * low[j] * (g->up_transposed ? u[o * g->rank + j] : u[j * g->n + o]);
    return sum;
}

/* Prefetch distance in bytes for quantized rows; the hardware prefetcher stops at pages. */
enum { GEMV_PREFETCH = 2048 };

/* Rows [begin, end) of B, expanded a run of 32 at a time. The number m of rows of A and the format
 * are constants in every instance, so that sums and runs live in registers. */
INLINE void gemv_rows(const gemm *g, int64_t begin, int64_t end, const int m, const int format,
                      const decoder decode) {
    const float *low = g->low_given ? g->low_given : g->low;
    for (int64_t o = begin; o < end; o++) {
        const int64_t row = pl_stored_row(&g->b, o);
        if (!pl_is_floats(format))
            for (int64_t i = 0; i < g->b.row_bytes; i += 64)
                __builtin_prefetch(g->b.data + row * g->b.row_bytes + GEMV_PREFETCH + i);
        const float factor = g->b_row_factor ? g->a.factor * g->b_row_factor[o] : g->a.factor;
        vf acc[SMALL_M][32 / LANES];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int l = 0; l < 32 / LANES; l++) acc[i][l] = vf_set1(0);
        int64_t k = 0;
        for (; k + 32 <= g->k; k += 32) {
            float run[32];
            decode(&g->b, row, k, 32, run);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++)
#pragma GCC unroll 8
                for (int l = 0; l < 32 / LANES; l++)
                    acc[i][l] += vf_load(run + l * LANES) *
                                 vf_load(g->a.data + i * g->a.stride + k + l * LANES);
        }
        float tail[32];
        if (k < g->k) decoders[g->b.format](&g->b, row, k, g->k - k, tail);
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            vf total = acc[i][0];
#pragma GCC unroll 8
            for (int l = 1; l < 32 / LANES; l++) total += acc[i][l];
            float sum = vf_sum(total);
            for (int64_t l = 0; l < g->k - k; l++)
                sum += tail[l] * g->a.data[i * g->a.stride + k + l];
            float y = sum * factor + (g->bias ? g->bias[o] : 0);
            if (g->rank) y += gemv_branch(g, low + i * g->rank, o);
            float *c = g->c + i * g->n + o;
            *c = g->accumulate ? *c + y : y;
        }
    }
}

/* Instances are separate functions: if one holds them all, the compiler keeps sums on the stack. */
typedef void (*gemv_fn)(const gemm *g, int64_t begin, int64_t end);
#define GEMV_ROWS(name, m) \
    static __attribute__((noinline)) void gemv_##name##_##m(const gemm *g, int64_t begin, \
                                                            int64_t end) { \
        gemv_rows(g, begin, end, m, PL_W_##name, run_##name); \
    }
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    GEMV_ROWS(name, 1) GEMV_ROWS(name, 2) GEMV_ROWS(name, 3) GEMV_ROWS(name, 4)
#include "../../formats.def"
static const gemv_fn gemv_of[PL_W_COUNT][SMALL_M] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    {gemv_##name##_1, gemv_##name##_2, gemv_##name##_3, gemv_##name##_4},
#include "../../formats.def"
};

/* Products, each cut into `pieces` pieces of `columns` columns; those of more rows are skipped. */
typedef struct {
    const gemm *groups;
    int64_t columns, pieces;
} gemv_job;

INLINE int is_gemv(const gemm *g) { return g->m <= SMALL_M && g->b_transposed && !g->a.transposed; }

static void gemv_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const gemv_job *job = context;
    for (int64_t piece = begin; piece < end; piece++) {
        const gemm *g = job->groups + piece / job->pieces;
        int64_t first = piece % job->pieces * job->columns,
                last = first + job->columns < g->n ? first + job->columns : g->n;
        if (!g->m || !is_gemv(g)) continue;
        gemv_of[g->b.format][g->m - 1](g, first, last);
    }
}

/* sum[0, n) = a D for n columns of D [k, stride], in float64. */
static void wide_columns(const float *a, const float *p, int64_t k, int64_t stride, int64_t n,
                         double *sum) {
    int64_t i = 0;
    for (int64_t j = 0; j < n; j++) sum[j] = 0;
    for (; i + 4 <= k; i += 4, p += 4 * stride) {
        const double x0 = a[i], x1 = a[i + 1], x2 = a[i + 2], x3 = a[i + 3];
        const float *p1 = p + stride, *p2 = p1 + stride, *p3 = p2 + stride;
        for (int64_t j = 0; j < n; j++)
            sum[j] += (x0 * p[j] + x1 * p1[j]) + (x2 * p2[j] + x3 * p3[j]);
    }
    for (; i < k; i++, p += stride)
        for (int64_t j = 0; j < n; j++) sum[j] += (double)a[i] * p[j];
}

/* L of the products; D is float32, as adapters store it. */
static void gemv_low(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    enum { COLUMNS = 64 };
    for (const gemm *g = (const gemm *)context + begin; g < (const gemm *)context + end; g++) {
        if (!is_gemv(g) || !g->rank || g->low_given) continue;
        const float *p = (const float *)g->down.data;
        for (int64_t i = 0; i < g->m; i++) {
            const float *a = g->a.data + i * g->a.stride;
            float *low = g->low + i * g->rank;
            for (int64_t j = 0; j < g->rank && g->down_transposed; j++)
                low[j] = (float)wide_dot(a, p + j * g->k, g->k) * g->down_scale;
            for (int64_t j = 0; j < g->rank && !g->down_transposed; j += COLUMNS) {
                double sum[COLUMNS];
                int64_t n = g->rank - j < COLUMNS ? g->rank - j : COLUMNS;
                wide_columns(a, p + j, g->k, g->rank, n, sum);
                for (int64_t l = 0; l < n; l++) low[j + l] = (float)sum[l] * g->down_scale;
            }
        }
    }
}

/* Runs the matrix-vector products among `groups`. Each is cut into long runs of rows of B, a few
 * per thread: memory is read fastest in one stream. */
static void gemv_run_all(const gemm *groups, int64_t count) {
    int64_t products = 0, columns = 0, narrowest = INT64_MAX;
    for (const gemm *g = groups; g < groups + count; g++)
        if (g->m && is_gemv(g)) {
            int64_t least = 1 + 16384 / (g->k + 1); /* a shorter piece would not pay */
            products++;
            columns = g->n > columns ? g->n : columns;
            narrowest = least < narrowest ? least : narrowest;
        }
    if (!products) return;
    int64_t pieces = (4 * pl_num_threads() + products - 1) / products,
            even = (columns + pieces - 1) / pieces;
    gemv_job job = {groups, even > narrowest ? even : narrowest, 0};
    job.pieces = (columns + job.columns - 1) / job.columns;
    pl_parallel(count, 1, gemv_low, groups);
    pl_parallel(count * job.pieces, 1, gemv_piece, &job);
}

#endif
