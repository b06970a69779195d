/* Packing: the operands of a product in the order in which tiles read them (see gemm.tpl.h). */
#ifndef PYLOSS_PACK_TPL_H
#define PYLOSS_PACK_TPL_H
#include "../quant.tpl.h"
#include "../simd/narrow.h"
#include "../simd/transpose.h"
#include "amx.tpl.h"
#include "pairs.h"
#include "product.h"
#include "tile.tpl.h"

enum { PANEL_SPILL = 16 }; /* packing writes whole vectors past the end of a panel */

/* Rows [row, row + rows) of A, columns [k0, k0 + kc), as [kc][mr]; missing rows are 0. */
static void pack_a(const lhs *m, int64_t row, int rows, int mr, int64_t k0, int64_t kc,
                   float *dst) {
    vf factor = vf_set1(m->factor);
    if (m->transposed) {
        for (int64_t k = 0; k < kc; k++, dst += mr) {
            const pl_act all = {(void *)(uintptr_t)m->data, m->narrow},
                         a = act_at(all, (k0 + k) * m->stride + row);
            for (int i = 0; i < mr; i += LANES) {
                int n = rows - i < LANES ? rows - i : LANES;
                vf_store(dst + i, (n <= 0 ? vf_set1(0) : act_load(a, i, n)) * factor);
            }
        }
        return;
    }
    enum { GROUPS = (MR + LANES - 1) / LANES };
    static const float zeros[LANES];
    for (int64_t k = 0; k < kc; k += LANES) {
        int64_t depth = kc - k < LANES ? kc - k : LANES;
        vf v[GROUPS][LANES];
        int groups = (mr + LANES - 1) / LANES;
        for (int i = 0; i < groups; i++) {
            const float *source[LANES];
            float part[LANES][LANES];
            if (depth < LANES) memset(part, 0, sizeof part);
            for (int l = 0; l < LANES; l++) {
                int at = i * LANES + l;
                source[l] = at < rows ? m->data + (row + at) * m->stride + k0 + k : zeros;
                if (depth < LANES)
                    source[l] = memcpy(part[l], source[l], (size_t)depth * sizeof **part);
            }
            load_transposed(source, 0, v[i]);
        }
        /* In order of k: the lanes past mr are overwritten by the next k. */
        for (int64_t l = 0; l < depth; l++)
            for (int i = 0; i < groups; i++)
                vf_store(dst + (k + l) * mr + i * LANES, v[i][l] * factor);
    }
}

/* `pack_a_as` of a transposed A: AMX_SIDE depths' pairs of AMX_SIDE rows, of which a panel of MR
 * has no more, are turned at a time. */
INLINE void pack_a_columns_as(const int form, const lhs *m, int64_t row, int rows, int64_t k0,
                              int64_t kc, int64_t at, int64_t stride, float *dst) {
    enum { AHEAD = 2 * AMX_SIDE }; /* depths; the hardware prefetcher stops at pages */
    const pl_act all = {(void *)(uintptr_t)m->data, m->narrow};
    for (int64_t k = 0; k < kc; k += 2 * AMX_SIDE)
        for (int i = 0; i < rows; i += AMX_SIDE) {
            const int64_t step = is_amx(form) ? AMX_SIDE : stride;
            const int last = is_amx(form) ? AMX_SIDE : MR;
            float words[AMX_SIDE][AMX_SIDE],
                *to = is_amx(form) ? amx_row(dst, at + i, stride) + amx_word(k / 2)
                                   : dst + at * stride + k / 2;
            for (int64_t w = 0; w < AMX_SIDE; w++) {
                const int64_t depth = k + 2 * w;
                const pl_act even = act_at(all, (k0 + depth) * m->stride + row),
                             odd = act_at(even, m->stride);
                for (int64_t ahead = depth + AHEAD; ahead < at_most(depth + AHEAD + 2, kc); ahead++)
                    __builtin_prefetch(act_at(all, (k0 + ahead) * m->stride + row + i).data);
                for (int l = 0; l < AMX_SIDE; l += LANES) {
                    const int64_t n = at_least(at_most(rows - i - l, LANES), 0);
                    const vf x = depth < kc ? act_load(even, i + l, n) : vf_set1(0),
                             y = depth + 1 < kc ? act_load(odd, i + l, n) : vf_set1(0);
                    vf_store(words[w] + l, (vf)pair_of(x, y, form));
                }
            }
            for (int w = 0; w < AMX_SIDE; w += LANES)
                for (int l = 0; l < AMX_SIDE; l += LANES) {
                    const float *source[LANES];
                    vf v[LANES];
                    for (int j = 0; j < LANES; j++) source[j] = words[w + j];
                    load_transposed(source, l, v);
                    for (int j = 0; j < LANES && l + j < last; j++)
                        vf_store(to + (l + j) * step + w, v[j]);
                }
        }
}

