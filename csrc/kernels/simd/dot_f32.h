/* Dot products of float32 rows. Several partial sums run in parallel: this is faster, and long rows
 * lose fewer digits. */
#ifndef PYLOSS_DOT_F32_H
#define PYLOSS_DOT_F32_H
#include "../pieces.h"
#include "vec.h"

/* a . b, computed in float64. */
INLINE double wide_dot(const float *a, const float *b, int64_t n) {
    typedef float half_vf __attribute__((vector_size(PL_BYTES / 2)));
    enum { SUMS = 4 };
    vd sum[SUMS] = {{0}};
    int64_t i = 0;
    for (; i + SUMS * DLANES <= n; i += SUMS * DLANES)
        for (int l = 0; l < SUMS; l++) {
            half_vf x, y;
            memcpy(&x, a + i + l * DLANES, sizeof x);
            memcpy(&y, b + i + l * DLANES, sizeof y);
            sum[l] += __builtin_convertvector(x, vd) * __builtin_convertvector(y, vd);
        }
    double total = vd_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++) total += (double)a[i] * b[i];
    return total;
}

/* Sum of a[i] b[i], or of a[i] b[i] w[i] unless w is NULL. */
INLINE float dot(const float *a, const float *b, const float *w, int64_t n) {
    enum { SUMS = 4 };
    vf sum[SUMS] = {{0}};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        for (int k = 0; k < SUMS; k++) {
            int64_t j = i + k * LANES;
            vf t = vf_load(a + j) * vf_load(b + j);
            sum[k] += w ? t * vf_load(w + j) : t;
        }
    for (; i < n; i += LANES) {
        int64_t m = at_most(LANES, n - i);
        vf t = vf_load_part(a + i, m, 0.0f) * vf_load_part(b + i, m, 0.0f);
        sum[0] += w ? t * vf_load_part(w + i, m, 0.0f) : t;
    }
    return vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

#endif
