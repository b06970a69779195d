/* What several families use: how work is cut, and sums in float64. */
#ifndef PYLOSS_COMMON_TPL_H
#define PYLOSS_COMMON_TPL_H

/* Elements of a piece: 32 KB, so that small calls run inline. */
enum { PIECE = 8192 };

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
/* How many items of `size` elements make a piece. */
INLINE int64_t grain_of(int64_t size) { return size >= PIECE ? 1 : PIECE / (size > 0 ? size : 1); }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* a . b in float64, several sums side by side. */
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

#endif
