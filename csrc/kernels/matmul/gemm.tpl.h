/* The blocked matrix product behind every dense layer, forward and backward: see product.h.
 *
 *              k0    KC deep: packed panels of B, NB columns at a time, one set per worker
 *              |<----->|
 *          +---+-------+-------+                      +-----------+
 *          |   |       |       |                      |   |   |   |
 *   A      |   | rows  |       |  MS rows x KS deep   |   |NB |   |  B
 *   [m,k]  |   | of a  |       |  are a block         |   |   |   |  [k,n], any format
 *          |   | block |       |                      |   |   |   |
 *          +---+-------+-------+                      +-----------+
 *
 * A block is cut into panels of `mr` rows. In a packed panel the mr elements of one depth lie
 * together, as the tile reads them:
 *
 *   A panel [kc][mr]:     a00 a10 a20 .. | a01 a11 a21 .. | a02 ..      one group per depth
 *   B panel [kc][width]:  b00 b01 b02 .. | b10 b11 b12 .. | b20 ..      one group per depth
 *
 * A is read in place, or packed once where tiles would be slow to read it. B is packed, and
 * expanded if it is quantized, a strip of NB columns at a time, next to the tiles that use it. A
 * piece of work is a strip times some rows, by the shape alone; a worker runs neighboring pieces
 * one after the other and packs their strip once. The low-rank branch continues the inner loop over
 * k, so it joins a tile before the tile is stored. On request A and B are rounded to bfloat16 as
 * they are packed; sums and the low-rank branch stay float32. Each element of C is summed in one
 * order, so its bits do not depend on the threads. AMX has pieces of its own: amx_pieces.tpl.h. */
#ifndef PYLOSS_GEMM_TPL_H
#define PYLOSS_GEMM_TPL_H
#include "../../pyloss.h"
#include "../pieces.h"
#include "amx_pieces.tpl.h"
#include "blocks.tpl.h"
#include "gemv.tpl.h"
#include "int8.h"
#include "pack.tpl.h"
#include "product.h"
#include "tile.tpl.h"

/* Sets the A of a tile: the panel at `row` of the block, from depth k on. */
INLINE void take_panel(const block *s, int64_t row, int rows, int64_t k, tile_args *t) {
    const gemm *g = s->g;
    t->rows = rows;
    t->in_place = s->in_place && rows == MR;
    if (t->in_place) {
        t->a = g->a.data + (s->row0 + row) * g->a.stride + s->k0 + k;
        t->a_stride = g->a.stride;
    } else {
        t->a = s->packed_a + (s->in_place ? 0 : row / s->mr * s->panel_stride) + k * s->mr;
        t->a_stride = s->mr;
    }
}

/* Sets the A of a tile of pairs. */
INLINE void take_pairs(const block *s, int64_t row, int rows, int64_t k, tile_args *t) {
    t->rows = rows;
    t->in_place = 1;
    t->a = s->pairs + row * s->pairs_stride + words_of(PAIRS, k);
    t->a_stride = s->pairs_stride;
}

static int rows_of_panel(const block *s, int64_t row) {
    return (int)(s->rows - row < s->mr ? s->rows - row : s->mr);
}

static void pack_down(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const batch *all = context;
    for (const block *s = all->blocks + begin; s < all->blocks + end; s++) {
        const gemm *g = s->g;
        if (!s->panels || !g->rank || g->low_given) continue;
        if (is_amx(g->form)) {
            amx_pack_down(s);
            continue;
        }
        pack_b(&g->down, g->down_transposed, 0, g->rank, s->k0, s->depth, low_width(g->rank, s->mr),
               g->down_scale, NULL, s->packed_down);
    }
}

/* Packs L times its factor, for the rows of a panel. */
static void pack_low(const block *s, int64_t row, int rows, float *dst) {
    const gemm *g = s->g;
    lhs low = {g->low_given ? g->low_given : g->low, g->rank, 0, g->up_scale, 0};
    pack_a(&low, s->row0 + row, rows, s->mr, 0, g->rank, dst);
}

