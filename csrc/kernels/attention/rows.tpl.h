/* Shared by all of attention: its arguments, a piece of its work, packing rows for tiles and
 * writing them back, and which keys a row sees. */
#ifndef PYLOSS_ATTENTION_ROWS_TPL_H
#define PYLOSS_ATTENTION_ROWS_TPL_H
#include "../matmul/amx.tpl.h"
#include "../pieces.h"
#include "../rowloss/f32.h"
#include "../simd/act.h"
#include "../simd/transpose.h"
#include "../simd/vec.h"
#include "tile.tpl.h"

#include "../../softcap.h"
#include "../rowloss/untyped.h"

enum {
    ATTN_Q = 64,             /* rows (lanes) of a tile of scores */
    ATTN_K = 64,             /* keys of a tile of scores */
    ATTN_FORWARD_ROWS = 128, /* most rows of a piece: its tiles share the keys in the cache */
    ATTN_GRAD_ROWS = 64,     /* most rows of a piece of the backward pass, */
    ATTN_GRAD_LEAST = 32,    /* and fewest: with fewer, dk and dv would be loaded too often */
    ATTN_AMX_ROWS = 256,     /* most rows of a piece in a form of tiles, */
    ATTN_AMX_LEAST = 64,     /* and fewest */
    ATTN_SPLIT_ROWS = 8,     /* most rows of a sequence that is cut along the keys */
    ATTN_SPLIT_KEYS = 32     /* most keys of a piece that is cut along the keys */
};

/* Rows [row, row + rows) of a key-value head of a sequence, against its keys [from, to). */
typedef struct {
    int64_t query, key; /* the sequence's first row of q, and of k */
    int64_t n, m;       /* its number of queries, and of keys */
    int64_t kv_head;
    int64_t row, rows, from, to;
    int64_t near;    /* the sequence's first row in attn.near, dk_sums and dv_sums */
    int64_t partial; /* forward, cut along the keys: offset of its results in attn.partial */
    int64_t before;  /* backward: the piece of the rows before, or -1 */
} attn_piece;

/* What a form of tiles has in place of `near` (amx.tpl.h). Sequences begin at whole groups of
 * AMX_BLOCK keys; rows past a sequence's end are 0. */
typedef struct {
    int64_t token, keys;
} attn_group;
typedef struct {
    attn_group *group;
    int64_t groups;
    float *rows[2];    /* of keys, and (backward) of values: [kv_heads][near_rows][width / 2] */
    float *transposed; /* keys (backward) or values: [kv_heads][groups][width][AMX_SIDE] */
} attn_tiles;

typedef struct {
    int64_t heads, kv_heads, group, d;
    int form;             /* of products: FLOATS or a form of tiles (amx.tpl.h) */
    int64_t width;        /* d rounded up to whole vectors, or to blocks of tiles */
    int64_t pitch;        /* between packed rows: not a large power of two, see attn_of */
    float scale, softcap; /* softcap 0: none */
    int backward;
    int fresh; /* backward: the first piece of a head sees all keys, and writes dk and dv */
    int64_t piece_rows, most_rows; /* of a piece; most_rows by the direction and the form alone */
    pl_act q, k, v, saved_o, d_o, o, dq, dk, dv; /* floats unless the form is one of tiles */
    const float *saved_lse;
    float *lse;
    int64_t sequences;
    const int32_t *q_offsets, *k_offsets;
    int64_t window; /* most keys up to its own place that a row sees */
    int64_t ahead;  /* keys after its place that it sees too */
    attn_piece *piece;
    int64_t *first; /* the first piece of each sequence, then the number of pieces */
    float *partial; /* forward, cut along the keys */
    /* Keys (backward) or values (forward) where products cannot read them in place, else NULL; sums
     * of dk and dv (backward). All are [kv_heads][near_rows][pitch]. */
    float *near, *dk_sums, *dv_sums;
    int64_t tokens, near_rows;
    attn_tiles tiles;
    int32_t *done; /* backward: a piece has added to dk and dv of its keys before this one */
    float *scratch;
    int64_t scratch_size; /* floats per worker */
} attn;

