/* Attention: causal, grouped-query, over packed sequences, without the matrix of all scores.
 *
 * The queries of the heads that share a key-value head are stacked: row r of a sequence is query r / group, head r % group, so
 * that a key-value head is one plain problem of n * group rows against m keys, and dk, dv sum over the group by themselves.
 * Tiles hold the scores transposed, [keys][rows]: what runs along the keys (maximum, sum, mask) is then vertical, lanes being
 * rows. The forward pass carries a running maximum and sum per row (online softmax, Milakov and Gimelshein 2018;
 * FlashAttention-2, Dao 2023) and saves the log-sum-exp; the backward pass recomputes the probabilities from it, with five
 * products a tile. A piece of the backward pass is a range of rows that owns its dq and adds to dk, dv of its own, which are
 * summed at the end in the order of the rows. Few rows against many keys (generation) are cut along the keys instead, all heads
 * together, and read them in place. With a window a row sees its last keys alone, and tiles before all windows of their rows
 * are not computed.
 */

#include "attention_tile.tpl.h"

enum {
    ATTN_Q = 64,             /* rows (lanes) of a tile of scores */
    ATTN_K = 64,             /* keys of a tile of scores */
    ATTN_FORWARD_ROWS = 128, /* rows of a piece of the forward pass: several tiles share packed keys */
    ATTN_GRAD_ROWS = 256,    /* rows that the backward pass keeps packed */
    ATTN_GRAD_PIECES = 48,   /* of about equal work, over all sequences and heads */
    ATTN_FEW_ROWS = 8,       /* up to here rows are cut along the keys */
    ATTN_FEW_KEYS = 32       /* keys of such a piece, at most */
};

/* Rows [row, row + rows) of a key-value head of a sequence, against its keys [from, to). */
typedef struct {
    int64_t query, key; /* where the sequence begins in q and in k */
    int64_t n, m;
    int64_t kv_head;
    int64_t row, rows, from, to;
    int64_t partial; /* where its own results begin */
} attn_piece;

typedef struct {
    int64_t heads, kv_heads, group, d;
    int64_t width; /* d rounded up to whole vectors */
    float scale;
    double share; /* pieces per area in the backward pass; 0 in the forward pass */
    const float *q, *k, *v, *saved_o, *saved_lse, *d_o;
    float *o, *lse, *dq, *dk, *dv;
    int64_t sequences;
    const int32_t *q_offsets, *k_offsets;
    int64_t window; /* how many keys a row sees at most */
    attn_piece *piece;
    int64_t *first; /* the first piece of each sequence, and the number of pieces */
    float *partial;
    float *scratch;
    int64_t scratch_size; /* per worker */
} attn;

/* Whether the rows of this sequence are cut along the keys. */
INLINE int attn_is_few(const attn *g, const attn_piece *p) {
    return g->share == 0 && p->n * g->group <= ATTN_FEW_ROWS && p->m > ATTN_K;
}

static const float attn_ones[ATTN_Q] = {[0 ... ATTN_Q - 1] = 1};
_Static_assert(ATTN_K <= ATTN_Q, "attn_ones serves keys and rows");

/* ---- Rows in and out */

/* What a worker keeps at hand. Rows are packed as [rows][width], and transposed (_t) as [rows / ATTN_Q][width][ATTN_Q]. */
typedef struct {
    float *k, *v;  /* [ATTN_K][width] */
    float *s, *ds; /* [ATTN_K][ATTN_Q] */
    float *q, *q_t, *d_o, *d_o_t, *acc;
    float *max, *sum; /* per row; the log-sum-exp and o . do in the backward pass */
    float *factor;
    int32_t *hidden, *visible; /* a row sees keys [hidden, visible); visible is negative when it is that far from seeing any */
} attn_scratch;