/* Rows [row, row + rows) of A, columns [k0, k0 + kc), as words of pairs: rows [at, at + rows) of
 * the packed block `dst`. A has no factor.
 * Pairs: `stride` words from row to row; a multiple of LANES is written of each. Rows from there
 * to MR are 0. AMX: tiles of 16 rows, `stride` words of each row in all. */
INLINE void pack_a_as(const int form, const lhs *m, int64_t row, int rows, int64_t k0, int64_t kc,
                      int64_t at, int64_t stride, float *dst) {
    const int64_t words = words_of(form, kc);
    if (m->transposed) {
        pack_a_columns_as(form, m, row, rows, k0, kc, at, stride, dst);
        return;
    }
    for (int i = 0; i < (is_amx(form) ? rows : MR); i++) {
        const pl_act all = {(void *)(uintptr_t)m->data, m->narrow},
                     a = act_at(all, (row + i) * m->stride + k0);
        float *to = is_amx(form) ? amx_row(dst, at + i, stride) : dst + (at + i) * stride;
        if (i < rows)
            for (int64_t k = 0; k < words; k += LANES)
                vf_store(to + (is_amx(form) ? amx_word(k) : k),
                         (vf)act_pairs_at(a, 2 * k, kc, form));
        else memset(to, 0, (size_t)words * sizeof *to);
    }
}

/* One function for each form of pairs, so that only those of processors with bfloat16 instructions
 * contain these; NULL for floats. */
typedef void (*a_packer)(const lhs *m, int64_t row, int rows, int64_t k0, int64_t kc, int64_t at,
                         int64_t stride, float *dst);
#define A_PACKER(name, form) \
    static void name(const lhs *m, int64_t row, int rows, int64_t k0, int64_t kc, int64_t at, \
                     int64_t stride, float *dst) { \
        pack_a_as(form, m, row, rows, k0, kc, at, stride, dst); \
    }
A_PACKER(pack_a_pairs, PAIRS)
A_PACKER(pack_a_native_pairs, NATIVE_PAIRS)
A_PACKER(pack_a_emulated_amx, AMX_EMULATED)
#ifdef AMX_COMPILED
A_PACKER(pack_a_amx, AMX)
#endif
#undef A_PACKER
static const a_packer a_packers[] = {NULL, pack_a_pairs, pack_a_native_pairs, pack_a_emulated_amx,
#ifdef AMX_COMPILED
                                     pack_a_amx
#endif
};

/* B is packed from stretches of its rows, expanded into the first cache. */
enum { STRETCH = 128 };

/* The length of the next stretch of the `n` elements that are left: multiples of 32 first, which
 * floats have in place. */
INLINE int64_t stretch_of(int64_t n) { return n < 32 ? n : at_most(n / 32 * 32, STRETCH); }

/* Elements [begin, begin + n) of a row, a stretch: in place if they are floats and n a multiple of
 * 32, else expanded into `stretch`. */
INLINE const float *stored(const pl_weight *w, int64_t row, int64_t begin, int64_t n,
                           float *stretch) {
    if (w->format == PL_W_F32 && n % 32 == 0) return (const float *)pl_weight_row(w, row) + begin;
    decoders[w->format](w, pl_stored_row(w, row), begin, n, stretch);
    return stretch;
}

/* A stretch of `n` floats, followed by zeros up to a multiple of 32, times `factor` as the pairs it
 * makes, in place or from elsewhere. */
INLINE const float *pairs_of(const float *stretch, int64_t n, float factor, float *to,
                             const int form) {
    for (int64_t i = 0; 2 * i < round_up(n, 32); i += LANES) {
        vf_store(to + i, (vf)pairs_of_two(vf_load(stretch + 2 * i) * factor,
                                          vf_load(stretch + 2 * i + LANES) * factor, form));
    }
    return to;
}