/* Packs panels of A; computes their rows of L and packs these. */
static void pack_panels(const void *context, int64_t begin, int64_t end, int worker) {
    const block *s = ((const batch *)context)->blocks;
    for (int64_t i = begin; i < end; i++) {
        while (i >= s->first_panel + s->panels) s++;
        const gemm *g = s->g;
        int64_t panel = i - s->first_panel, row = panel * s->mr, from = s->row0 + row;
        if (is_amx(g->form)) {
            amx_pack_panel(s, row, rows_of_panel(s, row), packed_b_of(s, worker));
            continue;
        }
        const int with_h = g->rank && !g->low_given;
        tile_args t = {.add = s->k0 > 0, .k = s->depth, .ldc = g->rank};
        take_panel(s, row, rows_of_panel(s, row), 0, &t);
        if (!t.in_place && (with_h || g->form == FLOATS))
            pack_a(&g->a, from, t.rows, s->mr, s->k0, s->depth, (float *)t.a);
        if (g->form != FLOATS)
            a_packers[g->form](&g->a, from, t.rows, s->k0, s->depth, row, s->pairs_stride,
                               s->pairs);
        if (with_h) {
            int width = low_width(g->rank, s->mr);
            for (int64_t j = 0; j < g->rank; j += width) {
                t.ldb = width;
                t.b = s->packed_down + j * s->depth;
                t.c = g->low + from * g->rank + j;
                t.cols = (int)(g->rank - j < width ? g->rank - j : width);
                if (width < LANES) tile_narrow(&t);
                else run_tile(&t, width);
            }
        }
        if (g->rank && s->last) pack_low(s, row, t.rows, s->packed_low + panel * s->low_stride);
    }
}

/* The strip of a piece; strips are numbered through the batch. */
INLINE int64_t strip_of(const block *s, int64_t piece) {
    return s->first_strip + (piece - s->first_piece) / s->row_pieces;
}

/* The part of B to prefetch while a piece multiplies its depth up to `k`. A piece that packs its
 * strip: the next chunk. Then each of the strip's pieces: a share of the next strip. */
static b_prefetch next_chunk(const batch *all, const block *s, int64_t piece, int64_t k, int packs,
                             int64_t tiles) {
    const gemm *g = s->g;
    int64_t depth = at_most(s->depth - k, s->chunk);
    if (k == s->depth) {
        const int64_t pieces = s->row_pieces, at = (piece - s->first_piece) % pieces;
        piece += pieces - at;
        if (piece >= all->pieces) return (b_prefetch){0};
        while (piece >= s->first_piece + s->pieces) s++;
        g = s->g;
        k = at * s->depth / pieces / 32 * 32;
        depth = (at + 1 == pieces ? s->depth : (at + 1) * s->depth / pieces / 32 * 32) - k;
        if (pieces == 1) depth = at_most(depth, s->chunk);
    } else if (!packs) {
        return (b_prefetch){0};
    }
    const int64_t j0 = (piece - s->first_piece) / s->row_pieces * s->columns;
    return prefetch_of(&g->b, g->b_transposed, j0, at_most(g->n - j0, s->columns), s->k0 + k, depth,
                       tiles);
}

/* Pieces of C: a range of packed panels times a strip of columns. A worker packs the strip at the
 * first of the pieces that it runs one after the other. */
