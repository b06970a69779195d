/* The pieces of a product that AMX computes. A piece of C is a group of columns over the depth of
 * the block. The group and the rows that are multiplied with it fit the second-level cache
 * together:
 *
 *   pack the group (at most GROUP_WORDS)
 *   for each part of the rows of A (about ROWS_WORDS)
 *     for each strip of 32 columns of the group: all blocks of these rows
 *
 * The low-rank branch is more depth. A float32 number is nearly the sum of two bfloat16 numbers,
 * x = x1 + x2, so that
 *
 *   L = A D = A (D1 + D2)                  A is rounded, D is not
 *   L U = L1 U1 + L1 U2 + L2 U1            without L2 U2, 2^-16 of the result
 *   C = A B + L U = [A L1 L1 L2] [B; U1; U2; U1] */
#ifndef PYLOSS_AMX_PIECES_TPL_H
#define PYLOSS_AMX_PIECES_TPL_H
#include "../pieces.h"
#include "amx.tpl.h"
#include "blocks.tpl.h"
#include "pack.tpl.h"
#include "product.h"

enum {
    GROUP_WORDS = 1 << 18, /* of packed B: 1 MB */
    ROWS_WORDS = 96 << 10, /* of packed A: 384 KB */
    LOW_TERMS = 3
};

/* ---- Sizes, in floats */

static int64_t amx_low_words(const gemm *g) {
    return g->rank ? words_of(g->form, LOW_TERMS * g->rank) : 0;
}
/* Words of a packed row of A, and of a column of B. */
static int64_t amx_words(const block *s) {
    return words_of(s->g->form, s->depth) + (s->last ? amx_low_words(s->g) : 0);
}
static int64_t amx_deepest_words(const gemm *g) {
    return words_of(g->form, block_depth(g)) + amx_low_words(g);
}
/* D2 in floats, if D is transposed, then D packed: for each 16 ranks a panel of D1, one of D2. */
static int64_t amx_down_rest(const gemm *g) {
    return g->down_transposed ? round_up(g->k * g->rank, AMX_SIDE) : 0;
}
static int64_t amx_down_size(const gemm *g) {
    if (!g->rank || g->low_given) return 0;
    const int64_t panels = round_up(g->rank, AMX_SIDE) / AMX_SIDE;
    return amx_down_rest(g) + 2 * panels * AMX_SIDE * words_of(g->form, block_depth(g));
}
/* A worker's memory: packed columns of B, their bias, and U1, U2, U1 in floats. While A is packed:
 * L1, L1, L2 in floats. */
static int64_t amx_worker_size(const block *s) {
    const int64_t low = 2 * amx_low_words(s->g);
    return at_least(s->columns * (amx_deepest_words(s->g) + 1 + low), AMX_BLOCK * low);
}

/* ---- The low-rank branch */

/* What bfloat16 does not hold of x. */
INLINE vf amx_rest(vf x) { return x - (vf)(vi_rounded_to_bf16(x) & -0x10000); }

/* to[0, n) = the rest of factor from[0, n). */
static void amx_second_part(const float *from, int64_t n, float factor, float *to) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t some = at_most(n - i, LANES);
        vf_store_part(to + i, amx_rest(vf_load_part(from + i, some, 0) * factor), some);
    }
}

/* Packs ranks [r, r + n) of D [k, rank]. */
INLINE void amx_pack_down_rows(const block *s, int64_t r, int64_t n, int64_t words, float *to,
                               const int form) {
    const gemm *g = s->g;
    const float *down = (const float *)(const void *)g->down.data + s->k0 * g->rank + r;
    for (int64_t w = 0; w < words; w++, to += AMX_SIDE)
        for (int l = 0; l < AMX_SIDE; l += LANES) {
            const int64_t some = at_least(at_most(n - l, LANES), 0);
            const float *row = down + 2 * w * g->rank + l;
            const vf x = 2 * w < s->depth ? vf_load_part(row, some, 0) * g->down_scale : vf_set1(0),
                     y = 2 * w + 1 < s->depth ? vf_load_part(row + g->rank, some, 0) * g->down_scale
                                              : vf_set1(0);
            vf_store(to + l, (vf)pair_of(x, y, form));
            vf_store(to + l + AMX_SIDE * words, (vf)pair_of(amx_rest(x), amx_rest(y), form));
        }
}
static void amx_pack_down_emulated(const block *s, int64_t r, int64_t n, int64_t words, float *to) {
    amx_pack_down_rows(s, r, n, words, to, AMX_EMULATED);
}
#ifdef AMX_COMPILED
static void amx_pack_down_native(const block *s, int64_t r, int64_t n, int64_t words, float *to) {
    amx_pack_down_rows(s, r, n, words, to, AMX);
}
#else
#define amx_pack_down_native amx_pack_down_emulated
#endif

