/* What reads rows of stored matrices otherwise than to multiply: embeddings, and norms of rows, alone and with an adapter. */
#define INDEX long
#include "types.cl"
#include "quant.cl"

/* y[n,:] = w[ids[n],:] */
KERNEL embedding_forward(ARRAY(const int, ids), WEIGHT_PARAMETERS, ARRAY(float, y)) {
    TAKE_WEIGHT
    const long n = get_group_id(0), row = stored_row(&w, *ROW(ids, n));
    for (long i = LANE * 8; i < w.cols; i += GROUP * 8) {
        const float8 v = weight_run(&w, row, i);
        global float *to = ROW(y, n * w.cols + i);
        float a[8];
        vstore8(v, 0, a);
        for (int l = 0; l < min(8L, w.cols - i); l++) to[l] = a[l];
    }
}

#ifdef FP64
/* squares[o] = the sum of w[o,:]^2 */
KERNEL row_squares(WEIGHT_PARAMETERS, ARRAY(double, squares)) {
    GROUP_MEMORY
    TAKE_WEIGHT
    const long o = get_group_id(0), row = stored_row(&w, o);
    double8 sum = 0;
    for (long i = LANE * 8; i < w.cols; i += GROUP * 8) {
        const double8 v = convert_double8(weight_run(&w, row, i));
        sum = fma(v, v, sum);
    }
    const double4 four = sum.lo + sum.hi;
    const double2 two = four.lo + four.hi;
    const double total = group_sum(two.x + two.y);
    if (LANE == 0) *ROW(squares, o) = total;
}

/* norm[o] = |w[o,:] + scale (a b)[:,o]| from wa = (w a)^T and gb = (a^T a) b, both [R,O]; see kernels/norms.tpl.h. */
KERNEL adapted_norm(WEIGHT_PARAMETERS, ARRAY(const float, a), ARRAY(const float, b), ARRAY(const double, squares),
                    ARRAY(const float, wa), ARRAY(const float, gb), ARRAY(float, norm), double scale, long rank, long columns) {
    TAKE_WEIGHT
    const long o = get_global_id(0);
    if (o >= columns) return;
    double total = *ROW(squares, o), size = total;
    for (long r = 0; r < rank; r++) {
        const double factor = *ROW(b, r * columns + o);
        const double cross = 2 * scale * factor * *ROW(wa, r * columns + o);
        const double own = scale * scale * factor * *ROW(gb, r * columns + o);
        total += cross + own;
        size += fabs(cross) + fabs(own);
    }
    /* wa and gb are rounded: where an adapter takes most of a row away, what is left would be their rounding. */
    if (!(8 * total >= size)) {
        total = 0;
        const long row = stored_row(&w, o);
        for (long i = 0; i < w.cols; i += 8) {
            float run[8];
            vstore8(weight_run(&w, row, i), 0, run);
            for (long l = i; l < min(w.cols, i + 8); l++) {
                double product = 0;
                for (long r = 0; r < rank; r++) product += (double)*ROW(a, l * rank + r) * *ROW(b, r * columns + o);
                const double element = run[l - i] + scale * product;
                total += element * element;
            }
        }
    }
    *ROW(norm, o) = (float)sqrt(total);
}
#endif