static void multiply_pieces(const void *context, int64_t begin, int64_t end, int worker) {
    const batch *all = context;
    const block *s = all->blocks;
    for (int64_t i = begin; i < end; i++) {
        while (i >= s->first_piece + s->pieces) s++;
        const gemm *g = s->g;
        packed_strip *held = (packed_strip *)(void *)(s->packed_b + worker * s->b_stride);
        float *packed_b = packed_b_of(s, worker);
        int width = panel_width(g->n);
        int64_t piece = i - s->first_piece, j0 = piece / s->row_pieces * s->columns;
        if (is_amx(g->form)) {
            multiply_amx_piece(s, piece, packed_b);
            continue;
        }
        int64_t n = at_most(g->n - j0, s->columns), padded = round_up(n, width);
        int64_t first = piece % s->row_pieces * s->rows_per_piece;
        int64_t last = at_most(first + s->rows_per_piece, s->rows);
        const int packs = held->strip != strip_of(s, i);
        held->strip = strip_of(s, i);
        /* With one panel of A, packing B would cost as much as using it. */
        int direct = s->rows <= s->mr && !g->b_transposed && g->b.format == PL_W_F32 &&
                     !g->b.head_dim && !g->b_row_factor && n % width == 0 && g->form == FLOATS;
        int64_t k = 0, depth;
        do {
            depth = s->depth - k < s->chunk ? s->depth - k : s->chunk;
            int finish = s->last && k + depth == s->depth;
            const int64_t words = words_of(g->form, depth);
            const float *b = packed_b + padded * words_of(g->form, k);
            float *packed_up = packed_b + padded * words_of(g->form, s->depth);
            if (direct) b = (const float *)g->b.data + (s->k0 + k) * g->n + j0;
            else if (packs)
                b_packers[g->form](&g->b, g->b_transposed, j0, n, s->k0 + k, depth, width, 1,
                                   g->b_row_factor, words, (float *)b);
            if (finish && g->rank && packs)
                pack_b(&g->up, g->up_transposed, j0, n, 0, g->rank, width, 1, NULL, packed_up);
            b_prefetch ahead = next_chunk(all, s, i, k + depth, packs,
                                          (last - first + s->mr - 1) / s->mr * (padded / width));
            tile_args t = {.k = words,
                           .ldb = direct ? g->n : width,
                           .k2 = finish ? g->rank : 0,
                           .ldc = g->n,
                           .add = g->accumulate || s->k0 + k > 0};
            for (int64_t row = first; row < last; row += s->mr) {
                t.a2 = s->packed_low + row / s->mr * s->low_stride;
                if (g->form == FLOATS) take_panel(s, row, rows_of_panel(s, row), k, &t);
                else take_pairs(s, row, rows_of_panel(s, row), k, &t);
                for (int64_t j = 0; j < padded; j += width) {
                    t.b = direct ? b + j : b + j * words;
                    t.b2 = packed_up + j * g->rank;
                    t.bias = finish && g->bias ? g->bias + j0 + j : NULL;
                    t.c = g->c + (s->row0 + row) * g->n + j0 + j;
                    t.cols = (int)(n - j < width ? n - j : width);
                    prefetch_share(&ahead);
                    if (g->form == FLOATS) run_tile(&t, width);
                    else run_tile_of_pairs(&t, width, g->form);
                }
            }
            k += depth;
        } while (k < s->depth);
    }
}

/* Columns of a piece. AMX has a few pieces for each thread, as wide as they may be: the wider, the
 * less A is read. */
static int64_t columns_of(const gemm *g, int threads) {
    enum { PIECES = 3, LEAST_BLOCKS = 4 };
    if (!is_amx(g->form)) return NB;
    const int64_t blocks = (g->n + AMX_BLOCK - 1) / AMX_BLOCK;
    const int64_t most = at_least(GROUP_WORDS / AMX_BLOCK / (1 + amx_deepest_words(g)), 1);
    const int64_t wanted = at_most(PIECES * threads, at_least(blocks / LEAST_BLOCKS, threads));
    const int64_t rounds = (blocks + threads * most - 1) / (threads * most),
                  pieces = at_least(wanted, threads * rounds);
    return AMX_BLOCK * ((blocks + pieces - 1) / pieces);
}

/* Fills a batch from the products at *group, *row0 on: one block of about MS rows, or several whole
 * products. The latter have few rows together, and their packed A fits into one block. */
static void fill_batch(batch *all, const gemm *groups, int64_t count, int64_t *group,
                       int64_t *row0) {
    int64_t rows = 0;
    all->count = 0;
    all->k = 0;
    for (; *group < count && all->count < BATCH; ++*group) {
        const gemm *g = groups + *group;
        int mr = is_amx(g->form) ? AMX_BLOCK : g->form == FLOATS ? tiles[tile_kernel(g->m)].mr : MR;
        if (g->m == 0 || g->n == 0 || is_gemv(g) || is_int8(g->form)) continue;
        int64_t rest = g->m - *row0, most = rest < MS + mr ? rest : round_up(MS, mr);
        /* Rows a multiple of 4 KB apart map to the same lines of the first cache, and very long
         * rows to many pages: pack these. */
        int in_place = g->form != FLOATS || (mr == MR && !g->a.transposed && g->a.factor == 1 &&
                                             g->a.stride % 1024 && g->k <= KS);
        int64_t small = 4 * MS, fit = (int64_t)MS * KS / at_least(block_depth(g), 1);
        if (all->count &&
            (rest >= MS + mr || rows + rest > (in_place || fit > small ? small : fit)))
            break;
        block *s = &all->blocks[all->count++];
        *s = (block){.g = g, .mr = mr, .row0 = *row0, .rows = most, .in_place = in_place};
        s->columns = columns_of(g, all->threads);
        s->column_pieces = (g->n + s->columns - 1) / s->columns;
        all->k = at_least(all->k, g->k);
        rows += most;
        *row0 += most;
        if (*row0 < g->m) break;
        *row0 = 0;
    }
}

