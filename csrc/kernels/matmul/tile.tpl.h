/* The register tile of a matrix product: MR rows of A times NR columns of B. For each depth, NV = 1
 * or 2 vectors of B are loaded, and each element of A is broadcast and multiplied with them:
 *
 *                     b0       b1        vectors of one depth of B
 *                   +--------+--------+
 *   broadcast a[0]  | acc 00 | acc 01 |
 *   broadcast a[1]  | acc 10 | acc 11 |  MR x NV accumulators, all in registers
 *        ..         |   ..   |   ..   |
 *   broadcast a[13] | acc d0 | acc d1 |
 *                   +--------+--------+
 *
 * AVX-512: 14 x 2 accumulators, two vectors of B and a broadcast fill 31 of 32 registers. */
#ifndef PYLOSS_TILE_TPL_H
#define PYLOSS_TILE_TPL_H
#include "../pieces.h"
#include "../simd/narrow.h"
#include "../simd/vec.h"
#include "product.h"

#if PL_BYTES == 64
enum { MR = 14 };
#elif PL_BYTES == 16 && defined(__aarch64__)
enum { MR = 12 };
#else
enum { MR = 6 };
#endif
enum { NR = 2 * LANES }; /* columns of a tile */

/* Words of packed A or B for a depth. AMX takes 32 depths a step. */
INLINE int64_t words_of(int form, int64_t depth) {
    if (form == FLOATS) return depth;
    return is_amx(form) ? round_up(depth, 32) / 2 : (depth + 1) / 2;
}

/* One tile: rows of A times columns of B (row stride ldb), then the low-rank branch a2 b2,
 * packed. */
typedef struct {
    int64_t k, ldb, k2; /* depths, k in words */
    const float *a, *b, *a2, *b2;
    int in_place;     /* A is read as it lies, MR rows of it; else from a packed panel */
    int64_t a_stride; /* in place: between rows; packed: rows of the panel */
    const float *bias;
    float *c;
    int64_t ldc;
    int rows, cols, add; /* valid part of the tile; add to C or store */
} tile_args;

/* Reads the rows of A, one depth after the other. In place, three rows share a pointer: p, p +
 * stride and p + 2 stride are each one address of an instruction. */
enum { A_POINTERS = (MR + 2) / 3 };
typedef struct {
    const float *p[A_POINTERS];
    int64_t stride;
} a_reader;

INLINE a_reader a_begin(const float *a, int64_t stride, const int in_place) {
    a_reader r = {{a}, stride};
    if (in_place)
        for (int i = 1; i < A_POINTERS; i++) r.p[i] = a + 3 * i * stride;
    return r;
}
INLINE const float *a_at(const a_reader *r, int row, const int in_place) {
    return in_place ? r->p[row / 3] + row % 3 * r->stride : r->p[0] + row;
}
INLINE void a_next(a_reader *r, const int in_place) {
    if (in_place) {
#pragma GCC unroll 5
        for (int i = 0; i < A_POINTERS; i++) r->p[i]++;
    } else {
        r->p[0] += r->stride;
    }
}

INLINE vi word_at(const float *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return vi_set1(word);
}

/* acc += A B over a depth. In place, A is more streams than the hardware prefetcher follows:
 * they are prefetched here. */
INLINE void tile_depth(vf acc[MR][2], a_reader a, const float *b, int64_t ldb, int64_t depth,
                       const int mr, const int nv, const int in_place, const int form) {
    enum { LINE = 16, AHEAD = 3 * LINE };
#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; k++) {
        if (in_place && k % LINE == 0) {
#pragma GCC unroll 14
            for (int i = 0; i < mr; i++) __builtin_prefetch(a_at(&a, i, 1) + AHEAD);
        }
        /* With few rows B is used once, and its rows may lie far apart in memory. */
        if (mr < MR) {
#pragma GCC unroll 2
            for (int l = 0; l < nv; l++) __builtin_prefetch(b + 2 * LINE * ldb + l * LANES);
        }
        vf b0 = vf_load(b), b1 = nv == 2 ? vf_load(b + LANES) : b0;
#pragma GCC unroll 14
        for (int i = 0; i < mr; i++) {
            if (form != FLOATS) {
                vi x = word_at(a_at(&a, i, in_place));
                acc[i][0] = vf_add_dots(acc[i][0], x, (vi)b0, form == NATIVE_PAIRS);
                if (nv == 2) acc[i][1] = vf_add_dots(acc[i][1], x, (vi)b1, form == NATIVE_PAIRS);
                continue;
            }
            vf x = vf_set1(*a_at(&a, i, in_place));
            acc[i][0] += x * b0;
            if (nv == 2) acc[i][1] += x * b1;
        }
        a_next(&a, in_place);
        b += ldb;
    }
}

/* Adds the bias to a tile of fewer columns than its vectors have, and stores it. */
static NOINLINE void store_edge(const tile_args *t, float (*edge)[NR]) {
    for (int i = 0; i < t->rows; i++) {
        float *c = t->c + i * t->ldc;
        for (int j = 0; j < t->cols; j++) {
            float y = edge[i][j] + (t->bias ? t->bias[j] : 0);
            c[j] = t->add ? c[j] + y : y;
        }
    }
}

/* mr, nv, in_place and form are constants in every instance, so that the accumulators live in
 * registers. */
