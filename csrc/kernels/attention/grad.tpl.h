/* The backward pass. It recomputes the probabilities from the log-sum-exp; a tile takes five
 * products (FlashAttention-2, Dao 2023). */
#ifndef PYLOSS_ATTENTION_GRAD_TPL_H
#define PYLOSS_ATTENTION_GRAD_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"
#include "rows.tpl.h"
#include "tile.tpl.h"

/* Turns scores into probabilities, and do . v into the gradient of the scores, in place. */
static void attn_softmax_grad(const attn *g, const attn_scratch *x, int64_t row, int64_t columns,
                              int64_t key, int64_t all) {
    const vf softcap = vf_set1(g->softcap);
    for (int64_t c = 0; c < columns; c += LANES) {
        int64_t keys = attn_panel_keys(x, row, columns, c, key, all);
        vf lse = vf_load(x->max + row + c), delta = vf_load(x->sum + row + c);
        attn_mask mask = attn_mask_at(x, row + c, key);
        int masked = attn_is_masked(x, row + c, key, keys);
        for (int64_t j = 0; j < keys; j++) {
            float *s = x->s + j * ATTN_Q + c, *ds = x->ds + j * ATTN_Q + c;
            vf score = vf_load(s);
            if (g->softcap > 0) score = capped_f32(score, softcap);
            vf p = vf_decay(score - lse);
            if (masked) p = attn_masked(&mask, j, p, vf_set1(0));
            vf by_score = p * (vf_load(ds) - delta);
            if (g->softcap > 0) by_score *= cap_slope_f32(score, softcap);
            vf_store(s, p);
            vf_store(ds, by_score);
        }
    }
}

/* The rows of a piece against all keys that they see. Pieces add to the sums of dk and dv in the
 * order of their rows: tile by tile, a piece waits for the one before it. */
_Static_assert(ATTN_GRAD_ROWS <= ATTN_Q, "the rows of a piece are those of a tile");
static void attn_grad_rows(const attn *g, const attn_piece *p, const attn_scratch *x) {
    const int64_t width = g->width, pitch = g->pitch, stride = g->kv_heads * g->d, rows = p->rows;
    int32_t *done = g->done + (p - g->piece);
    attn_set_rows(g, p, p->row, rows, x);
    attn_pack_rows(g, x, g->q, rows, g->scale, x->q);
    attn_transpose_packed(g, x->q, rows, x->q_t);
    attn_pack_rows(g, x, g->d_o, rows, 1, x->d_o);
    attn_transpose_packed(g, x->d_o, rows, x->d_o_t);
    memset(x->acc, 0, (size_t)(rows * pitch) * sizeof *x->acc);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = x->at[r], i = 0;
        const float *o = g->saved_o + at * g->d, *d_o = x->d_o + r * pitch;
        vf dot = vf_set1(0);
        attn_prefetch(g, x, g->saved_o, r, rows);
        for (; i + LANES <= g->d; i += LANES) dot += vf_load(o + i) * vf_load(d_o + i);
        if (i < g->d) dot += vf_load_part(o + i, g->d - i, 0) * vf_load(d_o + i);
        x->sum[r] = vf_sum(dot);
        x->max[r] = g->saved_lse[at];
    }
    for (int64_t r = rows; r % LANES; r++) {
        x->max[r] = INFINITY; /* lanes past the rows have probability 0 */
        x->sum[r] = 0;
    }
    for (int64_t key = p->from; key < p->to; key += ATTN_K) {
        const attn_rows near = attn_rows_at(g, p, g->k, key);
        const float *k = attn_key(g, p, g->k, key), *v = attn_key(g, p, g->v, key);
        const int64_t sums = attn_near(g, p->kv_head, p->key + key);
        const int64_t columns = round_up(rows, LANES), keys = attn_keys_seen(x, 0, rows, key);
        /* The first row that sees the tile's first key, counted from the piece's first row. It is
         * negative if it lies before the piece. */
        const int64_t first = (key - (p->m - p->n) - g->ahead) * g->group - p->row;
        attn_scores(x, 0, columns, key, keys, g->d, k, stride, x->q_t, x->s);
        attn_scores(x, 0, columns, key, keys, g->d, v, stride, x->d_o_t, x->ds);
        attn_softmax_grad(g, x, 0, columns, key, keys);
        if (p->before >= 0) pl_wait_for(g->done + p->before, (int32_t)(key + ATTN_K));
        attn_by_row((attn_product){keys, width, rows, x->s, ATTN_Q, x->d_o, pitch,
                                   g->dv_sums + sums, pitch, attn_ones},
                    first, g->group);
        attn_by_row((attn_product){keys, width, rows, x->ds, ATTN_Q, x->q, pitch, g->dk_sums + sums,
                                   pitch, attn_ones},
                    first, g->group);
        pl_tell(done, (int32_t)(key + ATTN_K));
        attn_by_column((attn_product){rows, width, keys, x->ds, ATTN_Q, near.data, near.stride,
                                      x->acc, pitch, attn_ones},
                       x->visible, key);
    }
    pl_tell(done, INT32_MAX);
    for (int64_t r = 0; r < rows; r++)
        attn_trim_row(g->dq + x->at[r] * g->d, x->acc + r * pitch, g->d, g->scale);
}

static void attn_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    attn_scratch x =
        attn_scratch_at(g->scratch + worker * g->scratch_size, g->pitch, ATTN_GRAD_ROWS);
    for (const attn_piece *p = g->piece + begin; p < g->piece + end; p++) attn_grad_rows(g, p, &x);
}

/* dk and dv of tokens [begin, end) from their sums. */
static void attn_finish_tokens(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const attn *g = context;
    for (int64_t token = begin; token < end; token++)
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const int64_t from = attn_near(g, h, token), to = (token * g->kv_heads + h) * g->d;
            attn_trim_row(g->dk + to, g->dk_sums + from, g->d, 1);
            attn_trim_row(g->dv + to, g->dv_sums + from, g->d, 1);
        }
}

#endif
