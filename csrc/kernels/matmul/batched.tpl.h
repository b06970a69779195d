/* Products of many pairs of float32 matrices in one call. Small ones are computed whole, each by
 * one thread: A is read in place; so is B, if few rows of A meet it and it fills the tile. */
#ifndef PYLOSS_BATCHED_TPL_H
#define PYLOSS_BATCHED_TPL_H
#include "../kernel.h"
#include "gemm.tpl.h"

/* Product i reads matrix index[i] of `count` matrices of `size` elements; without an index, matrix
 * i % count. */
typedef struct {
    const float *data;
    const int32_t *index;
    int64_t count, size;
    int transposed;
} operand;

INLINE const float *matrix_of(const operand *o, int64_t i) {
    return o->data + (o->index ? o->index[i] : i % o->count) * o->size;
}

typedef struct {
    operand a, b;
    int64_t m, n, k, count;
    float alpha;
    int accumulate;
    float *c;
} batch_job;

/* ---- small products */

enum {
    SMALL_A = 1 << 16,   /* elements of A that stay in the second cache */
    SMALL_COLUMNS = 96,  /* of a piece; a multiple of every NR */
    PACKED_ROWS = 4 * MR /* for so many rows of A, packing B costs less than reading it in place */
};

/* A tile of C: all depths of some rows of A, in place, times one or two vectors of B. */
typedef struct {
    int64_t k, lda, ldb, ldc, cols;
    const float *a, *b;
    float alpha, *c;
    int add;
} small_tile;

/* mr, nv and transposed (A is [k, m]) are constants in every instance. */
INLINE void small_tile_body(const small_tile *t, const int mr, const int nv, const int transposed) {
    vf acc[MR][2];
    const float *a[MR], *b = t->b;
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++) {
        a[i] = t->a + (transposed ? i : i * t->lda);
        acc[i][0] = acc[i][1] = vf_set1(0);
    }
#pragma GCC unroll 1
    for (int64_t k = 0; k < t->k; k++, b += t->ldb) {
        const int64_t at = transposed ? k * t->lda : k;
        const vf b0 = vf_load(b), b1 = nv == 2 ? vf_load(b + LANES) : b0;
#pragma GCC unroll 14
        for (int i = 0; i < mr; i++) {
            const vf x = vf_set1(a[i][at]);
            acc[i][0] = vf_fma(x, b0, acc[i][0]);
            if (nv == 2) acc[i][1] = vf_fma(x, b1, acc[i][1]);
        }
    }
    const vf alpha = vf_set1(t->alpha);
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) {
            float *c = t->c + i * t->ldc + j * LANES;
            const int64_t n = at_most(t->cols - j * LANES, LANES);
            const vf y = alpha * acc[i][j];
            if (n == LANES) vf_store(c, t->add ? vf_load(c) + y : y);
            else vf_store_part(c, t->add ? vf_load_part(c, n, 0) + y : y, n);
        }
}

typedef void (*small_tile_fn)(const small_tile *t);
#define SMALL_TILE(mr, nv) \
    static void small_##mr##x##nv(const small_tile *t) { small_tile_body(t, mr, nv, 0); } \
    static void small_##mr##x##nv##_transposed(const small_tile *t) { \
        small_tile_body(t, mr, nv, 1); \
    }
#define SMALL_TILES(mr) SMALL_TILE(mr, 1) SMALL_TILE(mr, 2)
#define SMALL_ENTRY(mr) \
    { \
        mr, { \
            {small_##mr##x1, small_##mr##x2}, { \
                small_##mr##x1_transposed, small_##mr##x2_transposed \
            } \
        } \
    }
#if PL_BYTES == 64
SMALL_TILES(14)
SMALL_TILES(8)
#elif PL_BYTES == 16 && defined(__aarch64__)
SMALL_TILES(12)
SMALL_TILES(8)
#else
SMALL_TILES(6)
#endif
SMALL_TILES(4)
SMALL_TILES(3)
SMALL_TILES(2)
SMALL_TILES(1)
/* From the most rows to the fewest. */
static const struct {
    int rows;
    small_tile_fn fn[2][2]; /* [transposed][vectors - 1] */
} small_tiles[] = {
#if PL_BYTES == 64
    SMALL_ENTRY(14), SMALL_ENTRY(8),
#elif PL_BYTES == 16 && defined(__aarch64__)
    SMALL_ENTRY(12), SMALL_ENTRY(8),
#else
    SMALL_ENTRY(6),
#endif
    SMALL_ENTRY(4),  SMALL_ENTRY(3), SMALL_ENTRY(2), SMALL_ENTRY(1)};
#undef SMALL_TILE
#undef SMALL_TILES
#undef SMALL_ENTRY

/* Columns [j, j + cols) of B as [k, width]. */
static void pack_columns(const batch_job *job, const float *b, int64_t j, int64_t cols, int width,
                         float *to) {
    if (job->b.transposed) {
        const pl_weight w = float_matrix(b, job->n, job->k);
        pack_b(&w, 1, j, cols, 0, job->k, width, 1, NULL, to);
        return;
    }
    for (int64_t k = 0; k < job->k; k++)
        for (int64_t l = 0; l < width; l += LANES) {
            const float *from = b + k * job->n + j + l;
            vf_store(to + k * width + l,
                     cols - l >= LANES ? vf_load(from) : vf_load_part(from, cols - l, 0));
        }
}

