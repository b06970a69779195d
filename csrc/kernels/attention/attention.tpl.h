/* Attention: causal, grouped-query, over packed sequences, without the matrix of all scores.
 *
 * The queries of the heads that share a key-value head are stacked: row r of a sequence is query
 * r / group, head r % group. A key-value head is then one problem of n * group rows against m keys,
 * and its sums over the rows (dk, dv) include the sum over the group.
 *
 *                 keys  0        64       128      192      m
 *                       +--------+--------+--------+--------+
 *   piece 0, rows 0..   | tile 0 | hidden                   |   a tile: ATTN_Q rows x ATTN_K keys
 *            rows 64..  | tile 0 | tile 1 | hidden          |   hidden: tiles that no row sees
 *                       +--------+--------+--------+--------+
 *   piece 1, rows 128.. | tile 0 | tile 1 | tile 2 |        |   with a window, tiles before the
 *            rows 192.. | tile 0 | tile 1 | tile 2 | tile 3 |   windows of all rows are skipped
 *                       +--------+--------+--------+--------+
 *
 * A piece walks over the keys, one column of tiles at a time, so that its tiles share the keys in
 * the cache. Scores are stored transposed, [keys][rows]: maximum, sum and mask run along the keys,
 * with rows in the lanes.
 *
 * A piece of the forward pass is a range of rows. Few rows against many keys (generation) are cut
 * into ranges of keys instead. A piece of the backward pass is a range of rows. It writes its rows
 * of dq, and sums dk and dv in memory of its own; attn_join_tokens adds these sums in the order of
 * the pieces. */
#ifndef PYLOSS_ATTENTION_TPL_H
#define PYLOSS_ATTENTION_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "forward.tpl.h"
#include "grad.tpl.h"
#include "rows.tpl.h"
#include "split_kv.tpl.h"

/* ---- Cutting the work */

/* Twice the number of scores of the first n queries of a sequence: a triangle, then a band of the
 * window's width. */
INLINE double attn_area(const attn *g, double n) {
    double window = (double)g->window;
    return n <= window ? n * n : window * (2 * n - window);
}
/* The inverse: the number of queries that have this area. */
INLINE double attn_queries(const attn *g, double area) {
    double window = (double)g->window;
    return area <= window * window ? sqrt(area) : (area / window + window) / 2;
}

/* Cuts key-value head `kv_head` of sequence s into pieces. Returns their number, writes them to
 * `to` unless it is NULL, and adds the floats of their partial results to *partial. If the keys are
 * cut, the pieces of head 0 serve all heads. */
static int64_t attn_cut(const attn *g, int64_t s, int64_t kv_head, attn_piece *to,
                        int64_t *partial) {
    attn_piece p = {.query = g->q_offsets[s], .key = g->k_offsets[s], .kv_head = kv_head};
    p.n = g->q_offsets[s + 1] - p.query;
    p.m = g->k_offsets[s + 1] - p.key;
    int64_t rows = p.n * g->group, count, few = attn_splits_keys(g, &p);
    if (rows == 0 || (few && kv_head)) return 0;
    int64_t first = attn_hidden(g, &p, 0);
    double area = attn_area(g, (double)p.n);
    if (few) count = (p.m - first + ATTN_SPLIT_KEYS - 1) / ATTN_SPLIT_KEYS;
    else if (g->share == 0) count = (rows + ATTN_FORWARD_ROWS - 1) / ATTN_FORWARD_ROWS;
    else
        count =
            at_most((int64_t)ceil(g->share * area), (rows + ATTN_GRAD_LEAST - 1) / ATTN_GRAD_LEAST);
    for (int64_t c = 0; c < count; c++) {
        p.partial = *partial;
        if (few) {
            p.rows = rows;
            p.from = first + c * ATTN_SPLIT_KEYS;
            p.to = at_most(p.m, p.from + ATTN_SPLIT_KEYS);
            *partial += rows * g->kv_heads * attn_split_stride(g);
        } else {
            int64_t end = (c + 1) * ATTN_FORWARD_ROWS;
            if (g->share != 0) {
                double queries = attn_queries(g, area * (double)(c + 1) / (double)count);
                end = round_up((int64_t)((double)g->group * queries), ATTN_Q);
            }
            if (c + 1 == count || end > rows) end = rows;
            p.row += p.rows;
            p.rows = end - p.row;
            p.from = p.to = 0;
            if (p.rows) {
                p.from = attn_hidden(g, &p, p.row);
                p.to = attn_visible(g, &p, end - 1);
            }
            if (g->share != 0) *partial += 2 * (p.to - p.from) * g->width;
        }
        if (to) to[c] = p;
    }
    return count;
}