/* Whether the piece's sequence is cut along the keys: few rows against many keys, or against any if
 * others are multiplied by tiles. Keys before the window do not count: a cache may have dropped
 * them. */
INLINE int attn_splits_keys(const attn *g, const attn_piece *p) {
    return !g->backward && p->n * g->group <= ATTN_SPLIT_ROWS &&
           at_most(p->m, g->window + p->n - 1) > (is_amx(g->form) ? 0 : ATTN_K);
}

static const float attn_ones[ATTN_Q] = {[0 ... ATTN_Q - 1] = 1};
_Static_assert(ATTN_K <= ATTN_Q, "attn_ones serves keys and rows");

/* ---- Rows in and out */

/* A worker's memory. Packed rows are [rows][pitch], transposed ones (_t)
 * [rows / ATTN_Q][width][ATTN_Q]. In forms of tiles acc is transposed, too, and q_t, d_o_t and in
 * the backward pass q and d_o become words of pairs (amx.tpl.h). */
typedef struct {
    float *s, *ds; /* [ATTN_K][ATTN_Q] */
    /* Tiles: probabilities and the gradient of scores, as pairs along the keys
     * [rows / ATTN_Q][ATTN_K / 2][ATTN_Q] and along the rows [ATTN_K][piece_rows / 2]. */
    float *by_key, *p_by_row, *ds_by_row;
    float *q, *q_t, *d_o, *d_o_t, *acc;
    float *max, *sum; /* per row; in the backward pass the log-sum-exp and o . do */
    float *factor;
    int64_t *at;               /* a row's index among the heads of all tokens */
    int32_t *hidden, *visible; /* a row sees keys [hidden, visible); visible <= 0: none */
} attn_scratch;

static int64_t attn_scratch_size(const attn *g) {
    return 5 * g->most_rows * g->pitch + 2 * ATTN_K * ATTN_Q + 7 * g->most_rows +
           (is_amx(g->form) ? 3 * ATTN_K * g->most_rows / 2 : 0);
}
INLINE float *attn_take(float **p, int64_t n) {
    float *taken = *p;
    *p += n;
    return taken;
}
static attn_scratch attn_scratch_at(const attn *g, int worker) {
    const int64_t rows = g->most_rows;
    float *p = g->scratch + worker * g->scratch_size;
    attn_scratch x = {0};
    float **packed[] = {&x.q, &x.q_t, &x.d_o, &x.d_o_t, &x.acc},
          **tiles[] = {&x.by_key, &x.p_by_row, &x.ds_by_row};
    x.s = attn_take(&p, ATTN_K * ATTN_Q);
    x.ds = attn_take(&p, ATTN_K * ATTN_Q);
    for (int i = 0; i < 3 && is_amx(g->form); i++) *tiles[i] = attn_take(&p, ATTN_K * rows / 2);
    for (int i = 0; i < 5; i++) *packed[i] = attn_take(&p, rows * g->pitch);
    x.max = attn_take(&p, rows);
    x.sum = attn_take(&p, rows);
    x.factor = attn_take(&p, rows);
    x.at = (int64_t *)(void *)attn_take(&p, 2 * rows);
    x.hidden = (int32_t *)attn_take(&p, rows);
    x.visible = (int32_t *)p;
    return x;
}

/* The index of row `row` of a piece among the heads of all tokens: its row of q, o and do, its
 * element of lse. */