/* Some columns of product i. */
static void small_columns(const batch_job *job, int64_t i, int64_t first, int64_t last) {
    float packed[KC * NR + PANEL_SPILL] __attribute__((aligned(64)));
    const float *a = matrix_of(&job->a, i), *b = matrix_of(&job->b, i);
    const int transposed = job->a.transposed;
    small_tile t = {.k = job->k,
                    .lda = transposed ? job->m : job->k,
                    .ldc = job->n,
                    .alpha = job->alpha,
                    .add = job->accumulate};
    for (int64_t j = first; j < last; j += NR) {
        t.cols = at_most(last - j, NR);
        const int vectors = t.cols > LANES ? 2 : 1, width = vectors * LANES;
        /* Rows a page apart would meet in few lines of the first cache. */
        if (job->b.transposed || t.cols < width || job->n % 1024 == 0 || job->m >= PACKED_ROWS) {
            pack_columns(job, b, j, t.cols, width, packed);
            t.b = packed;
            t.ldb = width;
        } else {
            t.b = b + j;
            t.ldb = job->n;
        }
        int kind = 0;
        for (int64_t row = 0; row < job->m; row += small_tiles[kind].rows) {
            while (small_tiles[kind].rows > job->m - row) kind++;
            t.a = a + (transposed ? row : row * job->k);
            t.c = job->c + (i * job->m + row) * job->n + j;
            small_tiles[kind].fn[transposed][vectors - 1](&t);
        }
    }
}

INLINE int64_t small_pieces(const batch_job *job) {
    return (job->n + SMALL_COLUMNS - 1) / SMALL_COLUMNS;
}

static void small_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const batch_job *job = context;
    const int64_t pieces = small_pieces(job);
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = i % pieces * SMALL_COLUMNS;
        small_columns(job, i / pieces, first, at_most(first + SMALL_COLUMNS, job->n));
    }
}

/* ---- all products */

static pl_status large_products(const batch_job *job) {
    enum { TOGETHER = 256 }; /* descriptions of products that are kept at a time */
    const int64_t m = job->m, n = job->n, k = job->k;
    gemm *products = pl_acquire(sizeof *products * (size_t)at_most(job->count, TOGETHER));
    pl_status status = products ? PL_OK : PL_NO_MEMORY;
    for (int64_t first = 0; first < job->count && status == PL_OK; first += TOGETHER) {
        const int64_t some = at_most(job->count - first, TOGETHER);
        for (int64_t i = 0; i < some; i++) {
            const float *a = matrix_of(&job->a, first + i), *b = matrix_of(&job->b, first + i);
            const int a_transposed = job->a.transposed, b_transposed = job->b.transposed;
            products[i] = (gemm){.m = m,
                                 .n = n,
                                 .k = k,
                                 .a = {a, a_transposed ? m : k, a_transposed, job->alpha, 0},
                                 .b = float_matrix(b, b_transposed ? n : k, b_transposed ? k : n),
                                 .b_transposed = b_transposed,
                                 .accumulate = job->accumulate,
                                 .c = job->c + (first + i) * m * n};
        }
        status = gemm_run_all(products, some);
    }
    pl_release(products);
    return status;
}

/* c[i] (+)= alpha a[i] b[i], with a[i] as [m, k] or [k, m] and b[i] as [k, n] or [n, k]. */
static pl_status batched_product(const pl_call *call, operand a, operand b, double alpha,
                                 int64_t accumulate, float *c) {
    enum { PIECE_PRODUCTS = 1 << 16 }; /* multiplications of a piece, about 2 microseconds */
    batch_job job = {a,
                     b,
                     PL_DIM(call, 'M'),
                     PL_DIM(call, 'N'),
                     PL_DIM(call, 'K'),
                     PL_DIM(call, 'C'),
                     (float)alpha,
                     accumulate != 0,
                     c};
    job.a.count = PL_DIM(call, 'A'), job.a.size = job.m * job.k;
    job.b.count = PL_DIM(call, 'B'), job.b.size = job.k * job.n;
    if (!job.a.count || !job.b.count) return PL_OK;
    /* The rows of all products with one B are one product. */
    if (job.b.count == 1 && job.a.count == job.count && !a.index && !a.transposed) {
        job.m *= job.count;
        job.count = 1;
    }
    if (job.count == 1 || job.k > KC || job.a.size > SMALL_A) return large_products(&job);
    const int64_t each = job.m * at_most(job.n, SMALL_COLUMNS) * job.k;
    pl_parallel(job.count * small_pieces(&job), at_least(PIECE_PRODUCTS / at_least(each, 1), 1),
                small_piece, &job);
    return PL_OK;
}

#define BATCHED(name, a_transposed, b_transposed) \
    pl_status KERNEL(name)(const pl_call *call) { \
        const name##_args args = name##_args_of(call); \
        return batched_product( \
            call, (operand){.data = args.a, .index = args.a_index, .transposed = a_transposed}, \
            (operand){.data = args.b, .index = args.b_index, .transposed = b_transposed}, \
            args.alpha, args.accumulate, args.c); \
    }
BATCHED(batched_nn, 0, 0)
BATCHED(batched_nt, 0, 1)
BATCHED(batched_tn, 1, 0)
#undef BATCHED

#endif