#ifdef AMX_COMPILED
/* AMX's words of n elements from `begin` on, n a multiple of 32. A function for each format, in
 * which the floats stay in registers:
 *
 *   of_row    of a row, times `factor`, as words [n / 2]
 *   of_rows   of rows `row` and `below`, a word for each column, times `factor` and `factor_below`,
 *             as a row of panels of AMX_SIDE columns that lie `stride` floats apart */
typedef struct {
    void (*of_row)(const pl_weight *w, int64_t row, int64_t begin, int64_t n, float factor,
                   float *to);
    void (*of_rows)(const pl_weight *w, int64_t row, int64_t below, int64_t begin, int64_t n,
                    float factor, float factor_below, int64_t stride, float *to);
} word_decoder;
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    static void words_of_row_##name(const pl_weight *w, int64_t row, int64_t begin, int64_t n, \
                                    float factor, float *to) { \
        for (int64_t i = 0; i < n; i += 32) { \
            float run[32]; \
            run_##name(w, row, begin + i, run); \
            pairs_of(run, 32, factor, to + i / 2, AMX); \
        } \
    } \
    static void words_of_rows_##name(const pl_weight *w, int64_t row, int64_t below, \
                                     int64_t begin, int64_t n, float factor, float factor_below, \
                                     int64_t stride, float *to) { \
        for (int64_t at = 0; at < n; at += 32) { \
            float run[32], second[32]; \
            run_##name(w, row, begin + at, run); \
            run_##name(w, below, begin + at, second); \
            for (int i = 0; i < 32; i += LANES) \
                vf_store(to + (at + i) / AMX_SIDE * stride + i % AMX_SIDE, \
                         (vf)pair_of(vf_load(run + i) * factor, \
                                     vf_load(second + i) * factor_below, AMX)); \
        } \
    }
#include "../../formats.def"
static const word_decoder word_decoders[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) {words_of_row_##name, words_of_rows_##name},
#include "../../formats.def"
};

/* Prefetches the `n` elements of a row from `begin` on. Many rows are read side by side, or few
 * elements of each: neither does the hardware prefetch. */
INLINE void prefetch_elements(const pl_weight *w, int64_t row, int64_t begin, int64_t n) {
    const int64_t elements = pl_block_elements(w->format), bytes = pl_block_bytes(w->format);
    const uint8_t *p = pl_weight_row(w, row) + begin * bytes / elements;
    for (int64_t i = 0; i < n * bytes / elements; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* The words of a row, in place if they are stored so, else in `to`. */
INLINE const float *stored_words(const pl_weight *w, int64_t row, int64_t begin, int64_t n,
                                 float factor, float *to) {
    prefetch_elements(w, row, begin + n, n);
    if (w->format == PL_W_BF16 && factor == 1)
        return (const float *)(const void *)(pl_weight_row(w, row) + 2 * begin);
    word_decoders[w->format].of_row(w, pl_stored_row(w, row), begin, n, factor, to);
    return to;
}
/* Packs the words of rows `row` and row + 1. The factors are the same in all lanes. */
INLINE void pack_words(const pl_weight *w, int64_t row, int64_t begin, int64_t n, vf factor,
                       vf factor_below, int64_t stride, float *to) {
    enum { AHEAD = 8 };
    for (int64_t i = row + AHEAD; i < at_most(row + AHEAD + 2, w->rows); i++)
        prefetch_elements(w, i, begin, n);
    if (w->format != PL_W_BF16 || factor[0] != 1 || factor_below[0] != 1) {
        word_decoders[w->format].of_rows(w, pl_stored_row(w, row), pl_stored_row(w, row + 1), begin,
                                         n, factor[0], factor_below[0], stride, to);
        return;
    }
    const uint8_t *even = pl_weight_row(w, row) + 2 * begin,
                  *odd = pl_weight_row(w, row + 1) + 2 * begin;
    for (int64_t at = 0; at < n; at += LANES)
        vf_store(to + at / AMX_SIDE * stride + at % AMX_SIDE,
                 (vf)(vi_from_u16(even + 2 * at) | vi_from_u16(odd + 2 * at) << 16));
}
#endif

/* Elements [begin, begin + 32 runs) of a stored row, times `factor`, as a depth of panels of NR
 * columns that lie `stride` floats apart. */
typedef void (*row_packer)(const pl_weight *w, int64_t row, int64_t begin, int64_t runs, vf factor,
                           int64_t stride, float *dst);
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    static void pack_row_##name(const pl_weight *w, int64_t row, int64_t begin, int64_t runs, \
                                vf factor, int64_t stride, float *dst) { \
        for (int64_t at = 0; at < 32 * runs; at += 32) { \
            float run[32]; \
            run_##name(w, row, begin + at, run); \
            for (int i = 0; i < 32; i += LANES) \
                vf_store(dst + (at + i) / NR * stride + (at + i) % NR, vf_load(run + i) * factor); \
        } \
    }
#include "../../formats.def"
static const row_packer row_packers[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) pack_row_##name,
#include "../../formats.def"
};

