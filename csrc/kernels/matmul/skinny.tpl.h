/* Products of a few rows of A times a transposed B, as in batched generation: up to SKINNY_M rows.
 *
 * Each element of C has the bits that gemv.tpl.h gives it: lane l of every run of 32 depths adds to
 * the same partial sum, in the same order. So a sequence's text does not depend on the sequences
 * that are generated with it. gemv keeps all partial sums of an element in registers. Here they are
 * computed a vector of each run at a time, in PHASES passes, so that the register tile is wide:
 *
 *                             b0      b1      b2      a panel: SKINNY_COLUMNS rows of B
 *   SKINNY_ROWS rows   a0 | acc 00  acc 01  acc 02
 *   of A               a1 | acc 10  acc 11  acc 12
 *
 * The pass of all rows of A stays in the first cache, while the panels of SKINNY_WIDTH columns,
 * expanded once for all rows, come from the second. Both are packed: vectors that lie 128 bytes
 * apart are in the same bank of the first cache, and could not be loaded in one cycle.
 *
 *   A      [phase][tile][run][row of the tile][lane]
 *   panel  [phase][run][column][lane] */
#ifndef PYLOSS_SKINNY_TPL_H
#define PYLOSS_SKINNY_TPL_H
#include "../pieces.h"
#include "../quant.tpl.h"
#include "../simd/transpose.h"
#include "../simd/vec.h"
#include "product.h"

enum {
    PHASES = 32 / LANES,
    SKINNY_ROWS = 4,
#if PL_BYTES == 64 || defined(__aarch64__)
    SKINNY_COLUMNS = 6, /* of 32 registers: 24 sums, 6 vectors of B, one of A */
#else
    SKINNY_COLUMNS = 3, /* of 16 registers: 12 sums, 3 vectors of B, one of A */
#endif
    SKINNY_WIDTH = SKINNY_COLUMNS * LANES, /* columns computed together: whole panels and vectors */
    SKINNY_DEPTH = 1536                    /* depths computed together, at most */
};

typedef struct {
    float panels[SKINNY_WIDTH * SKINNY_DEPTH];
    float sums[PHASES * SKINNY_M * SKINNY_WIDTH * LANES]; /* [phase][row][column][lane] */
} skinny_scratch;

/* Expands `runs` runs of a panel's rows of B, from depth k on. */
typedef void (*skinny_decoder)(const pl_weight *b, const int64_t *rows, int64_t k, int64_t runs,
                               float *panel);
#define PL_FORMAT(name, elements, bytes, decoder, kind) \
    static NOINLINE void skinny_panel_##name(const pl_weight *b, const int64_t *rows, int64_t k, \
                                             int64_t runs, float *panel) { \
        for (int c = 0; c < SKINNY_COLUMNS; c++) \
            for (int64_t i = 0; i < runs; i++) { \
                float run[32]; \
                run_##name(b, rows[c], k + 32 * i, run); \
                for (int64_t p = 0; p < PHASES; p++) \
                    vf_store(panel + ((p * runs + i) * SKINNY_COLUMNS + c) * LANES, \
                             vf_load(run + p * LANES)); \
            } \
    }
#include "../../formats.def"
static const skinny_decoder skinny_panel_of[PL_W_COUNT] = {
#define PL_FORMAT(name, elements, bytes, decoder, kind) skinny_panel_##name,
#include "../../formats.def"
};

/* What a pass over a tile of A and a panel does with sums[row][column]: it begins them, continues
 * them with later runs, or adds its own sums of another phase. */
enum { SKINNY_BEGIN, SKINNY_CONTINUE, SKINNY_ADD };

INLINE void skinny_tile(const float *a, const float *panel, int64_t runs, int how, float *sums,
                        const int rows) {
    vf acc[SKINNY_ROWS][SKINNY_COLUMNS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int c = 0; c < SKINNY_COLUMNS; c++)
            acc[i][c] = how == SKINNY_CONTINUE ? vf_load(sums + (i * SKINNY_WIDTH + c) * LANES)
                                               : vf_set1(0);
    for (int64_t r = 0; r < runs; r++, a += rows * LANES, panel += SKINNY_COLUMNS * LANES) {
        vf b[SKINNY_COLUMNS];
#pragma GCC unroll 6
        for (int c = 0; c < SKINNY_COLUMNS; c++) b[c] = vf_load(panel + c * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            vf ai = vf_load(a + i * LANES);
#pragma GCC unroll 6
            for (int c = 0; c < SKINNY_COLUMNS; c++) acc[i][c] = vf_fma(b[c], ai, acc[i][c]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int c = 0; c < SKINNY_COLUMNS; c++) {
            float *sum = sums + (i * SKINNY_WIDTH + c) * LANES;
            vf_store(sum, how == SKINNY_ADD ? vf_load(sum) + acc[i][c] : acc[i][c]);
        }
}
typedef void (*skinny_fn)(const float *a, const float *panel, int64_t runs, int how, float *sums);
#define SKINNY_TILE(rows) \
    static NOINLINE void skinny_tile_##rows(const float *a, const float *panel, int64_t runs, \
                                            int how, float *sums) { \
        skinny_tile(a, panel, runs, how, sums, rows); \
    }
SKINNY_TILE(1)
SKINNY_TILE(2)
SKINNY_TILE(3)
SKINNY_TILE(4)
#undef SKINNY_TILE
static const skinny_fn skinny_tiles[SKINNY_ROWS] = {skinny_tile_1, skinny_tile_2, skinny_tile_3,
                                                    skinny_tile_4};

/* The tiles of A: even parts of its rows. */
INLINE int64_t skinny_tiles_of(const gemm *g) { return (g->m + SKINNY_ROWS - 1) / SKINNY_ROWS; }
INLINE int64_t skinny_first_row(const gemm *g, int64_t tile) {
    return g->m * tile / skinny_tiles_of(g);
}

static void skinny_pack_a(const gemm *g, float *packed) {
    const int64_t runs = g->k / 32, tiles = skinny_tiles_of(g);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = skinny_first_row(g, t), rows = skinny_first_row(g, t + 1) - row;
        for (int64_t i = 0; i < rows; i++) {
            const float *a = g->a.data + (row + i) * g->a.stride;
            for (int64_t p = 0; p < PHASES; p++)
                for (int64_t r = 0; r < runs; r++)
                    vf_store(packed + ((p * g->m + row) * runs + r * rows + i) * LANES,
                             vf_load(a + r * 32 + p * LANES));
        }
    }
}

