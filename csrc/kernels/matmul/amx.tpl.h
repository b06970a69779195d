/* Products by the tile unit of some processors (amx_tile, amx_bf16).
 *
 * The unit has eight tiles of 16 rows of 64 bytes. A tile of packed A holds 16 rows of a step of
 * 32 depths, a tile of packed B 16 columns of it, a tile of C 16 x 16 sums:
 *
 *                       b: word w of a row is column w,     A block of C is 2 x 2 tiles, so that
 *                          row i depths 2i, 2i + 1          each tile of A and B is used twice.
 *                     +------------------+
 *   a: row of A,      |  c (float32)     |
 *      word w is      |                  |
 *      depths 2w,     |                  |
 *      2w + 1         +------------------+
 *
 * The order of sums: in a step the 16 products of words' lower halves (even depths) and the 16 of
 * upper halves are summed apart, by fused multiply-adds from 0; both sums are added, and their sum
 * is added to c. Numbers below 2^-126 are 0 before and after each operation. */
#ifndef PYLOSS_AMX_TPL_H
#define PYLOSS_AMX_TPL_H
#include "../pieces.h"
#include "../simd/vec.h"
#include "pairs.h"
#include "product.h"

enum {
    AMX_SIDE = 16,                  /* rows of a tile, and words of its row */
    AMX_TILE = AMX_SIDE * AMX_SIDE, /* words */
    AMX_BLOCK = 2 * AMX_SIDE,       /* rows and columns of a block of C */
    AMX_ROW_BYTES = 4 * AMX_SIDE
};

/* Packed A: tiles of 16 rows, their steps of depth one after the other. Where row `row` begins, of
 * `words` words in all, and where its word k lies from there. */
INLINE float *amx_row(float *packed, int64_t row, int64_t words) {
    return packed + row / AMX_SIDE * AMX_SIDE * words + row % AMX_SIDE * AMX_SIDE;
}
INLINE int64_t amx_word(int64_t k) { return k / AMX_SIDE * AMX_TILE + k % AMX_SIDE; }

/* A strip of C: any number of rows, at most AMX_BLOCK columns. */
typedef struct {
    int64_t steps;  /* of depth */
    const float *a; /* tiles of 16 rows, `a_stride` floats from one to the next 16 rows, up to a
                     * whole AMX_BLOCK of rows */
    int64_t a_stride;
    const float *b; /* two panels of 16 columns, `b_stride` floats apart */
    int64_t b_stride;
    const float *bias; /* [AMX_BLOCK], where C begins, or NULL: 0 */
    float *c;
    int64_t ldc, rows;
    int cols, add; /* add to C; then there is no bias */
    int narrow;    /* C is bfloat16, and not added to */
} amx_args;

/* The unit's operations in plain C, under the names of the compiler's functions. */
typedef union {
    float sums[AMX_SIDE][AMX_SIDE];
    uint32_t words[AMX_SIDE][AMX_SIDE];
} amx_tile;

INLINE void emulated_zero(amx_tile *t, int to) { t[to] = (amx_tile){0}; }
INLINE void emulated_loadd(amx_tile *t, int to, const float *from, int64_t bytes) {
    for (int i = 0; i < AMX_SIDE; i++)
        memcpy(t[to].sums[i], (const char *)from + i * bytes, AMX_ROW_BYTES);
}
INLINE void emulated_stored(const amx_tile *t, int from, float *to, int64_t bytes) {
    for (int i = 0; i < AMX_SIDE; i++)
        memcpy((char *)to + i * bytes, t[from].sums[i], AMX_ROW_BYTES);
}
INLINE float flush_subnormal(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }
INLINE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return flush_subnormal(x);
}
/* sums[0, 16) += x y, with fused multiply-adds. */
INLINE void emulated_products(float *sums, float x, const float *y) {
    for (int j = 0; j < AMX_SIDE; j++) sums[j] = flush_subnormal(fmaf(x, y[j], sums[j]));
}
static NOINLINE void emulated_dpbf16ps(amx_tile *t, int c, int a, int b) {
    const uint32_t upper = 0xffff0000;
    float first[AMX_SIDE][AMX_SIDE], second[AMX_SIDE][AMX_SIDE];
    for (int k = 0; k < AMX_SIDE; k++)
        for (int j = 0; j < AMX_SIDE; j++) {
            first[k][j] = float_of_bits(t[b].words[k][j] << 16);
            second[k][j] = float_of_bits(t[b].words[k][j] & upper);
        }
    for (int i = 0; i < AMX_SIDE; i++) {
        float sum1[AMX_SIDE] = {0}, sum2[AMX_SIDE] = {0}, *sums = t[c].sums[i];
        for (int k = 0; k < AMX_SIDE; k++) {
            const uint32_t word = t[a].words[i][k];
            emulated_products(sum1, float_of_bits(word << 16), first[k]);
            emulated_products(sum2, float_of_bits(word & upper), second[k]);
        }
        for (int j = 0; j < AMX_SIDE; j++) {
            const float step = flush_subnormal(sum1[j] + sum2[j]);
            sums[j] = flush_subnormal(flush_subnormal(sums[j]) + step);
        }
    }
}

