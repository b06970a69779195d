/* Products of float rows and quantized weights by integer dots, for any number of rows.
 *
 * A row of A is rounded to bytes, 32 depths at a time: x = scale code. The codes of B are those
 * that are stored. Integer dots are exact, so that
 *
 *   y = sum over runs r of 32 depths, in order, of
 *         scale_x[r] scale_w[r] (dot of codes) + scale_x[r] (sum of x's codes) offset_w[r]
 *
 * has one order of float32 operations, each rounded once: the bits do not depend on the number of
 * rows, the threads or the processor. Formats of 16 depths to a scale have two dots in a run.
 *
 * Columns are expanded INT8_VECTORS vectors at a time, some runs deep, into the first or second
 * cache (int8_codes.tpl.h), and tiles of rows walk over them:
 *
 *             column   0  1  2 ..                     of A, a word of four depths
 *   codes of depths    0  0  0 ..   first step   <-   x0 x1 x2 x3, for all lanes
 *                      1  1  1 ..
 *                      2  2  2 ..
 *                      3  3  3 ..
 *                      4  4  4 ..   second step  <-   x4 x5 x6 x7
 */
#ifndef PYLOSS_INT8_TPL_H
#define PYLOSS_INT8_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "int8.h"
#include "int8_tile.tpl.h"

enum {
    INT8_DEPTH = 64,      /* runs expanded together, at most */
    INT8_FEW_ROWS = 16,   /* for so few, what is expanded fits into the first cache with them */
    INT8_PIECE_ROWS = 96, /* a piece has at least so many, or all */
    INT8_PIECE = 16384    /* products of a piece, at least: a shorter one would not pay */
};

/* What a worker needs to itself. */
typedef struct {
    vw codes[INT8_DEPTH * 8 * INT8_VECTORS];
    vf scales[INT8_DEPTH * 2 * INT8_VECTORS], offsets[INT8_DEPTH * 2 * INT8_VECTORS];
} int8_scratch;

/* Products, each cut into pieces of columns, and of rows if it has many. */
typedef struct {
    const gemm *groups;
    int64_t column_pieces, columns, row_pieces;
    int64_t *first_run; /* of each product's A */
    int8_run *runs;
    int8_scratch *scratch;
    float *own;       /* of each worker: sums, and the columns of U */
    int64_t own_size; /* floats of a worker */
} int8_job;

static void int8_take_columns(const pl_weight *w, int64_t o, int64_t end, int8_columns *c) {
    for (int v = 0; v < INT8_VECTORS; v++) {
        c[v].w = w;
        for (int l = 0; l < LANES; l++) {
            /* The last column fills vectors that reach past `end`. */
            c[v].stored[l] = pl_stored_row(w, at_most(o + v * LANES + l, end - 1));
            c[v].row[l] = w->data + c[v].stored[l] * w->row_bytes;
        }
    }
}

/* up[j][column] = U[j, o + column], of the low-rank branch. */
static void int8_take_up(const gemm *g, int64_t o, int64_t columns, float *up) {
    const float *u = (const float *)g->up.data;
    for (int64_t j = 0; j < g->rank; j++)
        for (int64_t c = 0; c < INT8_COLUMNS; c++)
            up[j * INT8_COLUMNS + c] = c >= columns       ? 0
                                       : g->up_transposed ? u[(o + c) * g->rank + j]
                                                          : u[j * g->n + o + c];
}

/* Stores the columns of a row of C: sum times the factor, bias and the low-rank branch. */
static void int8_finish(const gemm *g, int64_t row, int64_t o, int64_t columns, const float *sums,
                        const float *up) {
    for (int64_t at = 0; at < columns; at += LANES) {
        const int64_t n = at_most(columns - at, LANES);
        vf factor = vf_set1(g->a.factor);
        if (g->b_row_factor) factor *= vf_load_part(g->b_row_factor + o + at, n, 0);
        const vf bias = g->bias ? vf_load_part(g->bias + o + at, n, 0) : vf_set1(0);
        vf y = vf_fma_once(vf_load(sums + at), factor, bias), branch = vf_set1(0);
        const float *low = g->rank ? (g->low_given ? g->low_given : g->low) + row * g->rank : NULL;
        for (int64_t j = 0; j < g->rank; j++)
            branch = vf_fma_once(vf_set1(low[j] * g->up_scale), vf_load(up + j * INT8_COLUMNS + at),
                                 branch);
        if (g->rank) y += branch;
        vf_store_part(g->c + row * g->n + o + at, y, n);
    }
}