static int64_t attn_scratch_size(int64_t width, int64_t rows) {
    return (2 * ATTN_K + 5 * rows) * width + 2 * ATTN_K * ATTN_Q + 5 * rows;
}
INLINE float *attn_take(float **p, int64_t n) {
    float *taken = *p;
    *p += n;
    return taken;
}
static attn_scratch attn_scratch_at(float *p, int64_t width, int64_t rows) {
    attn_scratch x;
    float **packed[] = {&x.q, &x.q_t, &x.d_o, &x.d_o_t, &x.acc};
    x.k = attn_take(&p, ATTN_K * width);
    x.v = attn_take(&p, ATTN_K * width);
    x.s = attn_take(&p, ATTN_K * ATTN_Q);
    x.ds = attn_take(&p, ATTN_K * ATTN_Q);
    for (int i = 0; i < 5; i++) *packed[i] = attn_take(&p, rows * width);
    x.max = attn_take(&p, rows);
    x.sum = attn_take(&p, rows);
    x.factor = attn_take(&p, rows);
    x.hidden = (int32_t *)attn_take(&p, rows);
    x.visible = (int32_t *)p;
    return x;
}

/* Where row `row` of a piece stands among the heads of all tokens: in q, o and do times d, in lse as it is. */
INLINE int64_t attn_at(const attn *g, const attn_piece *p, int64_t row) {
    return (p->query + row / g->group) * g->heads + p->kv_head * g->group + row % g->group;
}
/* to[0, width) = factor from[0, d), padded with 0. */
INLINE void attn_pad_row(float *to, const float *from, int64_t d, int64_t width, float factor) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) vf_store(to + i, vf_load(from + i) * factor);
    if (i < width) vf_store(to + i, vf_load_part(from + i, d - i, 0) * factor);
}
/* to[0, d) = factor from[0, d). */
INLINE void attn_trim_row(float *to, const float *from, int64_t d, float factor) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) vf_store(to + i, vf_load(from + i) * factor);
    if (i < d) vf_store_part(to + i, vf_load(from + i) * factor, d - i);
}

/* A tile's worth of packed rows, transposed to [width][ATTN_Q]; lanes past `count` up to a whole vector are 0. */
static void attn_transpose(const float *rows, int64_t count, int64_t width, float *t) {
    for (int64_t r = 0; r < count; r += LANES)
        for (int64_t j = 0; j < width; j += LANES) {
            static const float zeros[LANES];
            const float *source[LANES];
            for (int64_t l = 0; l < LANES; l++) source[l] = r + l < count ? rows + (r + l) * width + j : zeros;
            vf v[LANES];
            load_transposed(source, 0, v);
            for (int64_t l = 0; l < LANES; l++) vf_store(t + (j + l) * ATTN_Q + r, v[l]);
        }
}

/* Packs rows [row, row + rows) of q or do, as rows and transposed. */
static void attn_pack_rows(const attn *g, const attn_piece *p, const float *from, int64_t row, int64_t rows, float factor,
                           float *to, float *t) {
    for (int64_t r = 0; r < rows; r++)
        attn_pad_row(to + r * g->width, from + attn_at(g, p, row + r) * g->d, g->d, g->width, factor);
    for (int64_t r = 0; r < rows; r += ATTN_Q)
        attn_transpose(to + r * g->width, at_most(rows - r, ATTN_Q), g->width, t + r * g->width);
}

static void attn_pack_keys(const attn *g, const attn_piece *p, int64_t key, int64_t keys, const attn_scratch *x) {
    for (int64_t j = 0; j < keys; j++) {
        int64_t at = ((p->key + key + j) * g->kv_heads + p->kv_head) * g->d;
        attn_pad_row(x->k + j * g->width, g->k + at, g->d, g->width, 1);
        attn_pad_row(x->v + j * g->width, g->v + at, g->d, g->width, 1);
    }
}

INLINE int64_t attn_visible(const attn *g, const attn_piece *p, int64_t row) { return p->m - p->n + row / g->group + 1; }
INLINE int64_t attn_hidden(const attn *g, const attn_piece *p, int64_t row) {
    int64_t hidden = attn_visible(g, p, row) - g->window;
    return hidden > 0 ? hidden : 0;
}

