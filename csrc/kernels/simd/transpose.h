/* Transposition in registers. */
#ifndef PYLOSS_TRANSPOSE_H
#define PYLOSS_TRANSPOSE_H

#include "vec.h"

#if !defined(__clang__)
/* Interleaves a and b within each group of four lanes: the first two lanes of both, or with `last`
 * the last two, alternating every `width` lanes. */
INLINE vf interleave(vf a, vf b, const int last, const int width) {
    vi from;
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        int in_four = l % 4, at = width == 1 ? in_four / 2 : in_four % 2;
        int of_b = width == 1 ? in_four % 2 : in_four / 2;
        from[l] = l - in_four + at + 2 * last + of_b * LANES;
    }
    return __builtin_shuffle(a, b, from);
}
#endif

/* v[k][i] = source[i][at + k]: transposes LANES rows of LANES elements. vf_load_fours loads four
 * elements of every fourth row, so that only 4 x 4 blocks remain to be transposed. */
INLINE void load_transposed(const float *const source[LANES], int64_t at, vf v[LANES]) {
#if defined(__clang__)
    float to[LANES][LANES];
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++) to[k][i] = source[i][at + k];
    memcpy(v, to, sizeof to);
#else
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++)
#pragma GCC unroll 4
        for (int k = 0; k < LANES; k += 4) v[k + row] = vf_load_fours(source + row, at + k);
#pragma GCC unroll 4
    for (int k = 0; k < LANES; k += 4) {
        vf low = interleave(v[k], v[k + 1], 0, 1), high = interleave(v[k], v[k + 1], 1, 1);
        vf low2 = interleave(v[k + 2], v[k + 3], 0, 1),
           high2 = interleave(v[k + 2], v[k + 3], 1, 1);
        v[k] = interleave(low, low2, 0, 2);
        v[k + 1] = interleave(low, low2, 1, 2);
        v[k + 2] = interleave(high, high2, 0, 2);
        v[k + 3] = interleave(high, high2, 1, 2);
    }
#endif
}

#endif
