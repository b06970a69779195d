/* One matrix product: its operands and options, before it is known how they are multiplied. */
#ifndef PYLOSS_PRODUCT_H
#define PYLOSS_PRODUCT_H
#include "../../pyloss.h"
#include "../simd/vec.h"

/* Products of at most SMALL_M rows are matrix-vector products (gemv.tpl.h). Those of at most
 * SKINNY_M rows sum in the same order (skinny.tpl.h). */
enum { SMALL_M = 4, SKINNY_M = 32 };

/* How operands are packed: as float32, or rounded to bfloat16 with two depths to a word (see
 * narrow.h). PAIRS multiplies these words by float32 instructions, NATIVE_PAIRS by bfloat16
 * ones. AMX multiplies tiles of them (amx.tpl.h); AMX_EMULATED computes the same bits on any
 * processor. INT8 rounds A to bytes and takes B's codes (int8.tpl.h), INT8_DOTS by the processor's
 * instructions for dots of bytes. */
enum { FLOATS, PAIRS, NATIVE_PAIRS, AMX_EMULATED, AMX, INT8, INT8_DOTS };
INLINE int is_amx(int form) { return form == AMX_EMULATED || form == AMX; }
INLINE int is_int8(int form) { return form == INT8 || form == INT8_DOTS; }

/* The left operand A [m, k], times a factor: rows of `stride` elements, or columns if
 * transposed. */
typedef struct {
    const float *data; /* or of bfloat16, with `narrow` */
    int64_t stride;
    int transposed;
    float factor;
    int narrow; /* only transposed, or in forms of tiles */
} lhs;

/* C[m, n] (+)= bias + A B + up_scale L U, with L = down_scale A D or given. D (down) and U (up) are
 * the low-rank branch of an adapter: in the forward pass L is x a, in the backward pass dy b^T. */
typedef struct {
    int64_t m, n, k;
    lhs a;
    pl_weight b; /* [k, n], or [n, k] when b_transposed */
    int b_transposed;
    const float *b_row_factor; /* one for each stored row of B, or NULL */
    const float *bias;         /* [n] or NULL; not with accumulate */
    int accumulate;
    int form;   /* of packed A and B; FLOATS if A has a factor */
    float *c;   /* [m, n] */
    int narrow; /* C is bfloat16; for tiles of one block of depth (narrow_fits), not accumulated */
    /* The low-rank branch; absent when rank is 0. */
    int64_t rank;
    const float *low_given; /* [m, rank], or NULL when L is computed */
    float *low;             /* [m, rank], written when computed */
    pl_weight down, up;     /* [k, rank] and [rank, n], or transposed */
    int down_transposed, up_transposed;
    float down_scale, up_scale;
} gemm;

/* A matrix of floats; `act_matrix` may be bfloat16. */
INLINE pl_weight float_matrix(const float *data, int64_t rows, int64_t cols) {
    return (pl_weight){.data = (const uint8_t *)data,
                       .rows = rows,
                       .cols = cols,
                       .row_bytes = 4 * cols,
                       .format = PL_W_F32};
}
INLINE pl_weight act_matrix(pl_act data, int64_t rows, int64_t cols) {
    pl_weight w = float_matrix(data.data, rows, cols);
    if (data.narrow) w.format = PL_W_BF16, w.row_bytes = 2 * cols;
    return w;
}

#endif