/* For rows and the lanes past them in their last vector. */
static void attn_set_visible(const attn *g, const attn_piece *p, int64_t row, int64_t rows, const attn_scratch *x) {
    for (int64_t r = 0; r < round_up(rows, LANES); r++) {
        int64_t i = row + at_most(r, rows - 1);
        x->visible[r] = (int32_t)attn_visible(g, p, i);
        x->hidden[r] = (int32_t)attn_hidden(g, p, i);
    }
}

/* The keys of a tile, from `key`, that any of its rows sees; none when the count is 0. */
INLINE int64_t attn_keys(const attn_scratch *x, int64_t row, int64_t rows, int64_t key) {
    int64_t keys = at_most(x->visible[row + rows - 1] - key, ATTN_K);
    return keys < 0 || x->hidden[row] >= key + ATTN_K ? 0 : keys;
}

/* Whether a vector of rows does not see all keys [key, key + keys), and which of them each lane sees. */
INLINE int attn_is_masked(const attn_scratch *x, int64_t row, int64_t key, int64_t keys) {
    return x->visible[row] < key + keys || x->hidden[row + LANES - 1] > key;
}
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

/* ---- Forward */

/* Scores [keys][ATTN_Q] to probabilities relative to the running maximum, and the factor that brings earlier sums to it. */
static void attn_softmax(const attn_scratch *x, int64_t row, int64_t columns, int64_t key, int64_t keys) {
    for (int64_t c = 0; c < columns; c += LANES) {
        float *s = x->s + c;
        if (attn_is_masked(x, row + c, key, keys)) {
            attn_mask mask = attn_mask_at(x, row + c, key);
            for (int64_t j = 0; j < keys; j++)
                vf_store(s + j * ATTN_Q, attn_masked(&mask, j, vf_load(s + j * ATTN_Q), vf_set1(-INFINITY)));
        }
        vf before = vf_load(x->max + row + c), max = before;
        for (int64_t j = 0; j < keys; j++) max = vf_max(vf_load(s + j * ATTN_Q), max);
        vf factor = vf_exp(before - max), sum = vf_load(x->sum + row + c) * factor;
        for (int64_t j = 0; j < keys; j++) {
            vf e = vf_exp(vf_load(s + j * ATTN_Q) - max);
            vf_store(s + j * ATTN_Q, e);
            sum += e;
        }
        vf_store(x->max + row + c, max);
        vf_store(x->sum + row + c, sum);
        vf_store(x->factor + c, factor);
    }
}

/* o and lse of a row from its unnormalised sum of values. */
static void attn_finish_row(const attn *g, const attn_piece *p, int64_t row, const float *acc, float max, float sum) {
    int64_t at = attn_at(g, p, row);
    attn_trim_row(g->o + at * g->d, acc, g->d, sum == 0 ? 0 : 1 / sum);
    g->lse[at] = sum == 0 ? -INFINITY : max + logf(sum);
}

static void attn_forward_rows(const attn *g, const attn_piece *p, float *scratch) {
    int64_t width = g->width;
    attn_scratch x = attn_scratch_at(scratch, width, ATTN_FORWARD_ROWS);
    attn_pack_rows(g, p, g->q, p->row, p->rows, g->scale, x.q, x.q_t);
    attn_set_visible(g, p, p->row, p->rows, &x);
    memset(x.acc, 0, (size_t)(p->rows * width) * sizeof *x.acc);
    for (int64_t r = 0; r < ATTN_FORWARD_ROWS; r++) {
        x.max[r] = -FLT_MAX; /* finite: a row that has seen no key yet must not give inf - inf */
        x.sum[r] = 0;
    }
    for (int64_t key = p->from; key < p->to; key += ATTN_K) {
        attn_pack_keys(g, p, key, at_most(p->to - key, ATTN_K), &x);
        for (int64_t r = 0; r < p->rows; r += ATTN_Q) {
            int64_t rows = at_most(p->rows - r, ATTN_Q), columns = round_up(rows, LANES);
            int64_t keys = attn_keys(&x, r, rows, key);
            if (keys == 0) continue;
            attn_by_row((attn_product){keys, columns, g->d, x.k, width, x.q_t + r * width, ATTN_Q, x.s, ATTN_Q, NULL});
            attn_softmax(&x, r, columns, key, keys);
            attn_by_column((attn_product){rows, width, keys, x.s, ATTN_Q, x.v, width, x.acc + r * width, width, x.factor});
        }
    }
    for (int64_t r = 0; r < p->rows; r++) attn_finish_row(g, p, p->row + r, x.acc + r * width, x.max[r], x.sum[r]);
}

