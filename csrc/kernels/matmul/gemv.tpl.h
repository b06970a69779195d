/* Matrix-vector products, as in generation: at most SMALL_M rows of A times a transposed B. Each
 * row of B is read once, in place, and multiplied with all rows of A as it is expanded. Products of
 * up to SKINNY_M rows have the same sums by skinny.tpl.h, which is run here too. */
#ifndef PYLOSS_GEMV_TPL_H
#define PYLOSS_GEMV_TPL_H
#include "../pieces.h"
#include "../quant.tpl.h"
#include "../simd/dot_f32.h"
#include "../simd/vec.h"
#include "product.h"

/* The low-rank branch of one element of C. Not inlined: each instance of gemv_rows would fuse or
 * split its products differently, and a row's bits would depend on how many rows come with it. */
static NOINLINE float gemv_branch(const gemm *g, const float *low, int64_t o) {
    const float *u = (const float *)g->up.data;
    float sum = 0;
    for (int64_t j = 0; j < g->rank; j++)
        sum += g->up_scale * low[j] * (g->up_transposed ? u[o * g->rank + j] : u[j * g->n + o]);
    return sum;
}

/* Stores element (i, o) of C: `sum` over the depths before k, then the other depths, whose B is in
 * `tail`. Not inlined: it would be a fifth of the code of all instances below. */
static NOINLINE void gemv_store(const gemm *g, int64_t i, int64_t o, float sum, const float *tail,
                                int64_t k) {
    const float factor = g->b_row_factor ? g->a.factor * g->b_row_factor[o] : g->a.factor;
    for (int64_t l = 0; l < g->k - k; l++)
        sum = f_fma(tail[l], g->a.data[i * g->a.stride + k + l], sum);
    float y = f_fma(sum, factor, g->bias ? g->bias[o] : 0);
    if (g->rank) y += gemv_branch(g, (g->low_given ? g->low_given : g->low) + i * g->rank, o);
    float *c = g->c + i * g->n + o;
    *c = g->accumulate ? *c + y : y;
}

/* Prefetch distance in bytes for quantized rows; the hardware prefetcher stops at pages. */
enum { GEMV_PREFETCH = 2048 };

/* Rows [begin, end) of B, expanded a run of 32 at a time. The number m of rows of A and the format
 * are constants in every instance, so that sums and runs live in registers. */
INLINE void gemv_rows(const gemm *g, int64_t begin, int64_t end, const int m, const int format,
                      const run_decoder decode) {
    for (int64_t o = begin; o < end; o++) {
        const int64_t row = pl_stored_row(&g->b, o);
        if (!pl_is_floats(format))
            for (int64_t i = 0; i < g->b.row_bytes; i += 64)
                __builtin_prefetch(g->b.data + row * g->b.row_bytes + GEMV_PREFETCH + i);
        vf acc[SMALL_M][32 / LANES];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int l = 0; l < 32 / LANES; l++) acc[i][l] = vf_set1(0);
        int64_t k = 0;
        for (; k + 32 <= g->k; k += 32) {
            float run[32];
            decode(&g->b, row, k, run);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++)
#pragma GCC unroll 8
                for (int l = 0; l < 32 / LANES; l++)
                    acc[i][l] =
                        vf_fma(vf_load(run + l * LANES),
                               vf_load(g->a.data + i * g->a.stride + k + l * LANES), acc[i][l]);
        }
        float tail[32];
        if (k < g->k) decoders[g->b.format](&g->b, row, k, g->k - k, tail);
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            vf total = acc[i][0];
#pragma GCC unroll 8
            for (int l = 1; l < 32 / LANES; l++) total += acc[i][l];
            gemv_store(g, i, o, vf_sum(total), tail, k);
        }
    }
}

/* Instances are separate functions: if one holds them all, the compiler keeps sums on the stack. */
typedef void (*gemv_fn)(const gemm *g, int64_t begin, int64_t end);
#define GEMV_ROWS(name, m) \
    static NOINLINE void gemv_##name##_##m(const gemm *g, int64_t begin, int64_t end) { \
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

#include "skinny.tpl.h"

/* Products, each cut into `pieces` pieces of `columns` columns; those of more rows are skipped. */
typedef struct {
    const gemm *groups;
    int64_t columns, pieces;
    /* for skinny products: scratch per worker, and where each one's A is packed */
    skinny_scratch *scratch;
    float *packed;
    int64_t *at;
} gemv_job;