/* Rows [row0, row1) and columns [begin, end) of C. */
static void int8_multiply(const gemm *g, const int8_run *x, int64_t row0, int64_t row1,
                          int64_t begin, int64_t end, int8_scratch *s, float *sums, float *up) {
    const int format = g->b.format;
    const int64_t runs = g->k / 32, rows = row1 - row0, tiles = (rows + INT8_ROWS - 1) / INT8_ROWS,
                  depth = rows <= INT8_FEW_ROWS ? RUNS : INT8_DEPTH,
                  parts = at_least((runs + depth - 1) / depth, 1),
                  part = round_up((runs + parts - 1) / parts, RUNS);
    int8_columns both[2][INT8_VECTORS], *now = both[0], *next = both[1];
    int8_tile t = {.stride = runs,
                   .panel = {s->codes, s->scales, s->offsets},
                   .halves = int8_halves(format),
                   .offsets = int8_offsets(format)};
    int8_take_columns(&g->b, begin, end, now);
    for (int64_t o = begin; o < end; o += INT8_COLUMNS) {
        const int64_t columns = at_most(end - o, INT8_COLUMNS), after = o + INT8_COLUMNS;
        if (after < end) int8_take_columns(&g->b, after, end, next);
        for (int v = 0; v < INT8_VECTORS; v++)
            now[v].ahead = after < end ? next[v].row[0] : now[v].row[0];
        if (g->rank) int8_take_up(g, o, columns, up);
        int64_t run = 0;
        do {
            t.runs = at_most(part, runs - run);
            t.first = run == 0;
            for (int64_t r = 0; r < t.runs; r += RUNS)
                for (int v = 0; v < INT8_VECTORS; v++) {
                    const int8_panel p = {s->codes + r * 8 * INT8_VECTORS + v,
                                          s->scales + r * 2 * INT8_VECTORS + v,
                                          s->offsets + r * 2 * INT8_VECTORS + v};
                    int8_expanders[format](now + v, run + r, at_most(RUNS, t.runs - r), &p);
                }
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
                t.x = x + (row0 + first) * runs + run;
                t.sums = sums + first * INT8_COLUMNS;
                int8_tiles[int8_wide(format)][last - first - 1](&t);
                for (int64_t i = first; i < last && run + t.runs == runs; i++)
                    int8_finish(g, row0 + i, o, columns, sums + i * INT8_COLUMNS, up);
            }
            run += part;
        } while (run < runs);
        int8_columns *swap = now;
        now = next;
        next = swap;
    }
}

static void int8_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const int8_job *job = context;
    const int64_t pieces = job->column_pieces * job->row_pieces;
    for (int64_t piece = begin; piece < end; piece++) {
        const gemm *g = job->groups + piece / pieces;
        const int64_t at = piece % pieces, first = at / job->row_pieces * job->columns,
                      last = at_most(first + job->columns, g->n), part = at % job->row_pieces,
                      rows = at_least((g->m + job->row_pieces - 1) / job->row_pieces,
                                      at_most(g->m, INT8_PIECE_ROWS)),
                      row0 = part * rows, row1 = at_most(row0 + rows, g->m);
        if (!is_int8(g->form) || row0 >= row1 || first >= last) continue;
        float *own = job->own + worker * job->own_size;
        int8_multiply(g, job->runs + job->first_run[g - job->groups], row0, row1, first, last,
                      job->scratch + worker, own, own + rows * INT8_COLUMNS);
    }
}

typedef struct {
    const gemm *g;
    int8_run *runs;
} int8_rounding;
static void int8_round_rows(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const int8_rounding *job = context;
    const gemm *g = job->g;
    for (int64_t i = begin; i < end; i++)
        int8_round_row(g->a.data + i * g->a.stride, g->k / 32, g->b.format,
                       job->runs + i * (g->k / 32));
}

/* Runs the products of `groups` that are in int8. */
pl_status INT8_RUN(const gemm *groups, int64_t count) {
    int64_t products = 0, runs = 0, rows = 0, columns = 0, rank = 0, deepest = 0;
    int8_job job = {.groups = groups};
    job.first_run = pl_acquire(sizeof *job.first_run * (size_t)count);
    if (!job.first_run) return PL_NO_MEMORY;
    for (int64_t i = 0; i < count; i++) {
        const gemm *g = groups + i;
        if (!is_int8(g->form) || !g->m || !g->n) continue;
        products++;
        job.first_run[i] = runs;
        runs += g->m * (g->k / 32);
        rows = at_least(rows, g->m);
        columns = at_least(columns, g->n);
        rank = at_least(rank, g->rank);
        deepest = at_least(deepest, g->k);
    }
    /* Few long runs of columns, since memory is read fastest in one stream; but enough pieces of
     * many rows for many threads. Bits do not depend on how it is cut. */
    const int64_t threads = pl_num_threads(), blocks = (columns + INT8_COLUMNS - 1) / INT8_COLUMNS,
                  wanted = at_least(4 * threads / at_least(products, 1), 1),
                  least = 1 + INT8_PIECE / (deepest * rows + 1) / INT8_COLUMNS;
    job.columns = at_least((blocks + wanted - 1) / wanted, least) * INT8_COLUMNS;
    job.column_pieces = (columns + job.columns - 1) / job.columns;
    job.row_pieces =
        at_least(at_most(wanted / at_least(job.column_pieces, 1), rows / INT8_PIECE_ROWS), 1);
    job.own_size = round_up((rows + rank) * INT8_COLUMNS, 16);
    job.runs = pl_acquire(sizeof *job.runs * (size_t)runs);
    job.scratch = pl_acquire(sizeof *job.scratch * (size_t)threads);
    job.own = pl_acquire(sizeof *job.own * (size_t)(job.own_size * threads));
    const pl_status status = job.runs && job.scratch && job.own ? PL_OK : PL_NO_MEMORY;
    for (int64_t i = 0; i < count && status == PL_OK; i++) {
        const gemm *g = groups + i;
        if (!is_int8(g->form) || !g->m || !g->n) continue;
        const int8_rounding rounding = {g, job.runs + job.first_run[i]};
        in_pieces(g->m, g->k, int8_round_rows, &rounding);
    }
    if (status == PL_OK)
        pl_parallel(count * job.column_pieces * job.row_pieces, 1, int8_piece, &job);
    pl_release(job.own);
    pl_release(job.scratch);
    pl_release(job.runs);
    pl_release(job.first_run);
    return status;
}

#endif