static void amx_pack_down(const block *s) {
    const gemm *g = s->g;
    float *second = s->packed_down, *to = second + amx_down_rest(g);
    const int64_t words = words_of(g->form, s->depth), panel = AMX_SIDE * words;
    const pl_weight rest = float_matrix(second, g->down.rows, g->down.cols);
    if (g->down_transposed)
        amx_second_part((const float *)(const void *)g->down.data, g->k * g->rank, g->down_scale,
                        second);
    for (int64_t r = 0; r < g->rank; r += AMX_SIDE, to += 2 * panel) {
        const int64_t n = at_most(g->rank - r, AMX_SIDE);
        if (!g->down_transposed) {
            (g->form == AMX ? amx_pack_down_native : amx_pack_down_emulated)(s, r, n, words, to);
            continue;
        }
        b_packers[g->form](&g->down, 1, r, n, s->k0, s->depth, AMX_SIDE, g->down_scale, NULL, words,
                           to);
        b_packers[g->form](&rest, 1, r, n, s->k0, s->depth, AMX_SIDE, 1, NULL, words, to + panel);
    }
}

/* Rows of L from packed rows of A. */
static void amx_low_rows(const block *s, const float *a, int64_t row, int rows) {
    const gemm *g = s->g;
    const int64_t words = words_of(g->form, s->depth), panel = AMX_SIDE * words;
    const float *b = s->packed_down + amx_down_rest(g);
    float sums[AMX_BLOCK * AMX_BLOCK], *low = g->low + (s->row0 + row) * g->rank;
    for (int64_t r = 0; r < g->rank; r += AMX_SIDE, b += 2 * panel) {
        amx_strip(&(amx_args){.steps = words / AMX_SIDE,
                              .a = a,
                              .a_stride = AMX_SIDE * s->pairs_stride,
                              .b = b,
                              .b_stride = panel,
                              .c = sums,
                              .ldc = AMX_BLOCK,
                              .rows = AMX_BLOCK,
                              .cols = AMX_BLOCK},
                  g->form);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < at_most(g->rank - r, AMX_SIDE); j++) {
                const float *sum = sums + i * AMX_BLOCK + j;
                float *l = low + i * g->rank + r + j;
                *l = sum[0] + sum[AMX_SIDE] + (s->k0 > 0 ? *l : 0);
            }
    }
}

/* Packs L1, L1, L2 of some rows behind A. */
static void amx_pack_low(const block *s, int64_t row, int rows, float *scratch) {
    const gemm *g = s->g;
    const int64_t rank = g->rank, width = LOW_TERMS * rank;
    const float *low = (g->low_given ? g->low_given : g->low) + (s->row0 + row) * rank;
    for (int64_t i = 0; i < rows; i++, low += rank) {
        float *to = scratch + i * width;
        memcpy(to, low, (size_t)rank * sizeof *to);
        memcpy(to + rank, low, (size_t)rank * sizeof *to);
        amx_second_part(low, rank, 1, to + 2 * rank);
    }
    a_packers[g->form](&(lhs){scratch, width, 0, 1, 0}, 0, rows, 0, width, row, s->pairs_stride,
                       s->pairs + AMX_SIDE * words_of(g->form, s->depth));
}

