/* Rows of stored matrices outside of products: embeddings, and norms of rows without and with an
 * adapter. */
#define INDEX long
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

/* The sum of w[o,:]^2, computed by the group. */
INLINE exact squared_row(const weight *w, long o, local SCALAR *group_memory) {
    const long row = stored_row(w, o);
    exact sums[8];
    for (int l = 0; l < 8; l++) sums[l].sum = sums[l].rest = 0;
    for (long i = LANE * 8; i < w->cols; i += GROUP * 8) {
        float run[8];
        vstore8(weight_run(w, row, i), 0, run);
        for (int l = 0; l < 8; l++) add_product(&sums[l], run[l], run[l]);
    }
    for (int h = 4; h; h /= 2)
        for (int l = 0; l < h; l++) add_exact(&sums[l], sums[l + h]);
    return group_exact(sums[0]);
}
KERNEL row_squares(WEIGHT_PARAMETERS, ARRAY(stored_wide, squares)) {
    GROUP_MEMORY
    TAKE_WEIGHT
    const exact total = squared_row(&w, get_group_id(0), GROUP_POINTER);
    if (LANE == 0) put_wide(total, ROW(squares, get_group_id(0)));
}
KERNEL row_norms(WEIGHT_PARAMETERS, ARRAY(float, norms)) {
    GROUP_MEMORY
    TAKE_WEIGHT
    const exact total = squared_row(&w, get_group_id(0), GROUP_POINTER);
    if (LANE == 0) *ROW(norms, get_group_id(0)) = (float)sqrt(value_of(total));
}

/* norm[o] = |w[o,:] + scale (a b)[:,o]| from wa = (w a)^T and gb = (a^T a) b, both [R,O], as in
 * kernels/matmul/norms.tpl.h. */
KERNEL adapted_norm(WEIGHT_PARAMETERS, ARRAY(const float, a), ARRAY(const float, b),
                    ARRAY(const stored_wide, squares), ARRAY(const float, wa),
                    ARRAY(const float, gb), ARRAY(float, norm), SCALAR scale, long rank,
                    long columns) {
    TAKE_WEIGHT
    const long o = get_global_id(0);
    if (o >= columns) return;
    exact total = take_wide(ROW(squares, o));
    SCALAR size = total.sum;
    for (long r = 0; r < rank; r++) {
        const SCALAR factor = *ROW(b, r * columns + o);
        const SCALAR cross = 2 * scale * factor * *ROW(wa, r * columns + o);
        const SCALAR own = scale * scale * factor * *ROW(gb, r * columns + o);
        add_to(&total, cross);
        add_to(&total, own);
        size += fabs(cross) + fabs(own);
    }
    /* If the adapter cancels most of a row, the rounding of wa and gb would dominate: recompute. */
    if (!(8 * value_of(total) >= size)) {
        total.sum = total.rest = 0;
        const long row = stored_row(&w, o);
        for (long i = 0; i < w.cols; i += 8) {
            float run[8];
            vstore8(weight_run(&w, row, i), 0, run);
            for (long l = i; l < min(w.cols, i + 8); l++) {
                exact product = {0, 0}, element = {run[l - i], 0};
                for (long r = 0; r < rank; r++)
                    add_product(&product, *ROW(a, l * rank + r), *ROW(b, r * columns + o));
                add_product(&element, scale, product.sum);
                element.rest += scale * product.rest;
                const SCALAR sum = value_of(element);
                add_product(&total, sum, sum);
            }
        }
    }
    *ROW(norm, o) = (float)sqrt(value_of(total));
}

/* dm[o] as in kernels/matmul/norms.tpl.h, by a group. */
KERNEL magnitude_grad(ARRAY(const float, dots), ARRAY(const float, m), ARRAY(const float, norm),
                      ARRAY(const float, dy), ARRAY(const float, x), WEIGHT_PARAMETERS,
                      ARRAY(const float, xa), ARRAY(const float, b), ARRAY(float, dm), SCALAR scale,
                      long rows, long rank, long columns) {
    GROUP_MEMORY
    TAKE_WEIGHT
    const long o = get_group_id(0);
    const float length = *ROW(m, o), divisor = *ROW(norm, o);
    exact total = {0, 0};
    const int exactly = divisor != 0 && fabs(length / divisor) < 0x1p-10f;
    if (exactly) {
        const long row = stored_row(&w, o);
        for (long n = LANE; n < rows; n += GROUP) {
            exact sum = {0, 0}, low = {0, 0};
            for (long i = 0; i < w.cols; i += 8) {
                float run[8];
                vstore8(weight_run(&w, row, i), 0, run);
                for (long l = i; l < min(w.cols, i + 8); l++)
                    add_product(&sum, run[l - i], *ROW(x, n * w.cols + l));
            }
            for (long r = 0; r < rank; r++)
                add_product(&low, *ROW(xa, n * rank + r), *ROW(b, r * columns + o));
            add_product(&sum, scale, value_of(low));
            add_product(&total, *ROW(dy, n * columns + o), value_of(sum));
        }
    }
    total = group_exact(total);
    if (LANE) return;
    if (exactly) *ROW(dm, o) = (float)(value_of(total) / divisor);
    else *ROW(dm, o) = length == 0 ? 0 : *ROW(dots, o) / length;
}