/* ---- Forward, few rows: a piece gives each row of each head [width] sums of values, a maximum and a sum of exponentials. */

INLINE int64_t attn_few_stride(const attn *g) { return g->width + 2; }
static int64_t attn_few_size(const attn *g) {
    return g->kv_heads * ATTN_FEW_ROWS * (ATTN_FEW_KEYS + g->width) + LANES * g->width;
}

/* Reads a word of every line in order: the heads read parts that lie apart, which the processor would not fetch ahead. */
INLINE void attn_touch(const float *p, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) (void)*(const volatile float *)(p + i);
}

/* Scores of one row against LANES keys `stride` apart, of which `keys` are there; their dot products end in a transposition. */
static void attn_few_scores(const float *q, const float *k, int64_t stride, int64_t d, int64_t keys, float *s) {
    vf v[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) v[l] = vf_set1(0);
    const float *row[LANES];
    for (int l = 0; l < LANES; l++) row[l] = k + at_most(l, keys - 1) * stride;
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        vf x = vf_load(q + i);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) v[l] += x * vf_load(row[l] + i);
    }
    if (i < d)
        for (int l = 0; l < LANES; l++) v[l] += vf_load(q + i) * vf_load_part(row[l] + i, d - i, 0);
    float sums[LANES][LANES];
    for (int l = 0; l < LANES; l++) {
        vf_store(sums[l], v[l]);
        row[l] = sums[l];
    }
    load_transposed(row, 0, v);
#pragma GCC unroll 4
    for (int h = LANES / 2; h; h /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < h; l++) v[l] += v[l + h];
    vf_store(s, v[0]);
}

/* Scores of a row, of which it sees some, to exponentials; their maximum and sum go to last[0] and last[1]. */
static void attn_few_softmax(const attn *g, const attn_piece *p, int64_t r, float *s, float *last) {
    int64_t seen = attn_visible(g, p, r) - p->from, hidden = attn_hidden(g, p, r) - p->from;
    int64_t whole = round_up(p->to - p->from, LANES);
    for (int64_t j = seen < 0 ? 0 : seen; j < whole; j++) s[j] = -INFINITY;
    for (int64_t j = 0; j < at_most(hidden, whole); j++) s[j] = -INFINITY;
    vf max = vf_set1(-FLT_MAX), sum = vf_set1(0);
    for (int64_t j = 0; j < whole; j += LANES) max = vf_max(vf_load(s + j), max);
    last[0] = vf_hmax(max);
    for (int64_t j = 0; j < whole; j += LANES) {
        vf e = vf_exp(vf_load(s + j) - last[0]);
        vf_store(s + j, e);
        sum += e;
    }
    last[1] = vf_sum(sum);
}

