/* The products of attention's tiles: small matrices in the cache, multiplied without packing. The
 * causal mask makes A triangular; depths at which all rows of a register tile are 0 are skipped. */
#ifndef PYLOSS_ATTENTION_TILE_TPL_H
#define PYLOSS_ATTENTION_TILE_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"

#if PL_BYTES == 64 || defined(__aarch64__)
enum { ATTN_ROWS = 8 }; /* rows of the register tile, two vectors wide */
#else
enum { ATTN_ROWS = 6 };
#endif
enum { ATTN_PANEL = 2 * LANES };

/* C = A B + factor C, or A B if factor is NULL. Element (i, k) of A is a[i * lda + k] by row,
 * a[i + k * lda] by column. */
typedef struct {
    int64_t rows, columns, depth; /* columns: a multiple of a vector */
    const float *a;
    int64_t lda;
    const float *b;
    int64_t ldb;
    float *c;
    int64_t ldc;
    const float *factor; /* per row */
} attn_product;

/* A register tile: rows [i0, i0 + rows) and nv vectors of columns from j on, at depths [from, to).
 * rows, nv and by_column are constants. */
INLINE void attn_tile(const attn_product *t, const int rows, const int nv, const int by_column,
                      int64_t i0, int64_t j, int64_t from, int64_t to) {
    int64_t lda = t->lda, ldb = t->ldb, ldc = t->ldc;
    const float *a = t->a + i0 * (by_column ? 1 : lda), *b = t->b + j;
    float *c = t->c + i0 * ldc + j;
    vf acc[ATTN_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int l = 0; l < nv; l++)
            acc[i][l] =
                t->factor ? vf_load(c + i * ldc + l * LANES) * t->factor[i0 + i] : vf_set1(0);
    for (int64_t k = from; k < to; k++) {
        vf b0 = vf_load(b + k * ldb), b1 = nv == 2 ? vf_load(b + k * ldb + LANES) : b0;
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            vf x = vf_set1(by_column ? a[k * lda + i] : a[i * lda + k]);
            acc[i][0] += x * b0;
            if (nv == 2) acc[i][1] += x * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int l = 0; l < nv; l++) vf_store(c + i * ldc + l * LANES, acc[i][l]);
}

/* The depths at which A is not 0: in row i from first + i step on, and unless `until` is NULL
 * before until[i] - base. Both bounds grow with i. */
typedef struct {
    int64_t first, step;
    const int32_t *until;
    int64_t base;
} attn_band;

INLINE void attn_tile_in_band(const attn_product *t, const attn_band *band, const int rows,
                              const int nv, const int by_column, int64_t i, int64_t j) {
    int64_t from = band->first + i * band->step, to = t->depth;
    if (band->until) to = at_most(band->until[i + rows - 1] - band->base, to);
    attn_tile(t, rows, nv, by_column, i, j, from > 0 ? from : 0, to);
}

INLINE void attn_panel(const attn_product *t, const attn_band *band, const int nv,
                       const int by_column, int64_t j) {
    int64_t i = 0;
    for (; i + ATTN_ROWS <= t->rows; i += ATTN_ROWS)
        attn_tile_in_band(t, band, ATTN_ROWS, nv, by_column, i, j);
    int64_t rest = t->rows - i;
    if (rest & 4) attn_tile_in_band(t, band, 4, nv, by_column, i, j);
    if (rest & 2) attn_tile_in_band(t, band, 2, nv, by_column, i + (rest & 4), j);
    if (rest & 1) attn_tile_in_band(t, band, 1, nv, by_column, i + (rest & 6), j);
}

INLINE void attn_multiply(const attn_product *t, const attn_band *band, const int by_column) {
    int64_t j = 0;
    for (; j + ATTN_PANEL <= t->columns; j += ATTN_PANEL) attn_panel(t, band, 2, by_column, j);
    if (j < t->columns) attn_panel(t, band, 1, by_column, j);
}
static void attn_by_row(attn_product t, int64_t first, int64_t step) {
    attn_band band = {first, step, NULL, 0};
    attn_multiply(&t, &band, 0);
}
static void attn_by_column(attn_product t, const int32_t *until, int64_t base) {
    attn_band band = {0, 0, until, base};
    attn_multiply(&t, &band, 1);
}

#endif