/* Places the buffers of a batch in `scratch`; returns how many floats it needs. scratch may be
 * NULL. */
static size_t place_batch(batch *all, float *scratch) {
    size_t used = 0;
    int64_t b_stride = 0;
    for (block *s = all->blocks; s < all->blocks + all->count; s++) {
        const gemm *g = s->g;
        int64_t deepest = block_depth(g), panels = (s->rows + s->mr - 1) / s->mr;
        if (is_amx(g->form)) {
            b_stride = at_least(b_stride, amx_worker_size(s) + PACKED_STRIP);
            if (scratch) s->packed_down = scratch + used;
            used += (size_t)amx_down_size(g);
            if (scratch) s->pairs = scratch + used;
            used += (size_t)(panels * AMX_BLOCK * amx_deepest_words(g));
            continue;
        }
        s->panel_stride = round_up(deepest * s->mr + PANEL_SPILL, 16);
        s->low_stride = round_up(g->rank * s->mr + PANEL_SPILL, 16);
        const int64_t words = words_of(g->form, deepest);
        const int64_t b_size = round_up(s->columns, panel_width(g->n)) * (words + g->rank);
        b_stride = at_least(b_stride, round_up(b_size, 16) + PACKED_STRIP);
        if (scratch) s->packed_a = scratch + used;
        used += (size_t)((s->in_place ? 1 : panels) * s->panel_stride);
        if (scratch) s->packed_low = scratch + used;
        used += (size_t)(panels * s->low_stride);
        if (scratch) s->packed_down = scratch + used;
        int64_t p_rows = round_up(g->rank, low_width(g->rank, s->mr));
        if (g->rank && !g->low_given) used += (size_t)round_up(p_rows * deepest + PANEL_SPILL, 16);
        if (g->form == FLOATS) continue;
        if (scratch) s->pairs = scratch + used;
        /* An odd number of lines, so that rows lie in different parts of the first cache. */
        s->pairs_stride = round_up(words, 16) | 16;
        used += (size_t)(panels * s->mr * s->pairs_stride);
    }
    for (block *s = all->blocks; scratch && s < all->blocks + all->count; s++) {
        s->packed_b = scratch + used;
        s->b_stride = b_stride;
    }
    return used + (size_t)(all->threads * b_stride);
}

/* How many ranges of rows a block is cut into, over `strips` of columns in all. AMX has a piece for
 * each thread. Others have enough for many threads, by the shape alone, of some work each. */
static int64_t row_pieces_of(const batch *all, const block *s, int64_t sides, int64_t strips) {
    if (is_amx(s->g->form)) return at_most((all->threads + strips - 1) / strips, sides / 9 + 1);
    const int64_t depth = at_least(block_depth(s->g), 1), rows = sides * s->mr,
                  products = rows * s->columns * depth;
    return at_most((WANTED_PIECES + strips - 1) / strips, products / LEAST_PRODUCTS + 1);
}

