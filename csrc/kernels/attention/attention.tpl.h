/* Attention: grouped-query, over packed sequences, without the matrix of all scores; causal in the
 * picture.
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
 * into ranges of keys instead. A piece of the backward pass is a range of rows, too. It writes its
 * rows of dq, and adds to the sums of dk and dv after the piece of the rows before it. */
#ifndef PYLOSS_ATTENTION_TPL_H
#define PYLOSS_ATTENTION_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../widening.h"
#include "amx.tpl.h"
#include "forward.tpl.h"
#include "grad.tpl.h"
#include "rows.tpl.h"
#include "split_kv.tpl.h"

/* ---- The forms */

/* One function for each form, so that only those of processors with bfloat16 instructions contain
 * these. */
typedef void (*attn_walk)(const attn *g, const attn_piece *p, const attn_scratch *x);
#define WALKS(form, name) \
    static NOINLINE void attn_forward_##name(const attn *g, const attn_piece *p, \
                                             const attn_scratch *x) { \
        attn_forward_walk(g, p, x, form); \
    } \
    static NOINLINE void attn_grad_##name(const attn *g, const attn_piece *p, \
                                          const attn_scratch *x) { \
        attn_grad_walk(g, p, x, form); \
    }
#define GROUP_PACKER(form, name) \
    static NOINLINE void attn_pack_##name(const void *g, int64_t begin, int64_t end, \
                                          int worker UNUSED) { \
        attn_pack_groups(g, begin, end, form); \
    }
WALKS(FLOATS, floats)
WALKS(AMX_EMULATED, emulated)
GROUP_PACKER(AMX_EMULATED, emulated)
#ifdef AMX_COMPILED
WALKS(AMX, amx)
GROUP_PACKER(AMX, amx)
#define ATTN_AMX(name) name##_amx
#else
#define ATTN_AMX(name) NULL
#endif
static const attn_walk forward_walks[] = {[FLOATS] = attn_forward_floats,
                                          [AMX_EMULATED] = attn_forward_emulated,
                                          [AMX] = ATTN_AMX(attn_forward)};
static const attn_walk grad_walks[] = {
    [FLOATS] = attn_grad_floats, [AMX_EMULATED] = attn_grad_emulated, [AMX] = ATTN_AMX(attn_grad)};
static const pl_range_fn group_packers[] = {
    [AMX_EMULATED] = attn_pack_emulated, [AMX] = ATTN_AMX(attn_pack)};
#undef WALKS
#undef GROUP_PACKER
#undef ATTN_AMX

/* ---- Cutting the work */

/* Sequence s, without pieces. */
static attn_piece attn_sequence(const attn *g, int64_t s) {
    attn_piece p = {.query = g->q_offsets[s], .key = g->k_offsets[s], .before = -1};
    p.n = g->q_offsets[s + 1] - p.query;
    p.m = g->k_offsets[s + 1] - p.key;
    return p;
}

/* How many pieces a sequence has: ranges of rows for each key-value head, or of keys for all. */
static int64_t attn_count(const attn *g, const attn_piece *p) {
    if (p->n == 0) return 0;
    if (attn_splits_keys(g, p))
        return (p->m - attn_hidden(g, p, 0) + ATTN_SPLIT_KEYS - 1) / ATTN_SPLIT_KEYS;
    return (p->n * g->group + g->piece_rows - 1) / g->piece_rows;
}

/* Piece c of a sequence and head. */
static attn_piece attn_cut(const attn *g, attn_piece p, int64_t kv_head, int64_t c) {
    p.kv_head = kv_head;
    if (attn_splits_keys(g, &p)) {
        p.rows = p.n * g->group;
        p.from = attn_hidden(g, &p, 0) + c * ATTN_SPLIT_KEYS;
        p.to = at_most(p.m, p.from + ATTN_SPLIT_KEYS);
    } else {
        p.row = c * g->piece_rows;
        p.rows = at_most(p.n * g->group - p.row, g->piece_rows);
        p.from = attn_hidden(g, &p, p.row) / ATTN_K * ATTN_K;
        p.to = attn_visible(g, &p, p.row + p.rows - 1);
    }
    return p;
}

/* How many rows of near, dk_sums and dv_sums are a sequence's. */
static int64_t attn_near_rows(const attn *g, const attn_piece *p) {
    if (!is_amx(g->form)) return p->m;
    return attn_splits_keys(g, p) ? 0 : round_up(p->m, AMX_BLOCK);
}