INLINE void tile_body(const tile_args *t, const int mr, const int nv, const int in_place,
                      const int form) {
    vf acc[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) acc[i][j] = vf_set1(0);
    tile_depth(acc, a_begin(t->a, t->a_stride, in_place), t->b, t->ldb, t->k, mr, nv, in_place,
               form);
    tile_depth(acc, a_begin(t->a2, in_place ? mr : t->a_stride, 0), t->b2, nv * LANES, t->k2, mr,
               nv, 0, FLOATS);
    if (t->cols == nv * LANES) {
        vf bias0 = t->bias ? vf_load(t->bias) : vf_set1(0);
        vf bias1 = t->bias && nv == 2 ? vf_load(t->bias + LANES) : vf_set1(0);
#pragma GCC unroll 14
        for (int i = 0; i < mr; i++) {
            if (i >= t->rows) break;
            float *c = t->c + i * t->ldc;
            vf y0 = acc[i][0] + bias0;
            vf_store(c, t->add ? vf_load(c) + y0 : y0);
            if (nv == 2) {
                vf y1 = acc[i][1] + bias1;
                vf_store(c + LANES, t->add ? vf_load(c + LANES) + y1 : y1);
            }
        }
        return;
    }
    float edge[MR][NR];
#pragma GCC unroll 14
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) vf_store(edge[i] + j * LANES, acc[i][j]);
    store_edge(t, edge);
}

typedef void (*tile_fn)(const tile_args *t);
#define TILE(mr, nv) \
    static void tile_##mr##x##nv(const tile_args *t) { tile_body(t, mr, nv, 0, FLOATS); }
#define TILE_IN_PLACE(mr, nv) \
    static void tile_##mr##x##nv##_in_place(const tile_args *t) { tile_body(t, mr, nv, 1, FLOATS); }
TILE(1, 1)
TILE(1, 2)
TILE(2, 1)
TILE(2, 2)
TILE(4, 1)
TILE(4, 2)
#if PL_BYTES == 64
TILE(8, 1)
TILE(8, 2)
TILE(14, 1)
TILE(14, 2)
TILE_IN_PLACE(14, 1)
TILE_IN_PLACE(14, 2)
#elif PL_BYTES == 16 && defined(__aarch64__)
TILE(8, 1)
TILE(8, 2)
TILE(12, 1)
TILE(12, 2)
TILE_IN_PLACE(12, 1)
TILE_IN_PLACE(12, 2)
#else
TILE(6, 1)
TILE(6, 2)
TILE_IN_PLACE(6, 1)
TILE_IN_PLACE(6, 2)
#endif
#undef TILE
#undef TILE_IN_PLACE

static const struct {
    int mr;
    tile_fn fn[2];
} tiles[] = {{1, {tile_1x1, tile_1x2}},
             {2, {tile_2x1, tile_2x2}},
             {4, {tile_4x1, tile_4x2}},
#if PL_BYTES == 64
             {8, {tile_8x1, tile_8x2}},
             {14, {tile_14x1, tile_14x2}},
             {14, {tile_14x1_in_place, tile_14x2_in_place}}
#elif PL_BYTES == 16 && defined(__aarch64__)
             {8, {tile_8x1, tile_8x2}},
             {12, {tile_12x1, tile_12x2}},
             {12, {tile_12x1_in_place, tile_12x2_in_place}}
#else
             {6, {tile_6x1, tile_6x2}},
             {6, {tile_6x1_in_place, tile_6x2_in_place}}
#endif
};

/* The entry of `tiles` for this many rows of packed A; the entry after the last one reads A in
 * place. */
static int tile_kernel(int64_t rows) {
    int kernel = 0;
    while (tiles[kernel].mr < rows && tiles[kernel].mr < MR) kernel++;
    return kernel;
}

static void run_tile(const tile_args *t, int width) {
    tiles[tile_kernel(t->rows) + t->in_place].fn[width / LANES - 1](t);
}

/* Tiles of pairs always read MR rows of A in place; `rows` of them are stored. */
static void tile_pairs_x1(const tile_args *t) { tile_body(t, MR, 1, 1, PAIRS); }
static void tile_pairs_x2(const tile_args *t) { tile_body(t, MR, 2, 1, PAIRS); }
static void tile_native_pairs_x1(const tile_args *t) { tile_body(t, MR, 1, 1, NATIVE_PAIRS); }
static void tile_native_pairs_x2(const tile_args *t) { tile_body(t, MR, 2, 1, NATIVE_PAIRS); }

static void run_tile_of_pairs(const tile_args *t, int width, int form) {
    static const tile_fn fn[2][2] = {{tile_pairs_x1, tile_pairs_x2},
                                     {tile_native_pairs_x1, tile_native_pairs_x2}};
    fn[form == NATIVE_PAIRS][width / LANES - 1](t);
}

/* A full panel times at most LANES / 2 columns (ldb is LANES / 2), as adapters of small rank need:
 * whole vectors would waste half their lanes on padding. */
INLINE void tile_narrow_body(const tile_args *t, const int in_place) {
    typedef float half __attribute__((vector_size(PL_BYTES / 2)));
    half acc[MR] = {{0}};
    a_reader a = a_begin(t->a, t->a_stride, in_place);
    const float *b = t->b;
    for (int64_t k = 0; k < t->k; k++, b += LANES / 2) {
        half y;
        memcpy(&y, b, sizeof y);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) acc[i] += *a_at(&a, i, in_place) * y;
        a_next(&a, in_place);
    }
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++) {
        if (i >= t->rows) break;
        for (int j = 0; j < t->cols; j++)
            t->c[i * t->ldc + j] = acc[i][j] + (t->add ? t->c[i * t->ldc + j] : 0);
    }
}
static void tile_narrow(const tile_args *t) {
    if (t->in_place) tile_narrow_body(t, 1);
    else tile_narrow_body(t, 0);
}

#endif