/* Packs U1, U2, U1 of columns [j0, j0 + n) below B. */
static void amx_pack_up(const block *s, int64_t j0, int64_t n, float *scratch, float *packed_b) {
    const gemm *g = s->g;
    const float *up = (const float *)(const void *)g->up.data;
    /* Terms of U [rank, n] are rows, those of U [n, rank] columns, up to whole steps. */
    const int by_row = !g->up_transposed;
    const int64_t rank = g->rank, depth = LOW_TERMS * rank, padded = 2 * amx_low_words(g),
                  count = by_row ? rank : n, length = by_row ? n : rank,
                  stride = by_row ? n : padded, from_term_to_term = by_row ? rank * n : rank;
    up += by_row ? j0 : j0 * rank;
    for (int64_t i = 0; i < count; i++, up += by_row ? g->n : rank) {
        float *first = scratch + i * stride, *second = first + from_term_to_term,
              *third = second + from_term_to_term;
        for (int64_t l = 0; l < length; l++) third[l] = first[l] = g->up_scale * up[l];
        amx_second_part(first, length, 1, second);
        if (!by_row) memset(third + rank, 0, (size_t)(padded - depth) * sizeof *third);
    }
    const pl_weight terms = float_matrix(scratch, by_row ? depth : n, by_row ? n : padded);
    b_packers[g->form](&terms, g->up_transposed, 0, n, 0, by_row ? depth : padded, AMX_SIDE, 1,
                       NULL, s->pairs_stride, packed_b + AMX_SIDE * words_of(g->form, s->depth));
}

/* ---- The stages of a product */

/* Packs a panel of A: AMX_BLOCK rows, with their L. */
static void amx_pack_panel(const block *s, int64_t row, int rows, float *scratch) {
    const gemm *g = s->g;
    float *to = amx_row(s->pairs, row, s->pairs_stride);
    a_packers[g->form](&g->a, s->row0 + row, rows, s->k0, s->depth, row, s->pairs_stride, s->pairs);
    if (!g->rank) return;
    if (!g->low_given) {
        amx_begin(g->form);
        amx_low_rows(s, to, row, rows);
        amx_end(g->form);
    }
    if (s->last) amx_pack_low(s, row, rows, scratch);
}

/* Rows of A that are multiplied with a group of columns before the next rows. */
static int64_t amx_rows(const block *s) {
    const int64_t fit = ROWS_WORDS / (amx_deepest_words(s->g) + 1) / AMX_BLOCK * AMX_BLOCK;
    return at_most(at_least(fit, AMX_BLOCK), round_up(s->rows, AMX_BLOCK));
}

/* Element (i, j) of C. */
INLINE float *c_at(const gemm *g, int64_t i, int64_t j) {
    const int64_t at = i * g->n + j;
    return g->narrow ? (float *)(void *)((uint16_t *)(void *)g->c + at) : g->c + at;
}

static void multiply_amx_piece(const block *s, int64_t piece, float *packed_b) {
    const gemm *g = s->g;
    const int64_t words = s->pairs_stride, together = amx_rows(s);
    const int64_t j0 = piece % s->column_pieces * s->columns, n = at_most(g->n - j0, s->columns),
                  padded = round_up(n, AMX_BLOCK);
    const int64_t first = piece / s->column_pieces * s->rows_per_piece,
                  last = at_most(first + s->rows_per_piece, s->rows);
    const int add = g->accumulate || s->k0 > 0, with_bias = g->bias && !add;
    float *bias = packed_b + padded * words;
    b_packers[g->form](&g->b, g->b_transposed, j0, n, s->k0, s->depth, AMX_SIDE, 1, g->b_row_factor,
                       words, packed_b);
    if (s->last && g->rank) amx_pack_up(s, j0, n, bias + padded, packed_b);
    for (int64_t j = 0; j < padded && with_bias; j++) bias[j] = j < n ? g->bias[j0 + j] : 0;
    amx_begin(g->form);
    for (int64_t row = first; row < last; row += together)
        for (int64_t j = 0; j < n; j += AMX_BLOCK)
            amx_strip(&(amx_args){.steps = words / AMX_SIDE,
                                  .a = amx_row(s->pairs, row, words),
                                  .a_stride = AMX_SIDE * words,
                                  .b = packed_b + j * words,
                                  .b_stride = AMX_SIDE * words,
                                  .bias = with_bias ? bias + j : NULL,
                                  .c = c_at(g, s->row0 + row, j0 + j),
                                  .ldc = g->n,
                                  .narrow = g->narrow,
                                  .rows = at_most(last - row, together),
                                  .cols = (int)at_most(n - j, AMX_BLOCK),
                                  .add = add},
                      g->form);
    amx_end(g->form);
}

#endif
