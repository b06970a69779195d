/* Attention by tiles (matmul/amx.tpl.h): its operands, rounded to pairs of bfloat16, and the
 * products of its walks. Scores, softmax and sums are float32.
 *
 *   product               A, depths in pairs along its rows      B, depths in pairs along columns
 *   scores = K Q^T        rows of k (backward also of v)         q_t (do_t), [words][ATTN_Q]
 *   acc^T += V^T P        values transposed, by groups of keys   by_key: pairs along the keys
 *   acc^T += K^T dS       keys transposed (backward)             by_key
 *   dv += P^T dO          p_by_row: pairs along the rows         do, [rows / 2][pitch]
 *   dk += dS^T Q          ds_by_row                              q
 *
 * Keys and values are packed once per call, the rest once per piece or tile of scores. A block of
 * C is AMX_BLOCK x AMX_BLOCK, so widths, keys and rows are padded to multiples of it with zeros;
 * blocks that no row sees are skipped. */
#ifndef PYLOSS_ATTENTION_AMX_TPL_H
#define PYLOSS_ATTENTION_AMX_TPL_H
#include "../matmul/amx.tpl.h"
#include "../matmul/pairs.h"
#include "../pieces.h"
#include "../simd/transpose.h"
#include "rows.tpl.h"

_Static_assert(ATTN_K % AMX_BLOCK == 0 && ATTN_Q % AMX_BLOCK == 0, "tiles are whole blocks");
_Static_assert(ATTN_AMX_ROWS % ATTN_Q == 0 && ATTN_AMX_LEAST % ATTN_Q == 0, "and so are pieces");

/* ---- Keys and values */

/* Where a group of keys begins in the packed operands of a key-value head. */
INLINE int64_t attn_group_at(const attn *g, int64_t kv_head, int64_t group) {
    return (kv_head * g->tiles.groups + group) * AMX_SIDE * g->width;
}

/* Words of the pairs along d of a group's rows, rows past its keys 0. */
INLINE void attn_pack_group_rows(const attn *g, pl_act from, int64_t keys, float *to,
                                 const int form) {
    const int64_t words = g->width / 2;
    for (int64_t i = 0; i < AMX_BLOCK; i++, to += words) {
        const pl_act row = act_at(from, i * g->kv_heads * g->d);
        if (i >= keys) memset(to, 0, (size_t)words * sizeof *to);
        for (int64_t k = 0; i < keys && k < words; k += LANES)
            vf_store(to + k, (vf)act_pairs_at(row, 2 * k, g->d, form));
    }
}

/* Elements [j, j + LANES) of row i of a group; 0 past its keys and past d. */
INLINE vf attn_group_lanes(const attn *g, pl_act from, int64_t keys, int64_t i, int64_t j) {
    const int64_t rest = g->d - j;
    if (i >= keys || rest <= 0) return vf_set1(0);
    return act_load(from, i * g->kv_heads * g->d + j, at_most(rest, LANES));
}

/* The group transposed, [width][AMX_SIDE] words of pairs of keys. */
INLINE void attn_pack_group_transposed(const attn *g, pl_act from, int64_t keys, float *to,
                                       const int form) {
    for (int64_t j = 0; j < g->width; j += LANES)
        for (int64_t w = 0; w < AMX_SIDE; w += LANES) {
            float part[LANES][LANES];
            const float *source[LANES];
            vf v[LANES];
            for (int64_t l = 0; l < LANES; l++) {
                const vf first = attn_group_lanes(g, from, keys, 2 * (w + l), j),
                         second = attn_group_lanes(g, from, keys, 2 * (w + l) + 1, j);
                vf_store(part[l], (vf)pair_of(first, second, form));
                source[l] = part[l];
            }
            load_transposed(source, 0, v);
            for (int64_t l = 0; l < LANES; l++) vf_store(to + (j + l) * AMX_SIDE + w, v[l]);
        }
}

/* Packs groups [begin, end), and sets their sums to 0. */
INLINE void attn_pack_groups(const attn *g, int64_t begin, int64_t end, const int form) {
    const pl_act transposed = g->backward ? g->k : g->v;
    const size_t sums = (size_t)(AMX_BLOCK * g->pitch) * sizeof *g->dk_sums;
    for (int64_t i = begin; i < end; i++)
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const attn_group *group = g->tiles.group + i;
            const int64_t from = (group->token * g->kv_heads + h) * g->d,
                          to = attn_group_at(g, h, i), row = attn_near(g, h, i * AMX_BLOCK);
            attn_pack_group_rows(g, act_at(g->k, from), group->keys, g->tiles.rows[0] + to, form);
            attn_pack_group_transposed(g, act_at(transposed, from), group->keys,
                                       g->tiles.transposed + to, form);
            if (!g->backward) continue;
            attn_pack_group_rows(g, act_at(g->v, from), group->keys, g->tiles.rows[1] + to, form);
            memset(g->dk_sums + row, 0, sums);
            memset(g->dv_sums + row, 0, sums);
        }
}

/* ---- Rows of q and do */

/* Packed rows as words of pairs along d, transposed: [width / 2][ATTN_Q] for each ATTN_Q rows.
 * Lanes past the rows repeat the last one. */
INLINE void attn_transpose_pairs(const attn *g, const float *from, int64_t rows, float *to,
                                 const int form) {
    const int64_t words = g->width / 2;
    for (int64_t r = 0; r < round_up(rows, AMX_BLOCK); r += LANES) {
        float *t = to + r / ATTN_Q * ATTN_Q * words + r % ATTN_Q;
        for (int64_t k = 0; k < words; k += LANES) {
            float part[LANES][LANES];
            const float *source[LANES];
            vf v[LANES];
            for (int64_t l = 0; l < LANES; l++) {
                const float *row = from + at_most(r + l, rows - 1) * g->pitch + 2 * k;
                vf_store(part[l], (vf)pairs_at(row, 2 * LANES, form));
                source[l] = part[l];
            }
            load_transposed(source, 0, v);
            for (int64_t l = 0; l < LANES; l++) vf_store(t + (k + l) * ATTN_Q, v[l]);
        }
    }
}