/* Columns [j0, j0 + n) and depth [k0, k0 + kc) of B as panels [n / width][kc in words][width], that
 * begin panel_words width floats apart, times `scale` and unless `rows` is NULL times the factor of
 * each stored row; padded with 0. For a quantized B, k0 (transposed) or j0 (not transposed) is a
 * multiple of 32. `form` is a constant. */
INLINE void pack_b_as(const int form, const pl_weight *w, int transposed, int64_t j0, int64_t n,
                      int64_t k0, int64_t kc, int width, float scale, const float *rows,
                      int64_t panel_words, float *dst) {
    const int pairs = form != FLOATS;
    const int64_t words = words_of(form, kc);
    float stretch[LANES][STRETCH] = {{0}};
    vf factor = vf_set1(scale);
    const int64_t padded = (n + width - 1) / width * width;
    if (transposed) {
        for (int64_t j = 0; j < padded; j += LANES) {
            float *panel = dst + j / width * width * panel_words + j % width;
            if (rows)
                factor = scale * vf_load_part(rows + j0 + j,
                                              n - j < 0       ? 0
                                              : n - j < LANES ? n - j
                                                              : LANES,
                                              0);
            int64_t depth;
            for (int64_t k = 0; k < kc; k += depth) {
                depth = stretch_of(kc - k);
                const int64_t count = words_of(form, depth);
                const float *source[LANES];
                if (pairs && depth < 32) memset(stretch, 0, sizeof stretch);
                for (int i = 0; i < LANES; i++) {
#ifdef AMX_COMPILED
                    if (form == AMX && j + i < n && depth % 32 == 0) {
                        source[i] =
                            stored_words(w, j0 + j + i, k0 + k, depth, factor[i], stretch[i]);
                        continue;
                    }
#endif
                    if (j + i < n) source[i] = stored(w, j0 + j + i, k0 + k, depth, stretch[i]);
                    else source[i] = memset(stretch[i], 0, sizeof stretch[i]);
                    if (pairs && j + i < n)
                        source[i] = pairs_of(source[i], depth, factor[i], stretch[i], form);
                }
                for (int64_t at = 0; at < count; at += LANES) {
                    vf v[LANES];
                    load_transposed(source, at, v);
                    int64_t end = count - at < LANES ? count - at : LANES;
                    float *to = panel + (words_of(form, k) + at) * width;
                    for (int64_t l = 0; l < end; l++)
                        vf_store(to + l * width, pairs ? v[l] : v[l] * factor);
                }
            }
        }
        return;
    }
    for (int64_t k = 0; k < (pairs ? 2 * words : kc); k += pairs ? 2 : 1) {
        const int first = !is_amx(form) || k < kc, second = pairs && k + 1 < kc;
        vf factor2 = factor;
        if (rows) factor = vf_set1(first ? scale * rows[k0 + k] : 0);
        if (rows && second) factor2 = vf_set1(scale * rows[k0 + k + 1]);
        int64_t j = 0, span;
        if (!pairs && width == NR) {
            j = n / 32 * 32;
            row_packers[w->format](w, pl_stored_row(w, k0 + k), j0, n / 32, factor,
                                   NR * panel_words, dst + k * NR);
        }
        for (; j < padded; j += span) {
            const int64_t count = first && j < n ? stretch_of(n - j) : 0;
            span = count / 32 ? count : at_most(padded - j, 32);
#ifdef AMX_COMPILED
            if (form == AMX && second && count / 32) {
                pack_words(w, k0 + k, j0 + j, count, factor, factor2, AMX_SIDE * panel_words,
                           dst + j * panel_words + k / 2 * AMX_SIDE);
                continue;
            }
#endif
            if (count < span) memset(stretch, 0, 2 * sizeof stretch[0]);
            const float *source = count ? stored(w, k0 + k, j0 + j, count, stretch[0]) : stretch[0],
                        *source2 = stretch[1];
            if (second && count) source2 = stored(w, k0 + k + 1, j0 + j, count, stretch[1]);
            else if (pairs) memset(stretch[1], 0, sizeof stretch[1]);
            for (int64_t at = 0; at < span; at += LANES) {
                int64_t col = j + at;
                vf v = vf_load(source + at) * factor;
                if (pairs) v = (vf)pair_of(v, vf_load(source2 + at) * factor2, form);
                vf_store(dst + col / width * width * panel_words + (pairs ? k / 2 : k) * width +
                             col % width,
                         v);
            }
        }
    }
}

