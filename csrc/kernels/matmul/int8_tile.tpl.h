/* Rows of A rounded to bytes, and the tiles that multiply them with expanded columns, for products
 * in int8 (int8.tpl.h). */
#ifndef PYLOSS_INT8_TILE_TPL_H
#define PYLOSS_INT8_TILE_TPL_H
#include "../pieces.h"
#include "int8_codes.tpl.h"

enum { INT8_COLUMNS = INT8_VECTORS * LANES };

/* Rows of a tile. In 32 registers: 12 dots, 12 sums, and what they are made of. */
#if PL_BYTES == 64 || (defined(PL_DOTS) && defined(__aarch64__))
#define INT8_ROWS 6
#elif PL_BYTES == 32 && defined(PL_DOTS)
#define INT8_ROWS 3
#else
#define INT8_ROWS 2
#endif

/* A run of a row of A: bytes, and for 32 depths or both of its halves where their dots begin, minus
 * the code of 0 as it is kept times the sum of the bytes, and this sum times the scale. */
typedef struct {
    int8_t codes[32];
    float scale;
    int32_t begin[2];
    float sums[2];
    float unused[3];
} int8_run;

/* ---- A */

/* Numbers below this count as 0 if all 32 of a run are: 127 divided by them could overflow. */
#define INT8_LEAST 0x1p-100f

INLINE void int8_round_run(const float *x, const int format, int8_run *out) {
    vi top = vi_set1(0), codes[32 / LANES];
    for (int l = 0; l < 32 / LANES; l++) {
        const vi bits = (vi)vf_load(x + l * LANES) & 0x7fffffff;
        top = (vi)vf_select(vi_less(top, bits), (vf)bits, (vf)top);
    }
    /* Bits of numbers without sign are ordered as they are; those of NaN are the largest. */
    const int32_t most = vi_hmax(top);
    float largest, inverse = 0;
    memcpy(&largest, &most, sizeof largest);
    if (most >= 0x7f800000) out->scale = NAN; /* of all results of the row */
    else out->scale = largest < INT8_LEAST ? 0 : largest / 127;
    if (out->scale > 0) inverse = 127 / largest;
    for (int l = 0; l < 32 / LANES; l++)
        codes[l] = out->scale > 0 ? vi_nearest(vf_load(x + l * LANES) * inverse) : vi_set1(0);
    if (int8_depth(format, 1) == 1) {
        for (int l = 0; l < 32 / LANES; l++) vi_store_bytes(out->codes + l * LANES, codes[l]);
    } else {
        int8_t ordered[32];
        for (int l = 0; l < 32 / LANES; l++) vi_store_bytes(ordered + l * LANES, codes[l]);
        for (int i = 0; i < 32; i++) out->codes[i] = ordered[int8_depth(format, i)];
    }
    vi half[2] = {codes[0], codes[16 / LANES]};
    for (int l = 1; l < 16 / LANES; l++) {
        half[0] += codes[l];
        half[1] += codes[16 / LANES + l];
    }
    int32_t sums[2] = {vi_sum(half[0]), vi_sum(half[1])};
    if (!int8_halves(format)) sums[0] += sums[1];
    for (int h = 0; h < 2; h++) {
        out->begin[h] = (CODE_SHIFT - int8_zero(format)) * sums[h];
        out->sums[h] = (float)sums[h] * out->scale;
    }
}

/* Formats differ by the order of the bytes alone, and by numbers. */
static void int8_round_row(const float *x, int64_t runs, int format, int8_run *out) {
    for (int64_t r = 0; r < runs; r++) int8_round_run(x + 32 * r, format, out + r);
}

/* ---- Tiles */

/* Adds `runs` runs to sums [row][vector], which begin as 0 with `first`. x: the first run of the
 * first row; rows lie `stride` runs apart. The number of rows is a constant; so is `wide`, where
 * dots depend on it. */
typedef struct {
    const int8_run *x;
    int64_t stride, runs;
    int8_panel panel;
    int first, halves, offsets;
    float *sums;
} int8_tile;