/* A piece of the keys, for all heads: row i of the piece is row i % rows of head i / rows. */
static void attn_forward_keys(const attn *g, attn_piece p, float *scratch) {
    int64_t width = g->width, stride = g->kv_heads * g->d, out_stride = attn_few_stride(g);
    int64_t keys = p.to - p.from, all = p.rows * g->kv_heads, at = (p.key + p.from) * stride;
    float *s = scratch, *q = s + all * ATTN_FEW_KEYS, *packed = q + all * width, *out = g->partial + p.partial;
    const float *k = g->k + at, *v = g->v + at;
    for (p.kv_head = 0; p.kv_head < g->kv_heads; p.kv_head++)
        for (int64_t r = 0; r < p.rows; r++)
            attn_pad_row(q + (p.kv_head * p.rows + r) * width, g->q + attn_at(g, &p, r) * g->d, g->d, width, g->scale);
    for (int64_t j = 0; j < keys; j += LANES) {
        attn_touch(k + j * stride, at_most(keys - j, LANES) * stride);
        for (int64_t i = 0; i < all; i++)
            attn_few_scores(q + i * width, k + j * stride + i / p.rows * g->d, stride, g->d, keys - j, s + i * ATTN_FEW_KEYS + j);
    }
    for (int64_t i = 0; i < all; i++) attn_few_softmax(g, &p, i % p.rows, s + i * ATTN_FEW_KEYS, out + i * out_stride + width);
    for (int64_t j = 0; j < keys; j += LANES) {
        int64_t n = at_most(keys - j, LANES);
        attn_touch(v + j * stride, n * stride);
        for (int64_t h = 0; h < g->kv_heads; h++) {
            attn_product t = {p.rows,
                              width,
                              n,
                              s + h * p.rows * ATTN_FEW_KEYS + j,
                              ATTN_FEW_KEYS,
                              v + j * stride + h * g->d,
                              stride,
                              out + h * p.rows * out_stride,
                              out_stride,
                              j ? attn_ones : NULL};
            if (width != g->d) {
                for (int64_t l = 0; l < n; l++) attn_pad_row(packed + l * width, t.b + l * stride, g->d, width, 1);
                t.b = packed;
                t.ldb = width;
            }
            attn_by_row(t);
        }
    }
}

static void attn_forward_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    float *scratch = g->scratch + worker * g->scratch_size;
    for (int64_t i = begin; i < end; i++) {
        /* From the last rows of a sequence to the first: what is long goes first, so that threads end together. */
        const attn_piece *p = g->piece + g->first[g->sequences] - 1 - i;
        if (attn_is_few(g, p)) attn_forward_keys(g, *p, scratch);
        else attn_forward_rows(g, p, scratch);
    }
}

/* The pieces of a sequence, joined into the rows of its heads. */
static void attn_few_join(const attn *g, attn_piece p, const attn_piece *piece, int64_t count) {
    for (int64_t i = 0; i < p.rows * g->kv_heads; i++) {
        float *acc = g->scratch, max = -FLT_MAX, sum = 0;
        int64_t at = i * attn_few_stride(g);
        memset(acc, 0, (size_t)g->width * sizeof *acc);
        for (int64_t c = 0; c < count; c++) max = fmaxf(max, g->partial[piece[c].partial + at + g->width]);
        for (int64_t c = 0; c < count; c++) {
            const float *part = g->partial + piece[c].partial + at;
            float factor = expf(part[g->width] - max);
            for (int64_t l = 0; l < g->width; l += LANES) vf_store(acc + l, vf_load(acc + l) + vf_load(part + l) * factor);
            sum += part[g->width + 1] * factor;
        }
        p.kv_head = i / p.rows;
        attn_finish_row(g, &p, i % p.rows, acc, max, sum);
    }
}

/* ---- Backward */

/* Scores and do . v to probabilities and the gradient of the scores, in place. */
static void attn_softmax_grad(const attn_scratch *x, int64_t row, int64_t columns, int64_t key, int64_t keys) {
    for (int64_t c = 0; c < columns; c += LANES) {
        vf lse = vf_load(x->max + row + c), delta = vf_load(x->sum + row + c);
        attn_mask mask = attn_mask_at(x, row + c, key);
        int masked = attn_is_masked(x, row + c, key, keys);
        for (int64_t j = 0; j < keys; j++) {
            float *s = x->s + j * ATTN_Q + c, *ds = x->ds + j * ATTN_Q + c;
            vf p = vf_exp(vf_load(s) - lse);
            if (masked) p = attn_masked(&mask, j, p, vf_set1(0));
            vf_store(s, p);
            vf_store(ds, p * (vf_load(ds) - delta));
        }
    }
}