INLINE int64_t attn_at(const attn *g, const attn_piece *p, int64_t row) {
    return (p->query + row / g->group) * g->heads + p->kv_head * g->group + row % g->group;
}
/* to[0, width) = factor from[0, d), padded with 0. */
INLINE void attn_pad_row(float *to, pl_act from, int64_t d, int64_t width, float factor) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) vf_store(to + i, act_load(from, i, LANES) * factor);
    if (i < d) vf_store(to + i, act_load(from, i, d - i) * factor);
    for (i = round_up(d, LANES); i < width; i += LANES) vf_store(to + i, vf_set1(0));
}
/* to[0, d) = factor from[0, d). */
INLINE void attn_trim_row(pl_act to, const float *from, int64_t d, float factor) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) act_store(to, i, vf_load(from + i) * factor, LANES);
    if (i < d) act_store(to, i, vf_load(from + i) * factor, d - i);
}

/* Sets x->at, x->visible and x->hidden of rows [row, row + rows). The lanes past them in the last
 * vector or block of tiles repeat the last row. */
static void attn_set_rows(const attn *g, const attn_piece *p, int64_t row, int64_t rows,
                          const attn_scratch *x) {
    int64_t query = row / g->group, head = row % g->group;
    for (int64_t r = 0; r < round_up(rows, AMX_BLOCK); r++) {
        int64_t place = p->m - p->n + query + 1, hidden = place - g->window;
        x->at[r] = (p->query + query) * g->heads + p->kv_head * g->group + head;
        x->visible[r] = (int32_t)at_most(place + g->ahead, p->m);
        x->hidden[r] = hidden > 0 ? (int32_t)hidden : 0;
        if (r >= rows - 1 || ++head < g->group) continue;
        head = 0;
        query++;
    }
}

/* Prefetches row r of q, o or do, or rather the row that is read AHEAD rows later: rows lie apart,
 * and the hardware would not prefetch them. */
INLINE void attn_prefetch(const attn *g, const attn_scratch *x, pl_act from, int64_t r,
                          int64_t rows) {
    enum { AHEAD = 4 };
    const pl_act later = act_at(from, x->at[at_most(r + AHEAD, rows - 1)] * g->d);
    for (int64_t i = 0; i < g->d; i += 16) __builtin_prefetch(act_at(later, i).data);
}

/* Packs factor times the rows of q or do. */
static void attn_pack_rows(const attn *g, const attn_scratch *x, pl_act from, int64_t rows,
                           float factor, float *to) {
    for (int64_t r = 0; r < rows; r++) {
        attn_prefetch(g, x, from, r, rows);
        attn_pad_row(to + r * g->pitch, act_at(from, x->at[r] * g->d), g->d, g->width, factor);
    }
}

/* Transposes packed rows; lanes past the rows repeat the last one. */
static void attn_transpose_packed(const attn *g, const float *from, int64_t rows, float *to) {
    for (int64_t r = 0; r < rows; r += LANES) {
        float *t = to + r / ATTN_Q * ATTN_Q * g->width + r % ATTN_Q;
        const float *source[LANES];
        for (int64_t l = 0; l < LANES; l++) source[l] = from + at_most(r + l, rows - 1) * g->pitch;
        for (int64_t j = 0; j < g->width; j += LANES) {
            vf v[LANES];
            load_transposed(source, j, v);
            for (int64_t l = 0; l < LANES; l++) vf_store(t + (j + l) * ATTN_Q, v[l]);
        }
    }
}

/* Row `key` of a piece's keys or values, which are floats. */
INLINE const float *attn_key(const attn *g, const attn_piece *p, pl_act from, int64_t key) {
    return (const float *)from.data + ((p->key + key) * g->kv_heads + p->kv_head) * g->d;
}
/* Where a row of a key-value head begins in near, dk_sums and dv_sums. */
INLINE int64_t attn_near(const attn *g, int64_t kv_head, int64_t row) {
    return (kv_head * g->near_rows + row) * g->pitch;
}

/* The right operand of a product: rows of `width` floats. */
typedef struct {
    const float *data;
    int64_t stride;
} attn_rows;

/* Keys or values from `key` on as a right operand. */
INLINE attn_rows attn_rows_at(const attn *g, const attn_piece *p, pl_act from, int64_t key) {
    if (g->near) return (attn_rows){g->near + attn_near(g, p->kv_head, p->near + key), g->pitch};
    return (attn_rows){attn_key(g, p, from, key), g->kv_heads * g->d};
}