/* Whether each element of C is summed in the order of gemv_rows. */
INLINE int is_gemv(const gemm *g) {
    return g->m <= SKINNY_M && g->b_transposed && !g->a.transposed && !is_int8(g->form);
}

INLINE int is_few_int8(const gemm *g) { return g->m <= SKINNY_M && is_int8(g->form); }

static void gemv_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const gemv_job *job = context;
    for (int64_t piece = begin; piece < end; piece++) {
        const gemm *g = job->groups + piece / job->pieces;
        int64_t first = piece % job->pieces * job->columns,
                last = first + job->columns < g->n ? first + job->columns : g->n;
        if (!g->m || !is_gemv(g)) continue;
        if (g->m <= SMALL_M) gemv_of[g->b.format][g->m - 1](g, first, last);
        else
            skinny_columns(g, job->packed + job->at[g - job->groups], first, last,
                           job->scratch + worker);
    }
}

INLINE int is_skinny(const gemm *g) { return g->m > SMALL_M && is_gemv(g); }

static void gemv_pack(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const gemv_job *job = context;
    for (int64_t i = begin; i < end; i++)
        if (is_skinny(job->groups + i)) skinny_pack_a(job->groups + i, job->packed + job->at[i]);
}

/* Takes the memory of skinny products, and packs their A. */
static pl_status gemv_prepare(gemv_job *job, int64_t count) {
    int64_t floats = 0;
    job->scratch = pl_acquire(sizeof *job->scratch * (size_t)pl_num_threads());
    job->at = pl_acquire(sizeof *job->at * (size_t)count);
    if (!job->scratch || !job->at) return PL_NO_MEMORY;
    for (int64_t i = 0; i < count; i++) {
        job->at[i] = floats;
        if (is_skinny(job->groups + i)) floats += job->groups[i].m * (job->groups[i].k / 32 * 32);
    }
    job->packed = pl_acquire(sizeof *job->packed * (size_t)floats);
    if (!job->packed) return PL_NO_MEMORY;
    pl_parallel(count, 1, gemv_pack, job);
    return PL_OK;
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

/* Rows of L of the products, numbered from group * SKINNY_M on; D is float32, as adapters store
 * it. Those of few rows in int8 have theirs from here, too. */
static void gemv_low(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    enum { COLUMNS = 64 };
    for (int64_t row = begin; row < end; row++) {
        const gemm *g = (const gemm *)context + row / SKINNY_M;
        const int64_t i = row % SKINNY_M;
        if (i >= g->m || !(is_gemv(g) || is_few_int8(g)) || !g->rank || g->low_given) continue;
        const float *p = (const float *)g->down.data, *a = g->a.data + i * g->a.stride;
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

/* Runs the matrix-vector products among `groups`. Each is cut into long runs of rows of B, a few
 * per thread: memory is read fastest in one stream. */
static pl_status gemv_run_all(const gemm *groups, int64_t count) {
    int64_t products = 0, rows = 0, columns = 0, narrowest = INT64_MAX;
    for (const gemm *g = groups; g < groups + count; g++)
        if (g->m && is_gemv(g)) {
            int64_t least = 1 + 16384 / (g->k + 1); /* a shorter piece would not pay */
            products++;
            rows = g->m > rows ? g->m : rows;
            columns = g->n > columns ? g->n : columns;
            narrowest = least < narrowest ? least : narrowest;
        }
    if (!products) return PL_OK;
    int64_t pieces = (4 * pl_num_threads() + products - 1) / products,
            even = (columns + pieces - 1) / pieces;
    gemv_job job = {.groups = groups, .columns = even > narrowest ? even : narrowest};
    if (rows > SMALL_M) job.columns = round_up(job.columns, SKINNY_WIDTH);
    job.pieces = (columns + job.columns - 1) / job.columns;
    const pl_status status = rows > SMALL_M ? gemv_prepare(&job, count) : PL_OK;
    if (status == PL_OK) {
        /* Few rows of few products are computed at once: waking threads would take longer. */
        pl_parallel(count * SKINNY_M, rows > SMALL_M ? SMALL_M : SKINNY_M, gemv_low, groups);
        pl_parallel(count * job.pieces, 1, gemv_piece, &job);
    }
    pl_release(job.packed);
    pl_release(job.at);
    pl_release(job.scratch);
    return status;
}

#endif
