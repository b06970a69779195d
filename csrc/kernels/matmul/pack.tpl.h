/* Packing: the operands of a product in the order in which tiles read them (see gemm.tpl.h). */
#ifndef PYLOSS_PACK_TPL_H
#define PYLOSS_PACK_TPL_H
#include "../quant.tpl.h"
#include "../simd/narrow.h"
#include "../simd/transpose.h"
#include "amx.tpl.h"
#include "product.h"
#include "tile.tpl.h"

enum { PANEL_SPILL = 16 }; /* packing writes whole vectors past the end of a panel */

/* Rows [row, row + rows) of A, columns [k0, k0 + kc), as [kc][mr]; missing rows are 0. */
static void pack_a(const lhs *m, int64_t row, int rows, int mr, int64_t k0, int64_t kc,
                   float *dst) {
    vf factor = vf_set1(m->factor);
    if (m->transposed) {
        for (int64_t k = 0; k < kc; k++, dst += mr) {
            const float *a = m->data + (k0 + k) * m->stride + row;
            for (int i = 0; i < mr; i += LANES) {
                int n = rows - i < LANES ? rows - i : LANES;
                vf_store(dst + i, (n <= 0       ? vf_set1(0)
                                   : n == LANES ? vf_load(a + i)
                                                : vf_load_part(a + i, n, 0)) *
                                      factor);
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

/* Whether a form, a constant, rounds by bfloat16 instructions. These take numbers below 2^-126 as
 * 0; so does the form that emulates AMX. */
INLINE int is_native(const int form) { return form == NATIVE_PAIRS || form == AMX; }
INLINE vf before_rounding(vf v, const int form) {
    return form == AMX_EMULATED ? vf_flush_subnormal(v) : v;
}

/* LANES words of pairs of a row, of which `n` more floats are there. */
INLINE vi pairs_at(const float *row, int64_t n, const int form) {
    float part[2 * LANES];
    if (n < 2 * LANES) {
        memset(part, 0, sizeof part);
        row = n <= 0 ? part : memcpy(part, row, (size_t)n * sizeof *row);
    }
    return vi_pairs_in_order(before_rounding(vf_load(row), form),
                             before_rounding(vf_load(row + LANES), form), is_native(form));
}

/* Rows [row, row + rows) of A, columns [k0, k0 + kc), as words of pairs: rows [at, at + rows) of
 * the packed block `dst`. A is neither transposed nor has it a factor.
 * Pairs: `stride` words from row to row; a multiple of LANES is written of each. Rows from there
 * to MR are 0. AMX: tiles of 16 rows, `stride` words of each row in all. */
INLINE void pack_a_as(const int form, const lhs *m, int64_t row, int rows, int64_t k0, int64_t kc,
                      int64_t at, int64_t stride, float *dst) {
    const int64_t words = words_of(form, kc);
    for (int i = 0; i < MR; i++) {
        const float *a = m->data + (row + i) * m->stride + k0;
        float *to = is_amx(form) ? amx_row(dst, at + i, stride) : dst + (at + i) * stride;
        if (i < rows)
            for (int64_t k = 0; k < words; k += LANES)
                vf_store(to + (is_amx(form) ? amx_word(k) : k),
                         (vf)pairs_at(a + 2 * k, kc - 2 * k, form));
        else if (!is_amx(form)) memset(to, 0, (size_t)words * sizeof *to);
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

/* Elements [begin, begin + n) of a stored row, n <= 32: in place if they are floats, else expanded
 * into `run`. `format` is a constant, the weight's or ANY_FORMAT. */
enum { ANY_FORMAT = -1 };
INLINE const float *stored_run(const int format, const pl_weight *w, int64_t row, int64_t begin,
                               int64_t n, float *run) {
    if (w->format == PL_W_F32 && n == 32) return (const float *)pl_weight_row(w, row) + begin;
    if (n < 32 || format == ANY_FORMAT) {
        decoders[w->format](w, pl_stored_row(w, row), begin, n, run);
        return run;
    }
    switch (format) {
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    case PL_W_##name: \
        run_##name(w, pl_stored_row(w, row), begin, 32, run); \
        break;
#include "../../formats.def"
    }
    return run;
}

/* A run of 32 floats times `factor` as the pairs it makes, in place or from elsewhere. */
INLINE const float *pairs_of_run(const float *run, float factor, float *to, const int form) {
    for (int i = 0; i < 32 / LANES / 2; i++) {
        const float *from = run + 2 * i * LANES;
        vf first = before_rounding(vf_load(from) * factor, form);
        vf second = before_rounding(vf_load(from + LANES) * factor, form);
        vf_store(to + i * LANES, (vf)vi_pairs_in_order(first, second, is_native(form)));
    }
    return to;
}

/* Columns [j0, j0 + n) and depth [k0, k0 + kc) of B as panels [n / width][kc in words][width],
 * times `scale` and unless `rows` is NULL times the factor of each stored row; padded with 0.
 * For a quantized B, k0 (transposed) or j0 (not transposed) is a multiple of 32. `form` and
 * `format` are constants, see stored_run. */
INLINE void pack_b_as(const int form, const int format, const pl_weight *w, int transposed,
                      int64_t j0, int64_t n, int64_t k0, int64_t kc, int width, float scale,
                      const float *rows, float *dst) {
    const int pairs = form != FLOATS;
    const int64_t words = words_of(form, kc);
    float run[LANES][32] = {{0}};
    vf factor = vf_set1(scale);
    const int64_t padded = (n + width - 1) / width * width;
    if (transposed) {
        for (int64_t j = 0; j < padded; j += LANES) {
            float *panel = dst + j / width * width * words + j % width;
            if (rows)
                factor = scale * vf_load_part(rows + j0 + j,
                                              n - j < 0       ? 0
                                              : n - j < LANES ? n - j
                                                              : LANES,
                                              0);
            for (int64_t k = 0; k < kc; k += 32) {
                int64_t depth = kc - k < 32 ? kc - k : 32, count = words_of(form, depth);
                const float *source[LANES];
                if (pairs && depth < 32) memset(run, 0, sizeof run);
                for (int i = 0; i < LANES; i++) {
                    if (j + i < n)
                        source[i] = stored_run(format, w, j0 + j + i, k0 + k, depth, run[i]);
                    else source[i] = memset(run[i], 0, sizeof run[i]);
                    if (pairs && j + i < n)
                        source[i] = pairs_of_run(source[i], factor[i], run[i], form);
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
        for (int64_t j = 0; j < padded; j += 32) {
            int64_t count = !first || n < j ? 0 : n - j < 32 ? n - j : 32;
            if (count < 32) memset(run, 0, 2 * sizeof run[0]);
            const float *source =
                            count ? stored_run(format, w, k0 + k, j0 + j, count, run[0]) : run[0],
                        *source2 = run[1];
            if (second && count) source2 = stored_run(format, w, k0 + k + 1, j0 + j, count, run[1]);
            else if (pairs) memset(run[1], 0, sizeof run[1]);
            for (int64_t at = 0; at < 32 && j + at < padded; at += LANES) {
                int64_t col = j + at;
                vf v = vf_load(source + at) * factor;
                if (pairs)
                    v = (vf)vi_pair(before_rounding(v, form),
                                    before_rounding(vf_load(source2 + at) * factor2, form),
                                    is_native(form));
                vf_store(dst + col / width * width * words + (pairs ? k / 2 : k) * width +
                             col % width,
                         v);
            }
        }
    }
}

/* One function for each format, whose decoder it inlines, in tiles of full width; others for
 * narrower tiles, and for each form of pairs. */
typedef void (*b_packer)(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0,
                         int64_t kc, int width, float scale, const float *rows, float *dst);
#define B_PACKER(name, form, format, width) \
    static void name(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0, \
                     int64_t kc, int any_width UNUSED, float scale, const float *rows, \
                     float *dst) { \
        pack_b_as(form, format, w, transposed, j0, n, k0, kc, width, scale, rows, dst); \
    }
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    B_PACKER(pack_b_##name, FLOATS, PL_W_##name, NR)
#include "../../formats.def"
B_PACKER(pack_b_narrow, FLOATS, ANY_FORMAT, any_width)
B_PACKER(pack_b_pairs, PAIRS, ANY_FORMAT, any_width)
B_PACKER(pack_b_native_pairs, NATIVE_PAIRS, ANY_FORMAT, any_width)
B_PACKER(pack_b_emulated_amx, AMX_EMULATED, ANY_FORMAT, any_width)
#ifdef AMX_COMPILED
B_PACKER(pack_b_amx, AMX, ANY_FORMAT, any_width)
#endif
#undef B_PACKER

static void pack_b(const pl_weight *w, int transposed, int64_t j0, int64_t n, int64_t k0,
                   int64_t kc, int width, float scale, const float *rows, float *dst) {
    static const b_packer wide[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) pack_b_##name,
#include "../../formats.def"
    };
    const b_packer packer = width == NR ? wide[w->format] : pack_b_narrow;
    packer(w, transposed, j0, n, k0, kc, width, scale, rows, dst);
}
static const b_packer b_packers[] = {pack_b, pack_b_pairs, pack_b_native_pairs, pack_b_emulated_amx,
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