INLINE int64_t attn_visible(const attn *g, const attn_piece *p, int64_t row) {
    return at_most(p->m - p->n + row / g->group + 1 + g->ahead, p->m);
}
INLINE int64_t attn_hidden(const attn *g, const attn_piece *p, int64_t row) {
    return at_least(p->m - p->n + row / g->group + 1 - g->window, 0);
}

/* How many keys of a tile, from `key` on, its rows see together; 0 if no row sees any. */
INLINE int64_t attn_keys_seen(const attn_scratch *x, int64_t row, int64_t rows, int64_t key) {
    int64_t keys = at_most(x->visible[row + rows - 1] - key, ATTN_K);
    return keys < 0 || x->hidden[row] >= key + ATTN_K ? 0 : keys;
}

/* How many of a tile's `keys` keys the panel of column c needs, in whole register tiles, or in
 * whole blocks of tiles if the form has these. Scores past what the panel's rows see are neither
 * computed nor read. */
INLINE int64_t attn_panel_keys(const attn_scratch *x, int64_t row, int64_t columns, int64_t c,
                               int64_t key, int64_t keys, const int form) {
    const int64_t panel = is_amx(form) ? AMX_BLOCK : ATTN_PANEL,
                  rows = is_amx(form) ? AMX_BLOCK : ATTN_ROWS;
    int64_t end = at_most(round_up(c - c % panel + panel, rows), columns);
    int64_t seen = x->visible[row + end - 1] - key;
    return seen <= 0 ? 0 : at_most(round_up(seen, rows), keys);
}

/* s [keys][ATTN_Q] = a t: the products of a tile's keys or values `a` with its transposed rows `t`
 * of q or do. */
static void attn_scores(const attn_scratch *x, int64_t row, int64_t columns, int64_t key,
                        int64_t keys, int64_t d, const float *a, int64_t stride, const float *t,
                        float *s) {
    for (int64_t c = 0; c < columns; c += ATTN_PANEL) {
        int64_t n = at_most(columns - c, ATTN_PANEL),
                needed = attn_panel_keys(x, row, columns, c, key, keys, FLOATS);
        attn_by_row((attn_product){needed, n, d, a, stride, t + c, ATTN_Q, s + c, ATTN_Q, NULL}, 0,
                    0);
    }
}

/* Whether some row of a vector does not see all keys [key, key + keys). */
INLINE int attn_is_masked(const attn_scratch *x, int64_t row, int64_t key, int64_t keys) {
    return x->visible[row] < key + keys || x->hidden[row + LANES - 1] > key;
}
/* The keys [hidden, visible) that each lane sees, counted from a tile's first key. */
typedef struct {
    vi hidden, visible;
} attn_mask;
INLINE attn_mask attn_mask_at(const attn_scratch *x, int64_t row, int64_t key) {
    attn_mask mask;
    memcpy(&mask.hidden, x->hidden + row, sizeof mask.hidden);
    memcpy(&mask.visible, x->visible + row, sizeof mask.visible);
    mask.hidden -= (int32_t)key;
    mask.visible -= (int32_t)key;
    return mask;
}
INLINE vf attn_masked(const attn_mask *mask, int64_t j, vf seen, vf unseen) {
    vi at = vi_set1((int32_t)j);
    return vf_select(vi_less(at, mask->visible) & ~vi_less(at, mask->hidden), seen, unseen);
}

/* Writes o and lse of the row with index `at`, from its unnormalized sum of values. */
static void attn_finish_row(const attn *g, int64_t at, const float *acc, float max, float sum) {
    attn_trim_row(act_at(g->o, at * g->d), acc, g->d, sum == 0 ? 0 : 1 / sum);
    g->lse[at] = sum == 0 ? -INFINITY : max + logf(sum);
}

#endif
