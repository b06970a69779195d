/* One matrix product: its operands and options, before it is known how they are multiplied. */
#ifndef PYLOSS_PRODUCT_H
#define PYLOSS_PRODUCT_H
#include "../../pyloss.h"
#include "../simd/vec.h"

/* Up to so many rows, rows of B are read once and multiplied as they come. */
enum { SMALL_M = 4 };

/* How the operands of a product lie packed: float32; or rounded to bfloat16, two depths to a word (see narrow.h), whose dots are
 * summed by float32 instructions or by the ones for them. */
enum { FLOATS, PAIRS, NATIVE_PAIRS };

/* The left operand [m, k] of a product, times a factor: rows of `stride` elements, or with `transposed` columns. */
typedef struct {
    const float *data;
    int64_t stride;
    int transposed;
    float factor;
} left;

typedef struct {
    int64_t m, n, k;
    left a;
    pl_weight b; /* [k, n], or [n, k] when b_transposed */
    int b_transposed;
    const float *b_rows; /* a factor for each row of B as it is stored, or NULL */
    const float *bias;   /* [n] or NULL */
    int accumulate;
    int form; /* of A and B while they are multiplied; FLOATS alone if A is transposed or has a factor */
    float *c; /* [m, n] */
    /* The low-rank branch; absent when rank is 0. */
    int64_t rank;
    const float *h_given; /* [m, rank], or NULL when H is computed */
    float *h;             /* [m, rank], written when computed */
    pl_weight p, u;       /* [k, rank] and [rank, n], or transposed */
    int p_transposed, u_transposed;
    float h_scale, u_scale;
} gemm;

INLINE pl_weight float_matrix(const float *data, int64_t rows, int64_t cols) {
    return (pl_weight){.data = (const uint8_t *)data,
                       .rows = rows,
                       .cols = cols,
                       .row_bytes = 4 * cols,
                       .format = PL_W_F32};
}

#endif
