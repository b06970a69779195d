/* The backward pass. It recomputes the probabilities from the log-sum-exp; a tile takes five
 * products (FlashAttention-2, Dao 2023). */
#ifndef PYLOSS_ATTENTION_GRAD_TPL_H
#define PYLOSS_ATTENTION_GRAD_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"
#include "amx.tpl.h"
#include "rows.tpl.h"
#include "tile.tpl.h"

/* What the rows of a vector need for their probabilities and the gradient of their scores. */
typedef struct {
    vf lse, delta, softcap;
    attn_mask mask;
    int masked;
} attn_lanes;
INLINE attn_lanes attn_lanes_at(const attn *g, const attn_scratch *x, int64_t row, int64_t key,
                                int64_t keys) {
    return (attn_lanes){.lse = vf_load(x->max + row),
                        .delta = vf_load(x->sum + row),
                        .softcap = vf_set1(g->softcap),
                        .mask = attn_mask_at(x, row, key),
                        .masked = attn_is_masked(x, row, key, keys)};
}
/* A score's probability; do . v becomes the gradient of the score. */
INLINE vf attn_probability(const attn *g, const attn_lanes *lanes, int64_t j, vf score,
                           vf *gradient) {
    if (g->softcap > 0) score = capped_f32(score, lanes->softcap);
    vf p = vf_decay(score - lanes->lse);
    if (lanes->masked) p = attn_masked(&lanes->mask, j, p, vf_set1(0));
    *gradient = p * (*gradient - lanes->delta);
    if (g->softcap > 0) *gradient *= cap_slope_f32(score, lanes->softcap);
    return p;
}

/* Turns scores into probabilities, and do . v into the gradient of the scores, in place. */
INLINE void attn_softmax_grad(const attn *g, const attn_scratch *x, int64_t row, int64_t columns,
                              int64_t key, int64_t all) {
    for (int64_t c = 0; c < columns; c += LANES) {
        int64_t keys = attn_panel_keys(x, row, columns, c, key, all, FLOATS);
        const attn_lanes lanes = attn_lanes_at(g, x, row + c, key, keys);
        for (int64_t j = 0; j < keys; j++) {
            float *s = x->s + j * ATTN_Q + c, *ds = x->ds + j * ATTN_Q + c;
            vf gradient = vf_load(ds);
            vf_store(s, attn_probability(g, &lanes, j, vf_load(s), &gradient));
            vf_store(ds, gradient);
        }
    }
}

/* The same as pairs: of the probabilities along the rows, of the gradient along rows and keys. */
INLINE void attn_pairs_grad(const attn *g, const attn_scratch *x, int64_t row, int64_t columns,
                            int64_t key, int64_t all, const int form) {
    const int64_t stride = g->piece_rows / 2;
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        int64_t keys = attn_panel_keys(x, row, columns, c, key, all, form);
        const attn_lanes lanes[2] = {attn_lanes_at(g, x, row + c, key, keys),
                                     attn_lanes_at(g, x, row + c + LANES, key, keys)};
        for (int64_t j = 0; j < keys; j += 2) {
            float *by_key = x->by_key + row * ATTN_K / 2 + j / 2 * ATTN_Q + c;
            vf p[2][2], gradient[2][2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
                for (int l = 0; l < 2; l++) {
                    const int64_t at = (j + i) * ATTN_Q + c + l * LANES;
                    gradient[i][l] = vf_load(x->ds + at);
                    p[i][l] =
                        attn_probability(g, &lanes[l], j + i, vf_load(x->s + at), &gradient[i][l]);
                }
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const int64_t by_row = (j + i) * stride + (row + c) / 2;
                vf_store(x->p_by_row + by_row, (vf)pairs_of_two(p[i][0], p[i][1], form));
                vf_store(x->ds_by_row + by_row,
                         (vf)pairs_of_two(gradient[i][0], gradient[i][1], form));
                vf_store(by_key + i * LANES, (vf)pair_of(gradient[0][i], gradient[1][i], form));
            }
        }
    }
}

/* Packs a piece's rows of q and do, and the log-sum-exp and o . do of each. */
INLINE void attn_begin_grad(const attn *g, const attn_piece *p, const attn_scratch *x,
                            const int form) {
    const int64_t pitch = g->pitch, rows = p->rows;
    attn_set_rows(g, p, p->row, rows, x);
    attn_pack_rows(g, x, g->q, rows, g->scale, x->q);
    attn_pack_rows(g, x, g->d_o, rows, 1, x->d_o);
    memset(x->acc, 0, (size_t)(round_up(rows, is_amx(form) ? ATTN_Q : 1) * pitch) * sizeof *x->acc);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = x->at[r], i = 0;
        const pl_act o = act_at(g->saved_o, at * g->d);
        const float *d_o = x->d_o + r * pitch;
        vf dot = vf_set1(0);
        attn_prefetch(g, x, g->saved_o, r, rows);
        for (; i + LANES <= g->d; i += LANES) dot += act_load(o, i, LANES) * vf_load(d_o + i);
        if (i < g->d) dot += act_load(o, i, g->d - i) * vf_load(d_o + i);
        x->sum[r] = vf_sum(dot);
        x->max[r] = g->saved_lse[at];
    }
    for (int64_t r = rows; r % AMX_BLOCK; r++) {
        x->max[r] = INFINITY; /* lanes past the rows have probability 0 */
        x->sum[r] = 0;
    }
    if (is_amx(form)) {
        attn_transpose_pairs(g, x->q, rows, x->q_t, form);
        attn_transpose_pairs(g, x->d_o, rows, x->d_o_t, form);
        attn_pair_rows(g, x->q, rows, form);
        attn_pair_rows(g, x->d_o, rows, form);
    } else {
        attn_transpose_packed(g, x->q, rows, x->q_t);
        attn_transpose_packed(g, x->d_o, rows, x->d_o_t);
    }
}