/* Sets up the part of each block's depth from k0 on. */
static void begin_depth(batch *all, int64_t k0) {
    int64_t strips = 0;
    for (block *s = all->blocks; s < all->blocks + all->count; s++) {
        s->first_strip = strips;
        strips += s->column_pieces;
    }
    all->panels = all->pieces = 0;
    for (block *s = all->blocks; s < all->blocks + all->count; s++) {
        const gemm *g = s->g;
        /* Once for k = 0 too: bias and the low-rank branch remain. */
        const int done = k0 > 0 && (k0 >= g->k || k0 % depth_of(g));
        int64_t used = (s->rows + s->mr - 1) / s->mr;
        s->rows_per_piece = at_least(used / row_pieces_of(all, s, used, strips), 1) * s->mr;
        s->row_pieces = (s->rows + s->rows_per_piece - 1) / s->rows_per_piece;
        s->k0 = k0;
        s->depth = done ? 0 : at_most(g->k - k0, depth_of(g));
        int64_t chunks = s->depth ? (s->depth + KC - 1) / KC : 1;
        s->chunk = round_up((s->depth + chunks - 1) / chunks, 32);
        s->last = k0 + s->depth == g->k;
        if (is_amx(g->form)) s->pairs_stride = amx_words(s);
        s->first_panel = all->panels;
        s->first_piece = all->pieces;
        all->panels += s->panels = done ? 0 : used;
        all->pieces += s->pieces = done ? 0 : s->row_pieces * s->column_pieces;
    }
    for (int worker = 0; all->count && worker < all->threads; worker++) {
        const block *s = all->blocks;
        ((packed_strip *)(void *)(s->packed_b + worker * s->b_stride))->strip = -1;
    }
}

static pl_status gemm_run_all(const gemm *groups, int64_t count);

/* Runs the products in int8 among `groups`. Before them the rows of L that are not given: those of
 * many rows are products of their own, in float32. */
static pl_status int8_run_all(const gemm *groups, int64_t count) {
    int any = 0, dots = 0, lows = 0, few = 0;
    for (const gemm *g = groups; g < groups + count; g++) {
        any |= is_int8(g->form);
        dots |= g->form == INT8_DOTS;
        if (is_int8(g->form) && g->rank && !g->low_given) is_few_int8(g) ? few++ : lows++;
    }
    if (!any) return PL_OK;
    if (few) pl_parallel(count * SKINNY_M, SKINNY_M, gemv_low, groups);
    gemm *low = lows ? pl_acquire((size_t)lows * sizeof *low) : NULL;
    if (lows && !low) return PL_NO_MEMORY;
    lows = 0;
    for (const gemm *g = groups; low && g < groups + count; g++)
        if (is_int8(g->form) && g->rank && !g->low_given && !is_few_int8(g))
            low[lows++] = (gemm){.m = g->m,
                                 .n = g->rank,
                                 .k = g->k,
                                 .a = {g->a.data, g->a.stride, 0, g->down_scale, 0},
                                 .b = g->down,
                                 .b_transposed = g->down_transposed,
                                 .c = g->low};
    const pl_status status = lows ? gemm_run_all(low, lows) : PL_OK;
    pl_release(low);
    if (status != PL_OK) return status;
    return dots ? INT8_QUICKEST_RUN(groups, count) : INT8_PLAIN_RUN(groups, count);
}

/* Runs independent products together, such as those of experts, so that small ones too keep all
 * threads busy. */
static pl_status gemm_run_all(const gemm *groups, int64_t count) {
    pl_status status = int8_run_all(groups, count);
    if (status == PL_OK) status = gemv_run_all(groups, count);
    if (status != PL_OK) return status;
    batch all = {.threads = pl_num_threads()};
    float *scratch = NULL;
    size_t held = 0;
    for (int64_t group = 0, row0 = 0; group < count;) {
        fill_batch(&all, groups, count, &group, &row0);
        size_t needed = all.count ? place_batch(&all, NULL) : 0;
        if (needed > held) {
            pl_release(scratch);
            scratch = pl_acquire(sizeof *scratch * needed);
            if (!scratch) return PL_NO_MEMORY;
            held = needed;
        }
        if (all.count) place_batch(&all, scratch);
        for (int64_t k0 = 0; all.count && (k0 == 0 || k0 < all.k); k0 += KS) {
            begin_depth(&all, k0);
            pl_parallel(all.count, 1, pack_down, &all);
            pl_parallel(all.panels, 1, pack_panels, &all);
            pl_parallel_near(all.pieces, multiply_pieces, &all);
        }
    }
    pl_release(scratch);
    return PL_OK;
}

static pl_status gemm_run(const gemm *g) { return gemm_run_all(g, 1); }

#endif