/* Lists the groups of keys that tiles read. */
static void attn_list_groups(attn *g) {
    attn_group *group = g->tiles.group;
    for (int64_t s = 0; s < g->sequences; s++) {
        const attn_piece p = attn_sequence(g, s);
        for (int64_t key = 0; key < attn_near_rows(g, &p); key += AMX_BLOCK)
            *group++ = (attn_group){p.key + key, at_most(p.m - key, AMX_BLOCK)};
    }
}

/* Lists the pieces: of one sequence after the other. */
static void attn_list_forward(attn *g) {
    int64_t partial = 0, count = 0, near = 0;
    for (int64_t s = 0; s < g->sequences; s++) {
        attn_piece p = attn_sequence(g, s);
        const int64_t pieces = attn_count(g, &p), few = attn_splits_keys(g, &p);
        p.near = near;
        near += attn_near_rows(g, &p);
        g->first[s] = count;
        for (int64_t h = 0; h < (few ? 1 : g->kv_heads); h++)
            for (int64_t c = 0; c < pieces; c++) {
                g->piece[count] = attn_cut(g, p, h, c);
                g->piece[count++].partial = partial;
                if (few) partial += p.n * g->heads * attn_split_stride(g);
            }
    }
    g->first[g->sequences] = count;
}

/* Lists the pieces: of one sequence after the other; the first rows of all heads, then the next
 * ones, so that a piece mostly finds the one before it done. */
static void attn_list_backward(attn *g) {
    int64_t count = 0, near = 0;
    for (int64_t s = 0; s < g->sequences; s++) {
        attn_piece p = attn_sequence(g, s);
        const int64_t pieces = attn_count(g, &p);
        p.near = near;
        near += attn_near_rows(g, &p);
        g->first[s] = count;
        for (int64_t c = 0; c < pieces; c++)
            for (int64_t h = 0; h < g->kv_heads; h++, count++) {
                g->piece[count] = attn_cut(g, p, h, c);
                g->piece[count].before = c ? count - g->kv_heads : -1;
                g->done[count] = 0;
            }
    }
    g->first[g->sequences] = count;
}

static void attn_release(attn *g) {
    void *buffers[] = {g->piece, g->first,       g->partial,       g->near,   g->dk_sums,
                       g->done,  g->tiles.group, g->tiles.rows[0], g->scratch};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) pl_release(buffers[i]);
}

/* Packs the rows of tokens [begin, end) that products cannot read in place, and sets sums to 0. */
static void attn_prepare_tokens(const void *context, int64_t begin, int64_t end,
                                int worker UNUSED) {
    const attn *g = context;
    const pl_act from = g->backward ? g->k : g->v;
    for (int64_t token = begin; token < end; token++)
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const int64_t at = attn_near(g, h, token);
            if (g->near)
                attn_pad_row(g->near + at, act_at(from, (token * g->kv_heads + h) * g->d), g->d,
                             g->width, 1);
            if (!g->backward || g->fresh) continue;
            memset(g->dk_sums + at, 0, (size_t)g->width * sizeof *g->dk_sums);
            memset(g->dv_sums + at, 0, (size_t)g->width * sizeof *g->dv_sums);
        }
}

/* Runs `tokens` over all tokens, or `groups` over groups of keys if products are by tiles. */
static void attn_each_token(const attn *g, pl_range_fn tokens, pl_range_fn groups) {
    const int64_t size = g->kv_heads * g->width;
    if (is_amx(g->form)) pl_parallel(g->tiles.groups, grain_of(AMX_BLOCK * size), groups, g);
    else pl_parallel(g->tokens, grain_of(size), tokens, g);
}

/* Allocates what only forms of tiles need. */
static int attn_acquire_tiles(attn *g) {
    attn_tiles *t = &g->tiles;
    const int64_t size = g->kv_heads * g->near_rows * g->width / 2;
    t->groups = g->near_rows / AMX_BLOCK;
    t->group = pl_acquire((size_t)t->groups * sizeof *t->group);
    t->rows[0] = pl_acquire((size_t)((g->backward ? 3 : 2) * size) * sizeof **t->rows);
    if (!t->group || !t->rows[0]) return 0;
    t->transposed = t->rows[0] + size;
    t->rows[1] = t->transposed + size;
    attn_list_groups(g);
    return 1;
}