/* One batch of packed rows against all the keys that they see. */
static void attn_grad_rows(const attn *g, const attn_piece *p, int64_t row, int64_t rows, const attn_scratch *x) {
    int64_t width = g->width;
    attn_pack_rows(g, p, g->q, row, rows, g->scale, x->q, x->q_t);
    attn_pack_rows(g, p, g->d_o, row, rows, 1, x->d_o, x->d_o_t);
    attn_set_visible(g, p, row, rows, x);
    memset(x->acc, 0, (size_t)(rows * width) * sizeof *x->acc);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = attn_at(g, p, row + r), i = 0;
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
        attn_pack_keys(g, p, key, at_most(seen - key, ATTN_K), x);
        for (int64_t r = 0; r < rows; r += ATTN_Q) {
            int64_t count = at_most(rows - r, ATTN_Q), columns = round_up(count, LANES), at = r * width;
            int64_t keys = attn_keys(x, r, count, key);
            if (keys == 0) continue;
            float *dk = g->partial + p->partial + (key - p->from) * width, *dv = dk + (p->to - p->from) * width;
            attn_by_row((attn_product){keys, columns, g->d, x->k, width, x->q_t + at, ATTN_Q, x->s, ATTN_Q, NULL});
            attn_by_row((attn_product){keys, columns, g->d, x->v, width, x->d_o_t + at, ATTN_Q, x->ds, ATTN_Q, NULL});
            attn_softmax_grad(x, r, columns, key, keys);
            attn_by_row((attn_product){keys, width, count, x->s, ATTN_Q, x->d_o + at, width, dv, width, attn_ones});
            attn_by_row((attn_product){keys, width, count, x->ds, ATTN_Q, x->q + at, width, dk, width, attn_ones});
            attn_by_column((attn_product){count, width, keys, x->ds, ATTN_Q, x->k, width, x->acc + at, width, attn_ones});
        }
    }
    for (int64_t r = 0; r < rows; r++) attn_trim_row(g->dq + attn_at(g, p, row + r) * g->d, x->acc + r * width, g->d, g->scale);
}

static void attn_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    attn_scratch x = attn_scratch_at(g->scratch + worker * g->scratch_size, g->width, ATTN_GRAD_ROWS);
    for (const attn_piece *p = g->piece + begin; p < g->piece + end; p++) {
        memset(g->partial + p->partial, 0, (size_t)(2 * (p->to - p->from) * g->width) * sizeof *g->partial);
        for (int64_t r = 0; r < p->rows; r += ATTN_GRAD_ROWS)
            attn_grad_rows(g, p, p->row + r, at_most(p->rows - r, ATTN_GRAD_ROWS), &x);
    }
}

/* dk and dv of tokens [begin, end): the sum over the pieces that see them. */
static void attn_join_tokens(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const attn *g = context;
    int64_t s = 0;
    for (int64_t last = g->sequences; last - s > 1;) {
        int64_t middle = (s + last) / 2;
        if (g->q_offsets[middle] <= begin) s = middle;
        else last = middle;
    }
    for (int64_t token = begin; token < end; token++) {
        while (g->q_offsets[s + 1] <= token) s++;
        int64_t key = token - g->q_offsets[s], count = (g->first[s + 1] - g->first[s]) / g->kv_heads;
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const attn_piece *p = g->piece + g->first[s] + h * count;
            for (int64_t i = 0; i < g->d; i += LANES) {
                vf dk = vf_set1(0), dv = vf_set1(0);
                for (int64_t c = 0; c < count; c++) {
                    if (key < p[c].from || key >= p[c].to) continue;
                    const float *part = g->partial + p[c].partial + (key - p[c].from) * g->width + i;
                    dk += vf_load(part);
                    dv += vf_load(part + (p[c].to - p[c].from) * g->width);
                }
                int64_t at = (token * g->kv_heads + h) * g->d + i, lanes = at_most(g->d - i, LANES);
                vf_store_part(g->dk + at, dk, lanes);
                vf_store_part(g->dv + at, dv, lanes);
            }
        }
    }
}

