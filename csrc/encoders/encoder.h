/* What the encoders of stored formats share: eight or sixteen groups of values side by side.
 *
 * A lane of a vector is a group, so that sums over a group are sums of vectors. The encoders are
 * compiled once, with vectors of 16 bytes: they run once per model, and the wider ones would
 * triple their code. */
#ifndef PYLOSS_ENCODER_H
#define PYLOSS_ENCODER_H
#define PL_BYTES 16
#include "../kernels/simd/narrow.h"
#include "../kernels/simd/vec.h"
#include "../pyloss.h"

enum {
    VALUES = 256, /* that are encoded together */
    VECTORS = 4,  /* of the scales of up to 16 groups */
    MOST_GROUPS = VECTORS * LANES,
};

/* 256 values in groups of `n`, transposed: value i of group g is lane g % 4 of x[i][g / 4], and
 * w[i][g / 4] has its weight in the sum of squared errors. */
typedef struct {
    vf x[VALUES / LANES], w[VALUES / LANES];
    int n, vectors; /* n * vectors * 4 == 256 */
} groups;

/* Values whose magnitude a float16 scale does not reach are 0. */
#define LEAST 1e-10f
/* The smallest positive float16. */
#define LEAST_HALF 0x1p-24f

/* The nearest whole number, ties to even, of |v| < 2^22. */
INLINE vf nearest(vf v) {
    const vf magic = vf_set1(12582912.0f);
    return v + magic - magic;
}
INLINE float nearest_one(float v) { return v + 12582912.0f - 12582912.0f; }
INLINE vf vf_clamp(vf v, float low, float high) {
    return vf_min(vf_max(v, vf_set1(low)), vf_set1(high));
}
INLINE float rounded_to_half(float v) { return f32_from_f16(f16_from_f32(v)); }
INLINE void put_half(uint8_t *p, float v) {
    const uint16_t half = f16_from_f32(v);
    p[0] = (uint8_t)half, p[1] = (uint8_t)(half >> 8);
}
INLINE float half_at(const uint8_t *p) { return f32_from_f16((uint16_t)(p[0] | p[1] << 8)); }
INLINE float lanes_sum(vf v) { return v[0] + v[1] + (v[2] + v[3]); }

/* Numbers that are stored as whole multiples, from `low` to `high`, of a common float16 factor. */
typedef struct {
    int count;
    float low, high;
    float number[MOST_GROUPS], weight[MOST_GROUPS]; /* of a number's squared error */
} multiples;

INLINE float multiple_of(float number, float factor, float low, float high) {
    return factor == 0 ? 0 : nearest_one(fminf(fmaxf(number / factor, low), high));
}
/* Tries factors of which the largest number is `first` to `last` times as large. A better factor
 * than `*best`, whose error is `*least`, replaces it. */
INLINE void try_factors(const multiples *m, float first, float last, int tries, float *best,
                        float *least) {
    float extreme = 0;
    for (int g = 0; g < m->count; g++)
        if (fabsf(m->number[g]) > fabsf(extreme)) extreme = m->number[g];
    if (fabsf(extreme) < LEAST) return;
    for (int t = 0; t < tries; t++) {
        float factor = extreme / (first + (last - first) * (float)t / (float)(tries - 1)),
              error = 0;
        if (fabsf(factor) < LEAST_HALF) factor = copysignf(LEAST_HALF, factor);
        factor = rounded_to_half(factor);
        const float inverse = 1 / factor;
        for (int g = 0; g < m->count; g++) {
            const float code = nearest_one(fminf(fmaxf(m->number[g] * inverse, m->low), m->high));
            const float difference = m->number[g] - code * factor;
            error += m->weight[g] * difference * difference;
        }
        if (error < *least) *least = error, *best = factor;
    }
}

/* The formats with an offset, Q2_K, Q4_K and Q5_K, and those without, Q3_K, Q6_K, IQ4_XS and (one
 * scale for each of `blocks` groups) IQ4_NL. `like` is NULL, or a block whose scales are used. */
void pl_encode_offset(int format, const groups *given, const uint8_t *like, uint8_t *block);
void pl_encode_signed(int format, const groups *given, int blocks, const uint8_t *like,
                      uint8_t *block);

#endif