static void attn_release(attn *g) {
    pl_release(g->piece);
    pl_release(g->first);
    pl_release(g->partial);
    pl_release(g->scratch);
}

/* Allocates memory and lists the pieces. */
static pl_status attn_prepare(attn *g, int64_t rows_kept) {
    int64_t partial = 0, count = 0;
    int64_t few = attn_split_size(g), rest = attn_scratch_size(g->width, rows_kept);
    g->scratch_size = round_up(few > rest ? few : rest, 16);
    g->scratch = pl_acquire((size_t)(g->scratch_size * pl_num_threads()) * sizeof *g->scratch);
    g->first = pl_acquire((size_t)(g->sequences + 1) * sizeof *g->first);
    if (!g->scratch || !g->first) return PL_NO_MEMORY;
    for (int64_t s = 0; s < g->sequences; s++) {
        g->first[s] = count;
        for (int64_t h = 0; h < g->kv_heads; h++) count += attn_cut(g, s, h, NULL, &partial);
    }
    g->first[g->sequences] = count;
    g->piece = pl_acquire((size_t)count * sizeof *g->piece);
    g->partial = pl_acquire((size_t)partial * sizeof *g->partial);
    if (!g->piece || !g->partial) return PL_NO_MEMORY;
    partial = 0;
    attn_piece *to = g->piece;
    for (int64_t s = 0; s < g->sequences; s++)
        for (int64_t h = 0; h < g->kv_heads; h++) to += attn_cut(g, s, h, to, &partial);
    return PL_OK;
}

static attn attn_of(const pl_call *call, int64_t window) {
    attn g = {.heads = PL_DIM(call, 'H'), .kv_heads = PL_DIM(call, 'G'), .d = PL_DIM(call, 'D')};
    g.sequences = PL_DIM(call, 'S') - 1;
    g.group = g.kv_heads ? g.heads / g.kv_heads : 0;
    g.width = round_up(g.d, LANES);
    g.window = window > 0 && window < INT32_MAX ? window : INT32_MAX;
    return g;
}

/* ---- The kernels */

static void attn_forward_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    float *scratch = g->scratch + worker * g->scratch_size;
    for (int64_t i = begin; i < end; i++) {
        /* From the last rows of a sequence to the first: the longest pieces start first, so that
         * threads end together. */
        const attn_piece *p = g->piece + g->first[g->sequences] - 1 - i;
        if (attn_splits_keys(g, p)) attn_forward_keys(g, *p, scratch);
        else attn_forward_rows(g, p, scratch);
    }
}

pl_status KERNEL(attention_forward)(const pl_call *call) {
    const attention_forward_args args = attention_forward_args_of(call);
    attn g = attn_of(call, args.window);
    if (g.heads == 0) return PL_OK;
    g.q = args.q;
    g.k = args.k;
    g.v = args.v;
    g.q_offsets = args.q_offsets;
    g.k_offsets = args.k_offsets;
    g.scale = (float)args.scale;
    g.o = args.o;
    g.lse = args.lse;
    pl_status status = attn_prepare(&g, ATTN_FORWARD_ROWS);
    if (status == PL_OK) {
        pl_parallel(g.first[g.sequences], 1, attn_forward_piece, &g);
        for (int64_t s = 0; s < g.sequences; s++) {
            const attn_piece *p = g.piece + g.first[s];
            int64_t count = g.first[s + 1] - g.first[s];
            if (count && attn_splits_keys(&g, p)) attn_split_join(&g, *p, p, count);
        }
    }
    attn_release(&g);
    return status;
}

pl_status KERNEL(attention_grad)(const pl_call *call) {
    const attention_grad_args args = attention_grad_args_of(call);
    attn g = attn_of(call, args.window);
    if (g.heads == 0) return PL_OK;
    g.d_o = args.d_o;
    g.q = args.q;
    g.k = args.k;
    g.v = args.v;
    g.saved_o = args.o;
    g.saved_lse = args.lse;
    g.q_offsets = g.k_offsets = args.offsets;
    g.scale = (float)args.scale;
    g.dq = args.dq;
    g.dk = args.dk;
    g.dv = args.dv;
    double work = 0;
    for (int64_t s = 0; s < g.sequences; s++) {
        work += attn_area(&g, (double)(g.q_offsets[s + 1] - g.q_offsets[s])) * (double)g.kv_heads;
    }
    g.share = work > 0 ? ATTN_GRAD_PIECES / work : 1;
    pl_status status = attn_prepare(&g, ATTN_GRAD_ROWS);
    if (status == PL_OK) {
        pl_parallel(g.first[g.sequences], 1, attn_grad_piece, &g);
        pl_parallel(PL_DIM(call, 'N'), ATTN_K, attn_join_tokens, &g);
    }
    attn_release(&g);
    return status;
}

#endif
