/* The backward pass. It recomputes the probabilities from the log-sum-exp; a tile takes five
 * products (FlashAttention-2, Dao 2023). */
#ifndef PYLOSS_ATTENTION_GRAD_TPL_H
#define PYLOSS_ATTENTION_GRAD_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"
#include "rows.tpl.h"
#include "tile.tpl.h"

/* Turns scores into probabilities, and do . v into the gradient of the scores, in place. */
static void attn_softmax_grad(const attn_scratch *x, int64_t row, int64_t columns, int64_t key,
                              int64_t all) {
    for (int64_t c = 0; c < columns; c += LANES) {
        int64_t keys = attn_panel_keys(x, row, columns, c, key, all);
        vf lse = vf_load(x->max + row + c), delta = vf_load(x->sum + row + c);
        attn_mask mask = attn_mask_at(x, row + c, key);
        int masked = attn_is_masked(x, row + c, key, keys);
        for (int64_t j = 0; j < keys; j++) {
            float *s = x->s + j * ATTN_Q + c, *ds = x->ds + j * ATTN_Q + c;
            vf p = vf_decay(vf_load(s) - lse);
            if (masked) p = attn_masked(&mask, j, p, vf_set1(0));
            vf_store(s, p);
            vf_store(ds, p * (vf_load(ds) - delta));
        }
    }
}

/* At most ATTN_GRAD_ROWS rows, packed, against all keys that they see. */
static void attn_grad_rows(const attn *g, const attn_piece *p, int64_t row, int64_t rows,
                           const attn_scratch *x) {
    int64_t width = g->width;
    attn_set_rows(g, p, row, rows, x);
    attn_pack_rows(g, x, g->q, rows, g->scale, x->q);
    attn_transpose_rows(g, x, g->q, rows, g->scale, x->q_t);
    attn_pack_rows(g, x, g->d_o, rows, 1, x->d_o);
    attn_transpose_rows(g, x, g->d_o, rows, 1, x->d_o_t);
    memset(x->acc, 0, (size_t)(rows * width) * sizeof *x->acc);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = x->at[r], i = 0;
        const float *o = g->saved_o + at * g->d, *d_o = x->d_o + r * width;
        vf dot = vf_set1(0);
        for (; i + LANES <= g->d; i += LANES) dot += vf_load(o + i) * vf_load(d_o + i);
        if (i < g->d) dot += vf_load_part(o + i, g->d - i, 0) * vf_load(d_o + i);
        x->sum[r] = vf_sum(dot);
        x->max[r] = g->saved_lse[at];
    }
    for (int64_t r = rows; r % LANES; r++) {
        x->max[r] = INFINITY; /* lanes past the rows have probability 0 */
        x->sum[r] = 0;
    }
    int64_t seen = x->visible[rows - 1];
    for (int64_t key = x->hidden[0]; key < seen; key += ATTN_K) {
        attn_keys near = attn_keys_at(g, p, key, at_most(seen - key, ATTN_K), x);
        for (int64_t r = 0; r < rows; r += ATTN_Q) {
            int64_t count = at_most(rows - r, ATTN_Q), columns = round_up(count, LANES),
                    at = r * width;
            int64_t keys = attn_keys_seen(x, r, count, key);
            if (keys == 0) continue;
            float *dk = g->partial + p->partial + (key - p->from) * width,
                  *dv = dk + (p->to - p->from) * width;
            /* The first row that sees the tile's first key, counted from the tile's first row. It
             * is negative if it lies before the tile. */
            int64_t first = (key - (p->m - p->n)) * g->group - (row + r);
            attn_scores(x, r, columns, key, keys, g->d, near.k, near.stride, x->q_t + at, x->s);
            attn_scores(x, r, columns, key, keys, g->d, near.v, near.stride, x->d_o_t + at, x->ds);
            attn_softmax_grad(x, r, columns, key, keys);
            attn_by_row((attn_product){keys, width, count, x->s, ATTN_Q, x->d_o + at, width, dv,
                                       width, attn_ones},
                        first, g->group);
            attn_by_row((attn_product){keys, width, count, x->ds, ATTN_Q, x->q + at, width, dk,
                                       width, attn_ones},
                        first, g->group);
            attn_by_column((attn_product){count, width, keys, x->ds, ATTN_Q, near.k, near.stride,
                                          x->acc + at, width, attn_ones},
                           x->visible + r, key);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        attn_trim_row(g->dq + x->at[r] * g->d, x->acc + r * width, g->d, g->scale);
}

static void attn_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    attn_scratch x =
        attn_scratch_at(g->scratch + worker * g->scratch_size, g->width, ATTN_GRAD_ROWS);
    for (const attn_piece *p = g->piece + begin; p < g->piece + end; p++) {
        memset(g->partial + p->partial, 0,
               (size_t)(2 * (p->to - p->from) * g->width) * sizeof *g->partial);
        for (int64_t r = 0; r < p->rows; r += ATTN_GRAD_ROWS)
            attn_grad_rows(g, p, p->row + r, at_most(p->rows - r, ATTN_GRAD_ROWS), &x);
    }
}

INLINE void attn_add_row(float *to, const float *from, int64_t d) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) vf_store(to + i, vf_load(to + i) + vf_load(from + i));
    if (i < d) vf_store_part(to + i, vf_load_part(to + i, d - i, 0) + vf_load(from + i), d - i);
}

/* dk and dv of tokens [begin, end): sums over the pieces that see them, in the pieces' order. */
static void attn_join_tokens(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const attn *g = context;
    int64_t s = 0;
    for (int64_t last = g->sequences; last - s > 1;) {
        int64_t middle = (s + last) / 2;
        if (g->q_offsets[middle] <= begin) s = middle;
        else last = middle;
    }
    int64_t stride = g->kv_heads * g->d;
    memset(g->dk + begin * stride, 0, (size_t)((end - begin) * stride) * sizeof *g->dk);
    memset(g->dv + begin * stride, 0, (size_t)((end - begin) * stride) * sizeof *g->dv);
    for (int64_t token = begin, stop; token < end; token = stop) {
        while (g->q_offsets[s + 1] <= token) s++;
        stop = at_most(end, g->q_offsets[s + 1]);
        int64_t first = token - g->q_offsets[s], last = stop - g->q_offsets[s];
        /* One piece after another: reading all pieces side by side would need too many streams
         * from memory. */
        for (const attn_piece *p = g->piece + g->first[s]; p < g->piece + g->first[s + 1]; p++)
            for (int64_t key = first > p->from ? first : p->from; key < at_most(last, p->to);
                 key++) {
                const float *part = g->partial + p->partial + (key - p->from) * g->width;
                int64_t at = (p->key + key) * stride + p->kv_head * g->d;
                attn_add_row(g->dk + at, part, g->d);
                attn_add_row(g->dv + at, part + (p->to - p->from) * g->width, g->d);
            }
    }
}

#endif