/* One operation of the unit: UNIT(dpbf16ps, c, a, b). The compiler's functions take tiles as
 * literals, and GCC's do not say that they read and write memory: hence the barriers. Functions
 * with these instructions are not inlined into functions that run on any processor. */
#if defined(PL_AMX) && PL_BYTES == 64
#define AMX_COMPILED
#define UNIT(operation, ...) \
    do { \
        if (native) _tile_##operation(__VA_ARGS__); \
        else emulated_##operation(tiles, __VA_ARGS__); \
    } while (0)
#define UNIT_BARRIER() __asm__ volatile("" ::: "memory")
/* A constant: GCC does not know that loadconfig reads all of it. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_shapes = {
    .palette = 1, .row_bytes = {[0 ... 7] = AMX_ROW_BYTES}, .rows = {[0 ... 7] = AMX_SIDE}};
static NOINLINE void amx_configure(void) { _tile_loadconfig(&amx_shapes); }
static NOINLINE void amx_release(void) { _tile_release(); }
#else
#define UNIT(operation, ...) emulated_##operation(tiles, __VA_ARGS__)
#define UNIT_BARRIER()
#endif

/* A block of C, in place: tiles 0 to 3 are its sums, 4 and 5 rows of A, 6 and 7 columns of B. It
 * begins with C (add), else with the bias in each row, or with 0. */
INLINE void amx_block(const amx_args *t, const float *a0, float *c, int64_t ldc,
                      const int native UNUSED) {
    amx_tile tiles[8];
    const float *a1 = a0 + t->a_stride, *b0 = t->b, *b1 = b0 + t->b_stride;
    float *below = c + AMX_SIDE * ldc;
    const int64_t row_bytes = 4 * ldc;
    UNIT_BARRIER();
    if (t->add || t->bias) {
        const float *from = t->add ? c : t->bias, *from_below = t->add ? below : t->bias;
        const int64_t bytes = t->add ? row_bytes : 0; /* from row to row */
        UNIT(loadd, 0, from, bytes);
        UNIT(loadd, 1, from + AMX_SIDE, bytes);
        UNIT(loadd, 2, from_below, bytes);
        UNIT(loadd, 3, from_below + AMX_SIDE, bytes);
    } else {
        UNIT(zero, 0);
        UNIT(zero, 1);
        UNIT(zero, 2);
        UNIT(zero, 3);
    }
    for (int64_t at = 0; at < t->steps * AMX_TILE; at += AMX_TILE) {
        UNIT(loadd, 4, a0 + at, AMX_ROW_BYTES);
        UNIT(loadd, 6, b0 + at, AMX_ROW_BYTES);
        UNIT(dpbf16ps, 0, 4, 6);
        UNIT(loadd, 7, b1 + at, AMX_ROW_BYTES);
        UNIT(dpbf16ps, 1, 4, 7);
        UNIT(loadd, 5, a1 + at, AMX_ROW_BYTES);
        UNIT(dpbf16ps, 2, 5, 6);
        UNIT(dpbf16ps, 3, 5, 7);
    }
    UNIT(stored, 0, c, row_bytes);
    UNIT(stored, 1, c + AMX_SIDE, row_bytes);
    UNIT(stored, 2, below, row_bytes);
    UNIT(stored, 3, below + AMX_SIDE, row_bytes);
    UNIT_BARRIER();
}

/* Rounds a block of C. */
INLINE void amx_store_narrow(const float *block, int64_t rows, int cols, uint16_t *c, int64_t ldc,
                             const int native) {
    const int form = native ? AMX : AMX_EMULATED;
    for (int64_t i = 0; i < rows; i++, block += AMX_BLOCK, c += ldc) {
        uint16_t row[AMX_BLOCK];
        for (int j = 0; j < AMX_BLOCK; j += 2 * LANES) {
            const vi words = pairs_of_two(vf_load(block + j), vf_load(block + j + LANES), form);
            memcpy(row + j, &words, sizeof words);
        }
        if (cols == AMX_BLOCK) memcpy(c, row, sizeof row);
        else memcpy(c, row, (size_t)cols * sizeof *c);
    }
}

