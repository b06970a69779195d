/* Reductions of the middle axis of x [o, n, d], with the results of kernels/layers/axes.tpl.h. */
#include "each.cl"

enum { AXIS_SUM, AXIS_MAX, AXIS_MIN };

INLINE float larger(float a, float b) { return a != a || a > b ? a : b; }

/* One work-item for each result. */
KERNEL axis_columns(IN(x), OUT(y), long kind, float factor, long rows, long d, long n) {
    MINE;
    for (long at = i; at < min(i + WIDTH, n); at++) {
        const global float *from = ROW(x, at / d * rows * d + at % d);
        exact sum = {0, 0};
        float best = -INFINITY;
        for (long r = 0; r < rows; r++) {
            const float v = from[r * d];
            if (kind == AXIS_SUM) add_to(&sum, v);
            else best = larger(kind == AXIS_MAX ? v : -v, best);
        }
        *ROW(y, at) = kind == AXIS_SUM   ? (float)(value_of(sum) * factor)
                      : rows == 0        ? NAN
                      : kind == AXIS_MAX ? best
                                         : -best;
    }
}

/* One work-item for each result: d is any. dx = dy, in even shares, where x is the extreme y. */
KERNEL axis_extreme_grad(IN(dy), IN(x), IN(y), OUT(dx), long rows, long d, long n) {
    MINE;
    for (long at = i; at < min(i + WIDTH, n); at++) {
        const long first = at / d * rows * d + at % d;
        const float best = *ROW(y, at);
        long count = 0;
        for (long r = 0; r < rows; r++) count += *ROW(x, first + r * d) == best;
        const float share = *ROW(dy, at) / (float)max(count, 1L);
        for (long r = 0; r < rows; r++)
            *ROW(dx, first + r * d) = *ROW(x, first + r * d) == best ? share : 0;
    }
}

/* The largest of a group's values; NaN if one is. */
#define GROUP_LARGEST(best) (group_max((SCALAR)(best != best)) > 0 ? NAN : (float)group_max(best))

/* One group for each row: d is 1. */
KERNEL axis_rows(IN(x), OUT(y), long kind, float factor, long n) {
    GROUP_MEMORY
    const long row = get_group_id(0);
    const global float *from = ROW(x, row * n);
    exact sum = {0, 0};
    float best = -INFINITY;
    for (long i = LANE; i < n; i += GROUP) {
        if (kind == AXIS_SUM) add_to(&sum, from[i]);
        else best = larger(kind == AXIS_MAX ? from[i] : -from[i], best);
    }
    sum = group_exact(sum);
    best = GROUP_LARGEST(best);
    if (LANE == 0)
        *ROW(y, row) = kind == AXIS_SUM   ? (float)(value_of(sum) * factor)
                       : n == 0           ? NAN
                       : kind == AXIS_MAX ? best
                                          : -best;
}

KERNEL row_logsumexp(IN(x), OUT(y), long n) {
    GROUP_MEMORY
    const long row = get_group_id(0);
    const global float *from = ROW(x, row * n);
    float best = -INFINITY;
    for (long i = LANE; i < n; i += GROUP) best = larger(from[i], best);
    best = GROUP_LARGEST(best);
    const int finite = fabs(best) < INFINITY;
    SCALAR sum = 0;
    for (long i = LANE; finite && i < n; i += GROUP) sum += exp(from[i] - best);
    sum = group_sum(sum);
    if (LANE == 0) *ROW(y, row) = finite ? (float)(best + log(sum)) : best;
}

KERNEL row_logsumexp_grad(IN(dy), IN(x), IN(y), OUT(dx), long v, long n) {
    MINE;
    for (long at = i; at < min(i + WIDTH, n); at++) {
        const long row = at / v;
        const float of_row = *ROW(y, row);
        *ROW(dx, at) = *ROW(dy, row) * exp(*ROW(x, at) - (of_row == -INFINITY ? 0 : of_row));
    }
}

/* dx = y (dy - sum y dy); logarithm: dx = dy - e^y sum dy */
KERNEL row_softmax_grad(IN(dy), IN(y), OUT(dx), long logarithm, long n) {
    GROUP_MEMORY
    const long begin = get_group_id(0) * n;
    const global float *from_dy = ROW(dy, begin), *from_y = ROW(y, begin);
    SCALAR sum = 0;
    for (long i = LANE; i < n; i += GROUP) sum += from_dy[i] * (logarithm ? 1 : from_y[i]);
    const float total = (float)group_sum(sum);
    for (long i = LANE; i < n; i += GROUP)
        *ROW(dx, begin + i) = logarithm ? from_dy[i] - exp(from_y[i]) * total
                                        : from_y[i] * (from_dy[i] - total);
}

/* One work-item for each row. */
KERNEL row_cumsum(IN(x), OUT(y), long reverse, long v, long n) {
    const long row = get_global_id(0);
    if (row >= n) return;
    exact sum = {0, 0};
    for (long j = 0; j < v; j++) {
        const long at = row * v + (reverse ? v - 1 - j : j);
        add_to(&sum, *ROW(x, at));
        *ROW(y, at) = (float)value_of(sum);
    }
}

/* y = mask ? a : b, of three axes as map_pair in maps.cl. */
KERNEL select_pair(ARRAY(const uchar, mask), IN(a), IN(b), OUT(y), long middle, long last, long m0,
                   long m1, long m2, long a0, long a1, long a2, long b0, long b1, long b2, long n) {
    MINE;
    for (long at = i; at < min(i + WIDTH, n); at++) {
        const long row = at / last, j = at % last, o = row / middle, m = row % middle;
        *ROW(y, at) = *ROW(mask, o * m0 + m * m1 + j * m2) ? *ROW(a, o * a0 + m * a1 + j * a2)
                                                           : *ROW(b, o * b0 + m * b1 + j * b2);
    }
}
