/* The forward pass. A piece of rows walks over the keys that it sees, with a running maximum and
 * sum per row (online softmax, Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023), and saves
 * the log-sum-exp of each row. */
#ifndef PYLOSS_ATTENTION_FORWARD_TPL_H
#define PYLOSS_ATTENTION_FORWARD_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"
#include "amx.tpl.h"
#include "rows.tpl.h"
#include "tile.tpl.h"

/* How much larger than the running maximum scores may be in forms of tiles: exponentials up to
 * e^8 lose nothing in a float's range. */
enum { ATTN_GROWTH = 8 };

/* The maximum of `before` and n scores. Four at a time: a maximum waits for the one before it. */
INLINE vf attn_max(const float *s, int64_t n, vf before) {
    vf max[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) max[i] = vf_max(vf_load(s + (j + i) * ATTN_Q), max[i]);
    for (; j < n; j++) max[0] = vf_max(vf_load(s + j * ATTN_Q), max[0]);
    return vf_max(vf_max(max[0], max[1]), vf_max(max[2], max[3]));
}

/* Turns scores [keys][ATTN_Q] into exponentials relative to the running maximum; for tiles, into
 * pairs of these along the keys. x->factor rescales earlier sums to this maximum. */
INLINE void attn_softmax(const attn *g, const attn_scratch *x, int64_t row, int64_t columns,
                         int64_t key, int64_t all, const int form) {
    for (int64_t c = 0; c < columns; c += LANES) {
        float *s = x->s + c;
        int64_t keys = attn_panel_keys(x, row, columns, c, key, all, form);
        for (int64_t j = 0; g->softcap > 0 && j < keys; j++)
            vf_store(s + j * ATTN_Q, capped_f32(vf_load(s + j * ATTN_Q), vf_set1(g->softcap)));
        if (attn_is_masked(x, row + c, key, keys)) {
            attn_mask mask = attn_mask_at(x, row + c, key);
            for (int64_t j = 0; j < keys; j++)
                vf_store(s + j * ATTN_Q,
                         attn_masked(&mask, j, vf_load(s + j * ATTN_Q), vf_set1(-INFINITY)));
        }
        vf before = vf_load(x->max + row + c), max = attn_max(s, keys, before);
        /* A maximum little larger than the earlier one is not worth rescaling for. */
        if (is_amx(form)) max = vf_select(vf_less(before + ATTN_GROWTH, max), max, before);
        vf factor = vf_decay(before - max), sum = vf_load(x->sum + row + c) * factor;
        for (int64_t j = 0; j < keys && !is_amx(form); j++) {
            vf e = vf_decay(vf_load(s + j * ATTN_Q) - max);
            vf_store(s + j * ATTN_Q, e);
            sum += e;
        }
        for (int64_t j = 0; j < keys && is_amx(form); j += 2) {
            vf first = vf_decay(vf_load(s + j * ATTN_Q) - max),
               second = vf_decay(vf_load(s + (j + 1) * ATTN_Q) - max);
            vf_store(x->by_key + j / 2 * ATTN_Q + c, (vf)pair_of(first, second, form));
            sum += first;
            sum += second;
        }
        vf_store(x->max + row + c, max);
        vf_store(x->sum + row + c, sum);
        vf_store(x->factor + c, factor);
    }
}

/* `form` is a constant. */
INLINE void attn_forward_walk(const attn *g, const attn_piece *p, const attn_scratch *x,
                              const int form) {
    const int64_t width = g->width, pitch = g->pitch;
    const float *acc = x->acc;
    attn_set_rows(g, p, p->row, p->rows, x);
    attn_pack_rows(g, x, g->q, p->rows, g->scale, x->q);
    if (is_amx(form)) attn_transpose_pairs(g, x->q, p->rows, x->q_t, form);
    else attn_transpose_packed(g, x->q, p->rows, x->q_t);
    memset(x->acc, 0, (size_t)(round_up(p->rows, is_amx(form) ? ATTN_Q : 1) * pitch) * sizeof *acc);
    for (int64_t r = 0; r < g->most_rows; r++) {
        x->max[r] = -FLT_MAX; /* finite: a row that has seen no key yet must not give inf - inf */
        x->sum[r] = 0;
    }
    for (int64_t key = p->from; key < p->to; key += ATTN_K) {
        const attn_rows values = attn_rows_at(g, p, g->v, key);
        for (int64_t r = 0; r < p->rows; r += ATTN_Q) {
            int64_t rows = at_most(p->rows - r, ATTN_Q);
            int64_t keys = attn_keys_seen(x, r, rows, key);
            if (keys == 0) continue;
            if (is_amx(form)) {
                const int64_t columns = round_up(rows, AMX_BLOCK);
                keys = round_up(keys, AMX_BLOCK);
                attn_scores_by_tiles(g, p, x, r, columns, key, keys, g->tiles.rows[0], x->q_t, x->s,
                                     form);
                attn_softmax(g, x, r, columns, key, keys, form);
                attn_rescale(g, x, r, columns);
                attn_add_by_key(g, p, x, r, columns, key, keys, x->by_key, form);
                continue;
            }
            const int64_t columns = round_up(rows, LANES);
            attn_scores(x, r, columns, key, keys, g->d, attn_key(g, p, g->k, key),
                        g->kv_heads * g->d, x->q_t + r * width, x->s);
            attn_softmax(g, x, r, columns, key, keys, form);
            attn_by_column((attn_product){rows, width, keys, x->s, ATTN_Q, values.data,
                                          values.stride, x->acc + r * pitch, pitch, x->factor},
                           x->visible + r, key);
        }
    }
    if (is_amx(form)) attn_untranspose(g, x->acc, p->rows, x->q);
    if (is_amx(form)) acc = x->q;
    for (int64_t r = 0; r < p->rows; r++) {
        attn_prefetch(g, x, g->o, r, p->rows);
        attn_finish_row(g, x->at[r], acc + r * pitch, x->max[r], x->sum[r]);
    }
}

#endif
