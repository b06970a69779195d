/* Floats rounded to pairs of bfloat16 (narrow.h) in each form of a product. */
#ifndef PYLOSS_PAIRS_H
#define PYLOSS_PAIRS_H
#include "../simd/act.h"
#include "../simd/narrow.h"
#include "product.h"

/* Whether a form, a constant, rounds by bfloat16 instructions. These take numbers below 2^-126 as
 * 0; so does the form that emulates AMX. */
INLINE int is_native(const int form) { return form == NATIVE_PAIRS || form == AMX; }
INLINE vf before_rounding(vf v, const int form) {
    return form == AMX_EMULATED ? vf_flush_subnormal(v) : v;
}

/* The pairs (a[0], a[1]), ..., then (b[0], b[1]), ... AMX has the first one in the lower half of a
 * word, as memory has it. */
INLINE vi pairs_of_two(vf a, vf b, const int form) {
    a = before_rounding(a, form), b = before_rounding(b, form);
    return is_amx(form) ? vi_halves_in_order(a, b, is_native(form))
                        : vi_pairs_in_order(a, b, is_native(form));
}
/* The pairs (a[i], b[i]). */
INLINE vi pair_of(vf a, vf b, const int form) {
    a = before_rounding(a, form), b = before_rounding(b, form);
    return is_amx(form) ? vi_pair(b, a, is_native(form)) : vi_pair(a, b, is_native(form));
}

/* LANES words of pairs of a row, of which `n` more floats are there. */
INLINE vi pairs_at(const float *row, int64_t n, const int form) {
    float part[2 * LANES];
    if (n < 2 * LANES) {
        memset(part, 0, sizeof part);
        row = n <= 0 ? part : memcpy(part, row, (size_t)n * sizeof *row);
    }
    return pairs_of_two(vf_load(row), vf_load(row + LANES), form);
}

/* For tiles: LANES words of pairs of a row of n elements, from element `at` on. */
INLINE vi act_pairs_at(pl_act row, int64_t at, int64_t n, const int form) {
    if (!row.narrow) return pairs_at((const float *)row.data + at, n - at, form);
    vi words = vi_set1(0);
    const uint16_t *from = (const uint16_t *)row.data + at;
    if (n - at >= 2 * LANES) memcpy(&words, from, sizeof words);
    else if (n > at) memcpy(&words, from, 2 * (size_t)(n - at));
    return words;
}

#endif
