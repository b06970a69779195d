/* Elementwise operations on arrays [N]: gates, sums, scaling, dropout. */
#ifndef PYLOSS_ELEMENTWISE_TPL_H
#define PYLOSS_ELEMENTWISE_TPL_H
#include "../../random.h"
#include "../kernel.h"
#include "../pieces.h"
#include "../simd/map.h"
#include "../widening.h"

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }

/* An activation g sigmoid(z(g)): z, and for the gradient slope = g z'(g). */
typedef struct {
    vf z, slope;
} activation;
INLINE activation silu(vf g) { return (activation){g, g}; }
/* GELU in its tanh form: 0.5 g (1 + tanh(u)) = g sigmoid(2 u), with
 * u = sqrt(2 / pi) (g + 0.044715 g^3). */
INLINE activation gelu_tanh(vf g) {
    /* Beyond 16 the sigmoid is 0 or 1. A NaN stays NaN. */
    vf near = vf_min(vf_set1(16.0f), vf_max(vf_set1(-16.0f), g));
    vf k = 1.5957691216057308f * near, cube = 0.044715f * near * near;
    return (activation){k * (1.0f + cube), k * (1.0f + 3.0f * cube)};
}

/* y = act(gate) up. Backward, with s = sigmoid(z):
 * dgate = dy up s (1 + slope (1 - s)), dup = dy gate s. */
INLINE void gated_lanes(vf *v, activation a) { v[0] = v[0] * sigmoid(a.z) * v[1]; }
INLINE void gated_grad_lanes(vf *v, activation a) {
    vf dy = v[0], gate = v[1], up = v[2], s = sigmoid(a.z);
    v[0] = dy * up * s * (1.0f + a.slope * (1.0f - s));
    v[1] = dy * gate * s;
}

#define GATED_UNIT(name, act) \
    INLINE void name##_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) { \
        gated_lanes(v, act(v[0])); \
    } \
    INLINE void name##_grad_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) { \
        gated_grad_lanes(v, act(v[1])); \
    } \
    GATED_KERNELS(name)
#define GATED_KERNELS(name) \
    static void name##_forward_piece(const void *context, int64_t begin, int64_t end, \
                                     int worker UNUSED) { \
        const name##_forward_args args = name##_forward_args_of(context); \
        const pl_act in[] = {args.gate, args.up}; \
        map_acts(name##_lanes, 2, in, 1, &args.y, begin, end, NULL); \
    } \
    pl_status KERNEL(name##_forward)(const pl_call *c) { \
        in_pieces(PL_DIM(c, 'N'), 1, name##_forward_piece, c); \
        return PL_OK; \
    } \
    static void name##_grad_piece(const void *context, int64_t begin, int64_t end, \
                                  int worker UNUSED) { \
        const name##_grad_args args = name##_grad_args_of(context); \
        const pl_act in[] = {args.dy, args.gate, args.up}, out[] = {args.dgate, args.dup}; \
        map_acts(name##_grad_lanes, 3, in, 2, out, begin, end, NULL); \
    } \
    pl_status KERNEL(name##_grad)(const pl_call *c) { \
        in_pieces(PL_DIM(c, 'N'), 1, name##_grad_piece, c); \
        return PL_OK; \
    }
GATED_UNIT(swiglu, silu)
GATED_UNIT(geglu, gelu_tanh)

/* y = sigmoid(gate) up */
INLINE void glu_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) {
    v[0] = sigmoid(v[0]) * v[1];
}
INLINE void glu_grad_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) {
    const vf dy = v[0], s = sigmoid(v[1]), up = v[2];
    v[0] = dy * up * s * (1.0f - s);
    v[1] = dy * s;
}
GATED_KERNELS(glu)

INLINE void add_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) { v[0] += v[1]; }