/* Allocates memory and lists the pieces. */
static pl_status attn_prepare(attn *g) {
    int64_t partial = 0, count = 0, whole = 0, queries = 0;
    const int tiles = is_amx(g->form);
    g->fresh = g->backward && !tiles && g->window == INT32_MAX && g->ahead == INT32_MAX;
    for (int64_t s = 0; s < g->sequences; s++) {
        const attn_piece p = attn_sequence(g, s);
        if (p.n == 0 && p.m > 0) g->fresh = 0; /* keys without a piece */
        if (!attn_splits_keys(g, &p)) queries += p.n;
        if (tiles) g->near_rows += attn_near_rows(g, &p);
    }
    if (!tiles) g->near_rows = g->tokens;
    /* Pieces enough for many threads, of some rows each. Half a panel of the widest vectors costs a
     * few percent of the time; too few pieces for the threads cost more. */
    const int64_t least = tiles ? ATTN_AMX_LEAST : g->backward ? ATTN_GRAD_LEAST : 16;
    g->most_rows = tiles ? ATTN_AMX_ROWS : g->backward ? ATTN_GRAD_ROWS : ATTN_FORWARD_ROWS;
    const int64_t wanted = tiles ? WANTED_PIECES / 2 : WANTED_PIECES;
    g->piece_rows =
        at_least(at_most(queries * g->heads / wanted / least * least, g->most_rows), least);
    for (int64_t s = 0; s < g->sequences; s++) {
        const attn_piece p = attn_sequence(g, s);
        const int64_t pieces = attn_count(g, &p);
        if (attn_splits_keys(g, &p)) partial += pieces * p.n * g->heads * attn_split_stride(g);
        else whole += pieces;
        count += attn_splits_keys(g, &p) ? pieces : pieces * g->kv_heads;
    }
    /* Vectors may not reach past a head; rows a large power of two apart map to few lines of the
     * first cache. */
    const int packed = !tiles && whole && (g->width != g->d || g->kv_heads * g->d % 256 == 0);
    const size_t rows = (size_t)(g->kv_heads * g->near_rows * g->pitch) * sizeof(float);
    int64_t few = attn_split_size(g), rest = attn_scratch_size(g);
    g->scratch_size = round_up(few > rest ? few : rest, 16);
    g->scratch = pl_acquire((size_t)(g->scratch_size * pl_num_threads()) * sizeof *g->scratch);
    g->first = pl_acquire((size_t)(g->sequences + 1) * sizeof *g->first);
    g->piece = pl_acquire((size_t)count * sizeof *g->piece);
    g->partial = pl_acquire((size_t)partial * sizeof *g->partial);
    if (packed) g->near = pl_acquire(rows);
    if (g->backward) {
        g->dk_sums = pl_acquire(2 * rows);
        g->dv_sums = g->dk_sums + rows / sizeof *g->dv_sums;
        g->done = pl_acquire((size_t)count * sizeof *g->done);
    }
    if (!g->scratch || !g->first || !g->piece || !g->partial || (packed && !g->near) ||
        (g->backward && !(g->dk_sums && g->done)) || (tiles && !attn_acquire_tiles(g)))
        return PL_NO_MEMORY;
    if (g->backward) attn_list_backward(g);
    else attn_list_forward(g);
    if (packed || (g->backward && !g->fresh) || tiles)
        attn_each_token(g, attn_prepare_tokens, group_packers[g->form]);
    return PL_OK;
}

static attn attn_of(const pl_call *call, int64_t window, int64_t ahead) {
    attn g = {.heads = PL_DIM(call, 'H'), .kv_heads = PL_DIM(call, 'G'), .d = PL_DIM(call, 'D')};
    g.sequences = PL_DIM(call, 'S') - 1;
    g.group = g.kv_heads ? g.heads / g.kv_heads : 0;
    g.form = amx_form();
    g.width = round_up(g.d, is_amx(g.form) ? AMX_BLOCK : LANES);
    g.pitch = g.width % 128 ? g.width : g.width + 16;
    g.window = window > 0 && window < INT32_MAX ? window : INT32_MAX;
    g.ahead = at_least(at_most(ahead, INT32_MAX), 0);
    return g;
}

/* Whether tiles read and write all that is bfloat16: no sequence is cut along the keys. */
static int attn_takes_narrow(const attn *g) {
    for (int64_t s = 0; s < g->sequences; s++) {
        const attn_piece p = attn_sequence(g, s);
        if (p.n && attn_splits_keys(g, &p)) return 0;
    }
    return is_amx(g->form);
}

/* ---- The kernels */