/* ---- Cutting the work, and the two kernels */

/* Twice the scores that the first n queries of a sequence compute: a triangle, and a band past the window. */
INLINE double attn_area(const attn *g, double n) {
    double window = (double)g->window;
    return n <= window ? n * n : window * (2 * n - window);
}
/* How many queries have that area. */
INLINE double attn_queries(const attn *g, double area) {
    double window = (double)g->window;
    return area <= window * window ? sqrt(area) : (area / window + window) / 2;
}

/* The pieces of one key-value head of sequence s (of all with the first one, for few rows), written where `to` is not NULL.
 * Returns their number, and adds what their own results take to `partial`. */
static int64_t attn_cut(const attn *g, int64_t s, int64_t kv_head, attn_piece *to, int64_t *partial) {
    attn_piece p = {.query = g->q_offsets[s], .key = g->k_offsets[s], .kv_head = kv_head};
    p.n = g->q_offsets[s + 1] - p.query;
    p.m = g->k_offsets[s + 1] - p.key;
    int64_t rows = p.n * g->group, count, few = attn_is_few(g, &p);
    if (rows == 0 || (few && kv_head)) return 0;
    int64_t first = attn_hidden(g, &p, 0);
    double area = attn_area(g, (double)p.n);
    if (few) count = (p.m - first + ATTN_FEW_KEYS - 1) / ATTN_FEW_KEYS;
    else if (g->share == 0) count = (rows + ATTN_FORWARD_ROWS - 1) / ATTN_FORWARD_ROWS;
    else count = at_most((int64_t)ceil(g->share * area), (rows + ATTN_Q - 1) / ATTN_Q);
    for (int64_t c = 0; c < count; c++) {
        p.partial = *partial;
        if (few) {
            p.rows = rows;
            p.from = first + c * ATTN_FEW_KEYS;
            p.to = at_most(p.m, p.from + ATTN_FEW_KEYS);
            *partial += rows * g->kv_heads * attn_few_stride(g);
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

/* Lists the pieces and takes the memory. */
static pl_status attn_prepare(attn *g, int64_t rows_kept) {
    int64_t partial = 0, count = 0;
    int64_t few = attn_few_size(g), rest = attn_scratch_size(g->width, rows_kept);
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

static pl_status attention_forward(const pl_call *call) {
    attn g = attn_of(call, call->arg[6].i);
    if (g.heads == 0) return PL_OK;
    g.q = call->arg[0].in;
    g.k = call->arg[1].in;
    g.v = call->arg[2].in;
    g.q_offsets = call->arg[3].in;
    g.k_offsets = call->arg[4].in;
    g.scale = (float)call->arg[5].f;
    g.o = call->arg[7].out;
    g.lse = call->arg[8].out;
    pl_status status = attn_prepare(&g, ATTN_FORWARD_ROWS);
    if (status == PL_OK) {
        pl_parallel(g.first[g.sequences], 1, attn_forward_piece, &g);
        for (int64_t s = 0; s < g.sequences; s++) {
            const attn_piece *p = g.piece + g.first[s];
            int64_t count = g.first[s + 1] - g.first[s];
            if (count && attn_is_few(&g, p)) attn_few_join(&g, *p, p, count);
        }
    }
    attn_release(&g);
    return status;
}

static pl_status attention_grad(const pl_call *call) {
    attn g = attn_of(call, call->arg[8].i);
    if (g.heads == 0) return PL_OK;
    g.d_o = call->arg[0].in;
    g.q = call->arg[1].in;
    g.k = call->arg[2].in;
    g.v = call->arg[3].in;
    g.saved_o = call->arg[4].in;
    g.saved_lse = call->arg[5].in;
    g.q_offsets = g.k_offsets = call->arg[6].in;
    g.scale = (float)call->arg[7].f;
    g.dq = call->arg[9].out;
    g.dk = call->arg[10].out;
    g.dv = call->arg[11].out;
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