INLINE void amx_strip_by(const amx_args *t, const int native) {
    for (int64_t row = 0; row < t->rows; row += AMX_BLOCK) {
        const float *a = t->a + row / AMX_SIDE * t->a_stride;
        float *c = t->c + (t->narrow ? 0 : row * t->ldc);
        const int64_t rows = at_most(t->rows - row, AMX_BLOCK);
        if (rows == AMX_BLOCK && t->cols == AMX_BLOCK && !t->narrow) {
            amx_block(t, a, c, t->ldc, native);
            continue;
        }
        float edge[AMX_BLOCK * AMX_BLOCK] = {0};
        const size_t bytes = (size_t)t->cols * sizeof *c;
        for (int64_t i = 0; i < rows && t->add; i++)
            memcpy(edge + i * AMX_BLOCK, c + i * t->ldc, bytes);
        amx_block(t, a, edge, AMX_BLOCK, native);
        if (t->narrow) {
            amx_store_narrow(edge, rows, t->cols, (uint16_t *)t->c + row * t->ldc, t->ldc, native);
            continue;
        }
        for (int64_t i = 0; i < rows; i++) memcpy(c + i * t->ldc, edge + i * AMX_BLOCK, bytes);
    }
}
static void amx_strip_emulated(const amx_args *t) { amx_strip_by(t, 0); }
#ifdef AMX_COMPILED
static NOINLINE void amx_strip_native(const amx_args *t) { amx_strip_by(t, 1); }
#endif

/* C (+)= A B where they lie: word w of row i of step s of A is a[i lda + s a_step + w], row i of B
 * (depths 2i, 2i + 1) is b[i ldb]. Rows and columns are multiples of AMX_BLOCK. */
typedef struct {
    int64_t rows, cols, steps;
    const float *a;
    int64_t lda, a_step;
    const float *b;
    int64_t ldb;
    float *c;
    int64_t ldc;
    int add;
} amx_product;

/* Half a block, 16 rows of C: c0 and c1 are its sums, a rows of A. Halves have tiles of their own,
 * so that one is stored while the next one is summed: at few steps quicker than whole blocks. */
#define HALF(c0, c1, a, at, to) \
    do { \
        if (t->add) { \
            UNIT(loadd, c0, to, row_bytes); \
            UNIT(loadd, c1, (to) + AMX_SIDE, row_bytes); \
        } else { \
            UNIT(zero, c0); \
            UNIT(zero, c1); \
        } \
        for (int64_t s = 0; s < t->steps; s++) { \
            const float *b = t->b + j + s * AMX_SIDE * t->ldb; \
            UNIT(loadd, a, (at) + s * t->a_step, a_bytes); \
            UNIT(loadd, 6, b, b_bytes); \
            UNIT(dpbf16ps, c0, a, 6); \
            UNIT(loadd, 7, b + AMX_SIDE, b_bytes); \
            UNIT(dpbf16ps, c1, a, 7); \
        } \
        UNIT(stored, c0, to, row_bytes); \
        UNIT(stored, c1, (to) + AMX_SIDE, row_bytes); \
    } while (0)

INLINE void amx_product_by(const amx_product *t, const int native UNUSED) {
    amx_tile tiles[8];
    const int64_t row_bytes = 4 * t->ldc, a_bytes = 4 * t->lda, b_bytes = 4 * t->ldb;
    UNIT_BARRIER();
    for (int64_t j = 0; j < t->cols; j += AMX_BLOCK)
        for (int64_t i = 0; i < t->rows; i += AMX_BLOCK) {
            const float *a = t->a + i * t->lda, *below = a + AMX_SIDE * t->lda;
            float *c = t->c + i * t->ldc + j, *c_below = c + AMX_SIDE * t->ldc;
            HALF(0, 1, 4, a, c);
            HALF(2, 3, 5, below, c_below);
        }
    UNIT_BARRIER();
}
#undef HALF
static void amx_product_emulated(const amx_product *t) { amx_product_by(t, 0); }
#ifdef AMX_COMPILED
static NOINLINE void amx_product_native(const amx_product *t) { amx_product_by(t, 1); }
#endif

/* The unit is this thread's between begin and end. */
UNUSED static void amx_begin(int form UNUSED) {
#ifdef AMX_COMPILED
    if (form == AMX) amx_configure();
#endif
}
UNUSED static void amx_end(int form UNUSED) {
#ifdef AMX_COMPILED
    if (form == AMX) amx_release();
#endif
}
UNUSED static void amx_strip(const amx_args *t, int form UNUSED) {
#ifdef AMX_COMPILED
    if (form == AMX) {
        amx_strip_native(t);
        return;
    }
#endif
    amx_strip_emulated(t);
}
UNUSED static void amx_multiply(const amx_product *t, int form UNUSED) {
#ifdef AMX_COMPILED
    if (form == AMX) {
        amx_product_native(t);
        return;
    }
#endif
    amx_product_emulated(t);
}

/* The form of the process's precision, if it is one of tiles; else FLOATS. */
static int amx_form(void) {
    switch (pl_matmul_precision()) {
#ifdef AMX_COMPILED
    case PL_INT8_TILES:
    case PL_BFLOAT16_TILES: return AMX;
#else
    case PL_INT8_TILES:
    case PL_BFLOAT16_TILES:
#endif
    case PL_BFLOAT16_TILES_EMULATED: return AMX_EMULATED;
    default: return FLOATS;
    }
}

#undef UNIT
#undef UNIT_BARRIER
#endif