/* Adds `runs` runs, from run `first` on, of all rows of A and `panels` panels. With all runs at
 * once the phases need no sums of their own: each adds to those before it, as in gemv_rows. */
static void skinny_runs(const gemm *g, const float *packed, int64_t first, int64_t runs,
                        int64_t panels, skinny_scratch *x) {
    const int64_t tiles = skinny_tiles_of(g), own = runs < g->k / 32;
    for (int64_t phase = 0; phase < PHASES; phase++)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t row = skinny_first_row(g, t), rows = skinny_first_row(g, t + 1) - row;
                skinny_tiles[rows - 1](
                    packed + ((phase * g->m + row) * (g->k / 32) + first * rows) * LANES,
                    x->panels + (p * PHASES + phase) * runs * SKINNY_COLUMNS * LANES, runs,
                    first           ? SKINNY_CONTINUE
                    : own || !phase ? SKINNY_BEGIN
                                    : SKINNY_ADD,
                    x->sums + ((own * phase * SKINNY_M + row) * SKINNY_WIDTH + p * SKINNY_COLUMNS) *
                                  LANES);
            }
}

/* The sums of LANES columns and of `phases` phases, each in the order of gemv_rows and vf_sum. */
INLINE vf skinny_totals(const float *sums, const int phases) {
    float totals[LANES][LANES];
    const float *source[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        vf total = vf_load(sums + l * LANES);
#pragma GCC unroll 8
        for (int phase = 1; phase < phases; phase++)
            total += vf_load(sums + (phase * SKINNY_M * SKINNY_WIDTH + l) * LANES);
        vf_store(totals[l], total);
        source[l] = totals[l];
    }
    vf v[LANES];
    load_transposed(source, 0, v);
#pragma GCC unroll 4
    for (int h = LANES / 2; h; h /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < h; l++) v[l] += v[l + h];
    return v[0];
}

/* Columns [begin, end) of C. */
static void skinny_columns(const gemm *g, const float *packed, int64_t begin, int64_t end,
                           skinny_scratch *x) {
    const int64_t whole = g->k / 32 * 32, blocks = (whole + SKINNY_DEPTH - 1) / SKINNY_DEPTH,
                  depth = blocks ? round_up((whole + blocks - 1) / blocks, 32) : 0;
    const int plain = whole == g->k && !g->rank && !g->accumulate;
    for (int64_t o = begin; o < end; o += SKINNY_WIDTH) {
        const int64_t columns = at_most(SKINNY_WIDTH, end - o),
                      panels = (columns + SKINNY_COLUMNS - 1) / SKINNY_COLUMNS;
        int64_t rows[SKINNY_WIDTH]; /* of B; the last one fills a panel that reaches past `end` */
        for (int64_t c = 0; c < panels * SKINNY_COLUMNS; c++)
            rows[c] = pl_stored_row(&g->b, at_most(o + c, end - 1));
        int64_t k = 0;
        do {
            const int64_t runs = at_most(whole - k, depth) / 32;
            for (int64_t p = 0; p < panels; p++)
                skinny_panel_of[g->b.format](&g->b, rows + p * SKINNY_COLUMNS, k, runs,
                                             x->panels + p * SKINNY_COLUMNS * runs * 32);
            skinny_runs(g, packed, k / 32, runs, panels, x);
            k += depth;
        } while (k < whole);
        for (int64_t j = 0; j < columns; j += LANES) {
            const int64_t n = at_most(LANES, columns - j);
            const vf bias = g->bias ? vf_load_part(g->bias + o + j, n, 0) : vf_set1(0);
            vf factor = vf_set1(g->a.factor);
            if (g->b_row_factor) factor *= vf_load_part(g->b_row_factor + o + j, n, 0);
            float tail[LANES][32];
            for (int64_t c = 0; c < n && whole < g->k; c++)
                decoders[g->b.format](&g->b, rows[j + c], whole, g->k - whole, tail[c]);
            for (int64_t i = 0; i < g->m; i++) {
                const float *sums = x->sums + (i * SKINNY_WIDTH + j) * LANES;
                const vf sum = blocks > 1 ? skinny_totals(sums, PHASES) : skinny_totals(sums, 1);
                if (plain) {
                    vf_store_part(g->c + i * g->n + o + j, vf_fma(sum, factor, bias), n);
                    continue;
                }
                for (int64_t c = 0; c < n; c++) gemv_store(g, i, o + j + c, sum[c], tail[c], whole);
            }
        }
    }
}

#endif