INLINE void int8_tile_rows(const int8_tile *t, const int rows, const int wide) {
    byte_dots dot[INT8_ROWS][INT8_VECTORS];
    vf sum[INT8_ROWS][INT8_VECTORS];
    const int8_run *x = t->x;
    const vw *codes = t->panel.codes;
    const vf *scales = t->panel.scales, *offsets = t->panel.offsets;
    const int64_t stride = t->stride;
    const int halves = t->halves;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < INT8_VECTORS; v++)
            sum[i][v] = t->first ? vf_set1(0) : vf_load(t->sums + (i * INT8_VECTORS + v) * LANES);
    for (int64_t r = 0; r < t->runs; r++, x++) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            if (h == 0 || halves) {
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                    for (int v = 0; v < INT8_VECTORS; v++)
                        dot[i][v] = dots_begin(x[i * stride].begin[h]);
            }
#pragma GCC unroll 4
            for (int s = 4 * h; s < 4 * h + 4; s++, codes += INT8_VECTORS)
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) {
                    int32_t four;
                    memcpy(&four, x[i * stride].codes + 4 * s, sizeof four);
#pragma GCC unroll 2
                    for (int v = 0; v < INT8_VECTORS; v++) {
                        dot[i][v] = dots_add(dot[i][v], codes[v], vi_set1(four), wide);
                        dots_now(&dot[i][v], wide);
                    }
                }
            if (h == 0 && !halves) continue;
            const int at = halves ? h : 0;
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int v = 0; v < INT8_VECTORS; v++) {
                    const vi total = dots_total(dot[i][v], x[i * stride].begin[at], wide);
                    const vf scale = scales[at * INT8_VECTORS + v] * x[i * stride].scale;
                    sum[i][v] = vf_fma_once(vf_from_codes(total), scale, sum[i][v]);
                }
            if (!t->offsets) continue;
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int v = 0; v < INT8_VECTORS; v++)
                    sum[i][v] = vf_fma_once(offsets[at * INT8_VECTORS + v],
                                            vf_set1(x[i * stride].sums[at]), sum[i][v]);
        }
        scales += 2 * INT8_VECTORS;
        offsets += 2 * INT8_VECTORS;
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < INT8_VECTORS; v++)
            vf_store(t->sums + (i * INT8_VECTORS + v) * LANES, sum[i][v]);
}

typedef void (*int8_tile_fn)(const int8_tile *t);
#define INT8_TILE(rows) \
    static NOINLINE void int8_tile_##rows(const int8_tile *t) { int8_tile_rows(t, rows, 1); } \
    static NOINLINE void int8_narrow_tile_##rows(const int8_tile *t) { int8_tile_rows(t, rows, 0); }
#if defined(PL_DOTS) || PL_BYTES == 16
#undef INT8_TILE
#define INT8_TILE(rows) \
    static NOINLINE void int8_tile_##rows(const int8_tile *t) { int8_tile_rows(t, rows, 1); }
#define int8_narrow_tile_1 int8_tile_1
#define int8_narrow_tile_2 int8_tile_2
#define int8_narrow_tile_3 int8_tile_3
#define int8_narrow_tile_4 int8_tile_4
#define int8_narrow_tile_5 int8_tile_5
#define int8_narrow_tile_6 int8_tile_6
#endif
INT8_TILE(1)
INT8_TILE(2)
#if INT8_ROWS >= 3
INT8_TILE(3)
#endif
#if INT8_ROWS == 6
INT8_TILE(4)
INT8_TILE(5)
INT8_TILE(6)
#endif
#undef INT8_TILE
/* By whether codes are wide, and by the rows. */
static const int8_tile_fn int8_tiles[2][INT8_ROWS] = {
    {
        int8_narrow_tile_1,
        int8_narrow_tile_2,
#if INT8_ROWS >= 3
        int8_narrow_tile_3,
#endif
#if INT8_ROWS == 6
        int8_narrow_tile_4,
        int8_narrow_tile_5,
        int8_narrow_tile_6,
#endif
    },
    {
        int8_tile_1,
        int8_tile_2,
#if INT8_ROWS >= 3
        int8_tile_3,
#endif
#if INT8_ROWS == 6
        int8_tile_4,
        int8_tile_5,
        int8_tile_6,
#endif
    },
};

#endif