/* One function for tiles of full width, one for narrower ones, and one for each form of pairs. */
typedef void (*b_packer)(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0,
                         int64_t kc, int width, float scale, const float *rows, int64_t panel_words,
                         float *dst);
#define B_PACKER(name, form, width) \
    static void name(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0, \
                     int64_t kc, int any_width UNUSED, float scale, const float *rows, \
                     int64_t panel_words, float *dst) { \
        pack_b_as(form, w, transposed, j0, n, k0, kc, width, scale, rows, panel_words, dst); \
    }
B_PACKER(pack_b_wide, FLOATS, NR)
B_PACKER(pack_b_narrow, FLOATS, any_width)
B_PACKER(pack_b_pairs, PAIRS, any_width)
B_PACKER(pack_b_native_pairs, NATIVE_PAIRS, any_width)
B_PACKER(pack_b_emulated_amx, AMX_EMULATED, any_width)
#ifdef AMX_COMPILED
B_PACKER(pack_b_amx, AMX, any_width)
#endif
#undef B_PACKER

static void pack_b_floats(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0,
                          int64_t kc, int width, float scale, const float *rows,
                          int64_t panel_words, float *dst) {
    (width == NR ? pack_b_wide : pack_b_narrow)(w, transposed, j0, n, k0, kc, width, scale, rows,
                                                panel_words, dst);
}
static void pack_b(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0,
                   int64_t kc, int width, float scale, const float *rows, float *dst) {
    pack_b_floats(w, transposed, j0, n, k0, kc, width, scale, rows, kc, dst);
}
static const b_packer b_packers[] = {pack_b_floats, pack_b_pairs, pack_b_native_pairs,
                                     pack_b_emulated_amx,
#ifdef AMX_COMPILED
                                     pack_b_amx
#endif
};

/* A part of B that is packed next, prefetched a share at a time between the tiles. */
typedef struct {
    const pl_weight *w;
    int64_t row, end, first, line, lines, share;
} b_prefetch;

/* The part that pack_b will be given, in `shares` shares. */
static b_prefetch prefetch_of(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0,
                              int64_t kc, int64_t shares) {
    int64_t elements = pl_block_elements(w->format), bytes = pl_block_bytes(w->format);
    int64_t row = transposed ? j0 : k0, rows = transposed ? n : kc, from = transposed ? k0 : j0,
            count = transposed ? kc : n;
    b_prefetch a = {.w = w, .row = row, .end = row + rows, .first = from * bytes / elements};
    a.lines = (count * bytes / elements + 126) / 64; /* a row may begin anywhere in a line */
    a.share = (rows * a.lines + shares - 1) / shares;
    return a;
}

static void prefetch_share(b_prefetch *a) {
    for (int64_t i = 0; i < a->share && a->row < a->end; i++) {
        __builtin_prefetch(pl_weight_row(a->w, a->row) + a->first + 64 * a->line, 0, 2);
        if (++a->line == a->lines) {
            a->line = 0;
            a->row++;
        }
    }
}

#endif