/* The rows of a piece against all keys that they see. Pieces add to the sums of dk and dv in the
 * order of their rows: tile by tile, a piece waits for the one before it. `form` is a constant. */
_Static_assert(ATTN_GRAD_ROWS <= ATTN_Q, "the rows of a piece of floats are those of a tile");
INLINE void attn_grad_walk(const attn *g, const attn_piece *p, const attn_scratch *x,
                           const int form) {
    const int64_t width = g->width, pitch = g->pitch, stride = g->kv_heads * g->d, rows = p->rows;
    int32_t *done = g->done + (p - g->piece);
    float *acc = x->acc;
    attn_begin_grad(g, p, x, form);
    for (int64_t key = p->from; key < p->to; key += ATTN_K) {
        const int64_t at = attn_near(g, p->kv_head, p->near + key);
        float *dk = g->dk_sums + at, *dv = g->dv_sums + at;
        int64_t keys = attn_keys_seen(x, 0, rows, key);
        /* The first row that sees the tile's first key, counted from the piece's first row. It is
         * negative if it lies before the piece. */
        const int64_t first = (key - (p->m - p->n) - g->ahead) * g->group - p->row;
        if (is_amx(form)) {
            keys = round_up(keys, AMX_BLOCK);
            for (int64_t r = 0; r < rows; r += ATTN_Q) {
                const int64_t columns = round_up(at_most(rows - r, ATTN_Q), AMX_BLOCK);
                attn_scores_by_tiles(g, p, x, r, columns, key, keys, g->tiles.rows[0], x->q_t, x->s,
                                     form);
                attn_scores_by_tiles(g, p, x, r, columns, key, keys, g->tiles.rows[1], x->d_o_t,
                                     x->ds, form);
                attn_pairs_grad(g, x, r, columns, key, keys, form);
                attn_add_by_key(g, p, x, r, columns, key, keys, x->by_key + r * ATTN_K / 2, form);
            }
        } else {
            const float *k = attn_key(g, p, g->k, key), *v = attn_key(g, p, g->v, key);
            const int64_t columns = round_up(rows, LANES);
            attn_scores(x, 0, columns, key, keys, g->d, k, stride, x->q_t, x->s);
            attn_scores(x, 0, columns, key, keys, g->d, v, stride, x->d_o_t, x->ds);
            attn_softmax_grad(g, x, 0, columns, key, keys);
        }
        if (p->before >= 0) pl_wait_for(g->done + p->before, (int32_t)(key + ATTN_K));
        if (is_amx(form)) {
            attn_add_by_row(g, rows, keys, first, g->group, x->p_by_row, x->d_o, dv, form);
            attn_add_by_row(g, rows, keys, first, g->group, x->ds_by_row, x->q, dk, form);
            pl_tell(done, (int32_t)(key + ATTN_K));
            continue;
        }
        const float *factor = g->fresh && p->before < 0 ? NULL : attn_ones;
        attn_by_row(
            (attn_product){keys, width, rows, x->s, ATTN_Q, x->d_o, pitch, dv, pitch, factor},
            first, g->group);
        attn_by_row(
            (attn_product){keys, width, rows, x->ds, ATTN_Q, x->q, pitch, dk, pitch, factor}, first,
            g->group);
        pl_tell(done, (int32_t)(key + ATTN_K));
        const attn_rows near = attn_rows_at(g, p, g->k, key);
        attn_by_column((attn_product){rows, width, keys, x->ds, ATTN_Q, near.data, near.stride, acc,
                                      pitch, attn_ones},
                       x->visible, key);
    }
    pl_tell(done, INT32_MAX);
    if (is_amx(form)) attn_untranspose(g, x->acc, rows, acc = x->q);
    for (int64_t r = 0; r < rows; r++)
        attn_trim_row(act_at(g->dq, x->at[r] * g->d), acc + r * pitch, g->d, g->scale);
}

/* dk and dv of a token from the sums in row `row`. */
INLINE void attn_finish_token(const attn *g, int64_t token, int64_t row) {
    for (int64_t h = 0; h < g->kv_heads; h++) {
        const int64_t from = attn_near(g, h, row), to = (token * g->kv_heads + h) * g->d;
        attn_trim_row(act_at(g->dk, to), g->dk_sums + from, g->d, 1);
        attn_trim_row(act_at(g->dv, to), g->dv_sums + from, g->d, 1);
    }
}
static void attn_finish_tokens(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    for (int64_t token = begin; token < end; token++) attn_finish_token(context, token, token);
}
static void attn_finish_groups(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const attn *g = context;
    for (int64_t i = begin; i < end; i++)
        for (int64_t key = 0; key < g->tiles.group[i].keys; key++)
            attn_finish_token(g, g->tiles.group[i].token + key, i * AMX_BLOCK + key);
}

#endif
