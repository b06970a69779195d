/* The forward pass. A piece of rows walks over the keys that it sees, with a running maximum and
 * sum per row (online softmax, Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023), and saves
 * the log-sum-exp of each row. */
#ifndef PYLOSS_ATTENTION_FORWARD_TPL_H
#define PYLOSS_ATTENTION_FORWARD_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"
#include "rows.tpl.h"
#include "tile.tpl.h"

/* Turns scores [keys][ATTN_Q] into exponentials relative to the running maximum. x->factor rescales
 * earlier sums to this maximum. */
static void attn_softmax(const attn *g, const attn_scratch *x, int64_t row, int64_t columns,
                         int64_t key, int64_t all) {
    for (int64_t c = 0; c < columns; c += LANES) {
        float *s = x->s + c;
        int64_t keys = attn_panel_keys(x, row, columns, c, key, all);
        for (int64_t j = 0; g->softcap > 0 && j < keys; j++)
            vf_store(s + j * ATTN_Q, capped_f32(vf_load(s + j * ATTN_Q), vf_set1(g->softcap)));
        if (attn_is_masked(x, row + c, key, keys)) {
            attn_mask mask = attn_mask_at(x, row + c, key);
            for (int64_t j = 0; j < keys; j++)
                vf_store(s + j * ATTN_Q,
                         attn_masked(&mask, j, vf_load(s + j * ATTN_Q), vf_set1(-INFINITY)));
        }
        vf before = vf_load(x->max + row + c), max = before;
        for (int64_t j = 0; j < keys; j++) max = vf_max(vf_load(s + j * ATTN_Q), max);
        vf factor = vf_decay(before - max), sum = vf_load(x->sum + row + c) * factor;
        for (int64_t j = 0; j < keys; j++) {
            vf e = vf_decay(vf_load(s + j * ATTN_Q) - max);
            vf_store(s + j * ATTN_Q, e);
            sum += e;
        }
        vf_store(x->max + row + c, max);
        vf_store(x->sum + row + c, sum);
        vf_store(x->factor + c, factor);
    }
}

static void attn_forward_rows(const attn *g, const attn_piece *p, float *scratch) {
    int64_t width = g->width, pitch = g->pitch;
    attn_scratch x = attn_scratch_at(scratch, pitch, ATTN_FORWARD_ROWS);
    attn_set_rows(g, p, p->row, p->rows, &x);
    attn_pack_rows(g, &x, g->q, p->rows, g->scale, x.q);
    attn_transpose_packed(g, x.q, p->rows, x.q_t);
    memset(x.acc, 0, (size_t)(p->rows * pitch) * sizeof *x.acc);
    for (int64_t r = 0; r < ATTN_FORWARD_ROWS; r++) {
        x.max[r] = -FLT_MAX; /* finite: a row that has seen no key yet must not give inf - inf */
        x.sum[r] = 0;
    }
    for (int64_t key = p->from; key < p->to; key += ATTN_K) {
        const attn_rows values = attn_rows_at(g, p, g->v, key);
        for (int64_t r = 0; r < p->rows; r += ATTN_Q) {
            int64_t rows = at_most(p->rows - r, ATTN_Q), columns = round_up(rows, LANES);
            int64_t keys = attn_keys_seen(&x, r, rows, key);
            if (keys == 0) continue;
            attn_scores(&x, r, columns, key, keys, g->d, attn_key(g, p, g->k, key),
                        g->kv_heads * g->d, x.q_t + r * width, x.s);
            attn_softmax(g, &x, r, columns, key, keys);
            attn_by_column((attn_product){rows, width, keys, x.s, ATTN_Q, values.data,
                                          values.stride, x.acc + r * pitch, pitch, x.factor},
                           x.visible + r, key);
        }
    }
    for (int64_t r = 0; r < p->rows; r++) {
        attn_prefetch(g, &x, g->o, r, p->rows);
        attn_finish_row(g, x.at[r], x.acc + r * pitch, x.max[r], x.sum[r]);
    }
}

#endif