/* Packed rows as words of pairs of rows, in place: pair i replaces row i, which has been read.
 * Rows past the last one are 0. */
INLINE void attn_pair_rows(const attn *g, float *rows, int64_t count, const int form) {
    for (int64_t r = 0; r < round_up(count, AMX_BLOCK); r += 2)
        for (int64_t j = 0; j < g->width; j += LANES) {
            const float *at = rows + r * g->pitch + j;
            const vf first = r < count ? vf_load(at) : vf_set1(0),
                     second = r + 1 < count ? vf_load(at + g->pitch) : vf_set1(0);
            vf_store(rows + r / 2 * g->pitch + j, (vf)pair_of(first, second, form));
        }
}

/* acc^T as packed rows. */
static void attn_untranspose(const attn *g, const float *acc, int64_t rows, float *to) {
    for (int64_t r = 0; r < round_up(rows, AMX_BLOCK); r += LANES)
        for (int64_t j = 0; j < g->width; j += LANES) {
            const float *source[LANES];
            vf v[LANES];
            for (int64_t l = 0; l < LANES; l++)
                source[l] = acc + r / ATTN_Q * ATTN_Q * g->width + (j + l) * ATTN_Q;
            load_transposed(source, r % ATTN_Q, v);
            for (int64_t l = 0; l < LANES; l++) vf_store(to + (r + l) * g->pitch + j, v[l]);
        }
}

/* ---- Products */

/* attn_scores; `a` is a piece's packed keys or values, t its transposed rows from `row` on. */
INLINE void attn_scores_by_tiles(const attn *g, const attn_piece *p, const attn_scratch *x,
                                 int64_t row, int64_t columns, int64_t key, int64_t keys,
                                 const float *a, const float *t, float *s, const int form) {
    const int64_t words = g->width / 2;
    a += attn_group_at(g, p->kv_head, (p->near + key) / AMX_BLOCK);
    for (int64_t c = 0; c < columns; c += AMX_BLOCK)
        amx_multiply(&(amx_product){.rows = attn_panel_keys(x, row, columns, c, key, keys, form),
                                    .cols = AMX_BLOCK,
                                    .steps = words / AMX_SIDE,
                                    .a = a,
                                    .lda = words,
                                    .a_step = AMX_SIDE,
                                    .b = t + row * words + c,
                                    .ldb = ATTN_Q,
                                    .c = s + c,
                                    .ldc = ATTN_Q},
                     form);
}

/* acc^T [width][ATTN_Q] += a tile's transposed keys or values times pairs along its keys. */
INLINE void attn_add_by_key(const attn *g, const attn_piece *p, const attn_scratch *x, int64_t row,
                            int64_t columns, int64_t key, int64_t keys, const float *by_key,
                            const int form) {
    const int64_t group = (p->near + key) / AMX_BLOCK;
    for (int64_t c = 0; c < columns; c += AMX_BLOCK)
        amx_multiply(&(amx_product){.rows = g->width,
                                    .cols = AMX_BLOCK,
                                    .steps = attn_panel_keys(x, row, columns, c, key, keys, form) /
                                             AMX_BLOCK,
                                    .a = g->tiles.transposed + attn_group_at(g, p->kv_head, group),
                                    .lda = AMX_SIDE,
                                    .a_step = AMX_SIDE * g->width,
                                    .b = by_key + c,
                                    .ldb = ATTN_Q,
                                    .c = x->acc + row * g->width + c,
                                    .ldc = ATTN_Q,
                                    .add = 1},
                     form);
}

/* sums [keys][pitch] += pairs along a piece's rows times its rows of q or do. Row `first` is the
 * first one that sees the tile's key 0, and `step` more see each next one. */
INLINE void attn_add_by_row(const attn *g, int64_t rows, int64_t keys, int64_t first, int64_t step,
                            const float *by_row, const float *b, float *sums, const int form) {
    for (int64_t i = 0; i < keys; i += AMX_BLOCK) {
        const int64_t from = at_least(first + i * step, 0) / AMX_BLOCK,
                      steps = (rows + AMX_BLOCK - 1) / AMX_BLOCK - from;
        if (steps <= 0) break;
        amx_multiply(&(amx_product){.rows = AMX_BLOCK,
                                    .cols = g->width,
                                    .steps = steps,
                                    .a = by_row + i * g->piece_rows / 2 + from * AMX_SIDE,
                                    .lda = g->piece_rows / 2,
                                    .a_step = AMX_SIDE,
                                    .b = b + from * AMX_SIDE * g->pitch,
                                    .ldb = g->pitch,
                                    .c = sums + i * g->pitch,
                                    .ldc = g->pitch,
                                    .add = 1},
                     form);
    }
}

/* Multiplies acc^T by each row's factor. */
static void attn_rescale(const attn *g, const attn_scratch *x, int64_t row, int64_t columns) {
    for (int64_t c = 0; c < columns; c += LANES) {
        const vf factor = vf_load(x->factor + c);
        /* Mostly no maximum has changed. */
        if (vf_hmax(vf_select(vf_equal(factor, vf_set1(1)), vf_set1(0), vf_set1(1))) == 0) continue;
        float *acc = x->acc + row * g->width + c;
        for (int64_t j = 0; j < g->width; j++, acc += ATTN_Q) vf_store(acc, vf_load(acc) * factor);
    }
}

#endif