static void attn_forward_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    const attn_scratch x = attn_scratch_at(g, worker);
    amx_begin(g->form);
    for (int64_t i = begin; i < end; i++) {
        /* From the last rows of a sequence to the first: the longest pieces start first, so that
         * threads end together. */
        const attn_piece *p = g->piece + g->first[g->sequences] - 1 - i;
        if (attn_splits_keys(g, p)) attn_forward_keys(g, *p, g->scratch + worker * g->scratch_size);
        else forward_walks[g->form](g, p, &x);
    }
    amx_end(g->form);
}

static void attn_grad_piece(const void *context, int64_t begin, int64_t end, int worker) {
    const attn *g = context;
    const attn_scratch x = attn_scratch_at(g, worker);
    amx_begin(g->form);
    for (const attn_piece *p = g->piece + begin; p < g->piece + end; p++)
        grad_walks[g->form](g, p, &x);
    amx_end(g->form);
}

pl_status KERNEL(attention_forward)(const pl_call *call) {
    const attention_forward_args args = attention_forward_args_of(call);
    attn g = attn_of(call, args.window, args.ahead);
    if (g.heads == 0) return PL_OK;
    g.q = args.q;
    g.k = args.k;
    g.v = args.v;
    g.q_offsets = args.q_offsets;
    g.k_offsets = args.k_offsets;
    g.tokens = PL_DIM(call, 'M');
    g.scale = (float)args.scale;
    g.softcap = (float)args.softcap;
    g.o = args.o;
    g.lse = args.lse;
    const int64_t queries = PL_DIM(call, 'N') * g.heads * g.d, keys = g.tokens * g.kv_heads * g.d;
    widening floats[] = {{.act = &g.q, .n = queries, .reads = 1},
                         {.act = &g.k, .n = keys, .reads = 1},
                         {.act = &g.v, .n = keys, .reads = 1},
                         {.act = &g.o, .n = queries, .writes = 1}};
    const int widened = attn_takes_narrow(&g) ? 0 : 4;
    pl_status status = widen(floats, widened);
    if (status == PL_OK) status = attn_prepare(&g);
    if (status == PL_OK) {
        pl_parallel(g.first[g.sequences], 1, attn_forward_piece, &g);
        for (int64_t s = 0; s < g.sequences; s++) {
            const attn_piece *p = g.piece + g.first[s];
            int64_t count = g.first[s + 1] - g.first[s];
            if (count && attn_splits_keys(&g, p)) attn_split_join(&g, *p, p, count);
        }
    }
    attn_release(&g);
    return narrow_again(floats, widened, status);
}

pl_status KERNEL(attention_grad)(const pl_call *call) {
    const attention_grad_args args = attention_grad_args_of(call);
    attn g = attn_of(call, args.window, args.ahead);
    if (g.heads == 0) return PL_OK;
    g.d_o = args.d_o;
    g.q = args.q;
    g.k = args.k;
    g.v = args.v;
    g.saved_o = args.o;
    g.saved_lse = args.lse;
    g.q_offsets = args.q_offsets;
    g.k_offsets = args.k_offsets;
    g.scale = (float)args.scale;
    g.softcap = (float)args.softcap;
    g.dq = args.dq;
    g.dk = args.dk;
    g.dv = args.dv;
    g.tokens = PL_DIM(call, 'M');
    g.backward = 1;
    const int64_t queries = PL_DIM(call, 'N') * g.heads * g.d, keys = g.tokens * g.kv_heads * g.d;
    widening floats[] = {
        {.act = &g.q, .n = queries, .reads = 1},   {.act = &g.k, .n = keys, .reads = 1},
        {.act = &g.v, .n = keys, .reads = 1},      {.act = &g.saved_o, .n = queries, .reads = 1},
        {.act = &g.d_o, .n = queries, .reads = 1}, {.act = &g.dq, .n = queries, .writes = 1},
        {.act = &g.dk, .n = keys, .writes = 1},    {.act = &g.dv, .n = keys, .writes = 1}};
    const int widened = attn_takes_narrow(&g) ? 0 : 8;
    pl_status status = widen(floats, widened);
    if (status == PL_OK) status = attn_prepare(&g);
    if (status == PL_OK) {
        pl_parallel(g.first[g.sequences], 1, attn_grad_piece, &g);
        attn_each_token(&g, attn_finish_tokens, attn_finish_groups);
    }
    attn_release(&g);
    return narrow_again(floats, widened, status);
}

#endif