/* y = a + b */
static void add_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const add_args args = add_args_of(c);
    const pl_act in[] = {args.a, args.b}, y = act_of_floats(args.y);
    map_acts(add_lanes, 2, in, 1, &y, begin, end, NULL);
}
pl_status KERNEL(add)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, add_piece, c);
    return PL_OK;
}

/* y = x, in the type of each */
pl_status KERNEL(convert)(const pl_call *c) {
    const convert_args args = convert_args_of(c);
    convert_all(args.x, PL_DIM(c, 'N'), args.y);
    return PL_OK;
}

INLINE void ratio_lanes(vf *v, int64_t index UNUSED, const void *constants UNUSED) {
    v[0] = vf_select(vf_equal(v[1], vf_set1(0)), vf_set1(0), v[0] / v[1]);
}

/* y = a / b; 0 where b is 0 */
static void ratio_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const ratio_args args = ratio_args_of(c);
    map(ratio_lanes, 2, (const float *[]){args.a, args.b}, 1, (float *[]){args.y}, begin, end,
        NULL);
}
pl_status KERNEL(ratio)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, ratio_piece, c);
    return PL_OK;
}

INLINE void axpy_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    v[0] = v[1] + *(const float *)constants * v[0];
}

/* y += alpha x */
static void axpy_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const axpy_args args = axpy_args_of(c);
    float alpha = (float)args.alpha, *y = args.y;
    map(axpy_lanes, 2, (const float *[]){args.x, y}, 1, (float *[]){y}, begin, end, &alpha);
}
pl_status KERNEL(axpy)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, axpy_piece, c);
    return PL_OK;
}

INLINE void scale_lanes(vf *v, int64_t index UNUSED, const void *constants) {
    v[0] *= *(const float *)constants;
}

/* y = alpha x */
static void scale_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const scale_args args = scale_args_of(c);
    float alpha = (float)args.alpha;
    map(scale_lanes, 1, (const float *[]){args.x}, 1, (float *[]){args.y}, begin, end, &alpha);
}
pl_status KERNEL(scale)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, scale_piece, c);
    return PL_OK;
}

/* ---- Dropout: each element's random word depends on the seed and its index alone */

typedef uint32_t vu __attribute__((vector_size(PL_BYTES)));

typedef struct {
    uint32_t key[3], drop_below;
    float scale;
} dropout_constants;

/* A bijection of 32-bit words with little bias (C. Wellons, "Prospecting for hash functions"). */
INLINE vu mix_words(vu x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

INLINE void dropout_lanes(vf *v, int64_t index, const void *constants) {
    const dropout_constants *k = constants;
    static const uint32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vu x;
    memcpy(&x, lane, sizeof x);
    /* Pieces begin at multiples of LANES, so all lanes have the same upper half of the index. */
    x = mix_words((x + (uint32_t)index) ^ k->key[0]);
    x = mix_words((x ^ k->key[1]) + ((uint32_t)(index >> 32) ^ k->key[2]));
    v[0] = (vf)((vi)(x >= k->drop_below) & (vi)(v[0] * k->scale));
}

/* y = x / (1 - p) with probability 1 - p, else 0. The gradient is this operation on dy, with the
 * same seed and p. */
static void dropout_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const dropout_args args = dropout_args_of(c);
    double p = args.p;
    float *y = args.y;
    if (p >= 1) {
        memset(y + begin, 0, (size_t)(end - begin) * sizeof *y);
        return;
    }
    uint64_t state = (uint64_t)args.seed, a = pl_next_word(&state), b = pl_next_word(&state);
    dropout_constants k = {{(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b},
                           p > 0 ? (uint32_t)(p * 0x1p32) : 0,
                           (float)(1 / (1 - p))};
    map(dropout_lanes, 1, (const float *[]){args.x}, 1, (float *[]){y}, begin, end, &k);
}
pl_status KERNEL(dropout)(const pl_call *c) {
    in_pieces(PL_DIM(c, 'N'), 1, dropout_piece, c);
    return PL_OK;
}

#endif
