/* Encodes Q2_K, Q4_K and Q5_K: w = d scale code - m offset, with small whole scales and offsets of
 * the groups, and float16 factors d and m of 256 values.
 *
 * All of them are searched for, so that the weighted squared error is small: codes, scales and
 * offsets of single groups by least squares for several roundings, then d and m for which whole
 * scales and offsets come near to these, then each in turn with the others given. */
#include "encoder.h"

/* The numbers of a format. */
typedef struct {
    float codes, scales; /* the largest code; the largest scale and offset */
    int steps;           /* roundings tried for a group, one every `step` of a code */
    float step;
} kind;

/* A state of the search; lanes are groups. */
typedef struct {
    float d, m;
    vf scale[VECTORS], offset[VECTORS]; /* multiples of d and m */
    vf error[VECTORS];                  /* of the groups */
} state;

/* The codes of `x` for a group's scale and offset. */
INLINE vf codes_of(vf x, vf inverse, vf offset, float most) {
    return nearest(vf_clamp((x + offset) * inverse, 0, most));
}
INLINE vf inverse_of(vf scale) {
    const vf_mask positive = vf_less(vf_set1(0), scale);
    return vf_select(positive, 1 / vf_select(positive, scale, vf_set1(1)), vf_set1(0));
}

/* Sums of a group over its codes l: of w, w l, w l^2, w x, w x l. */
typedef struct {
    vf w, l, ll, x, xl;
} sums;

INLINE void add(sums *s, vf w, vf x, vf l) {
    const vf wl = w * l;
    s->l += wl;
    s->ll += wl * l;
    s->xl += wl * x;
}

/* The best scale and offset of the groups in vector v, without regard to their storage. */
INLINE void fit(const groups *g, int n, int vectors, int v, kind k, vf *scale, vf *offset) {
    vf low = vf_set1(0), high = g->x[v];
    sums total = {.w = vf_set1(0)};
    vf squares = total.w;
    for (int i = 0; i < n; i++) {
        low = vf_min(low, g->x[i * vectors + v]);
        high = vf_max(high, g->x[i * vectors + v]);
    }
    for (int i = 0; i < n; i++) { /* of x - low, which keeps differences of the sums exact */
        const vf x = g->x[i * vectors + v] - low, w = g->w[i * vectors + v];
        total.w += w;
        total.x += w * x;
        squares += w * x * x;
    }
    const vf range = high - low,
             unit = inverse_of(vf_select(vf_less(range, vf_set1(LEAST)), vf_set1(0), range));
    vf best = vf_set1(INFINITY);
    *scale = *offset = vf_set1(0);
    for (int step = 0; step < k.steps + 2; step++) {
        /* The last two begin with the best so far. */
        const int again = step >= k.steps;
        const vf inverse =
            again ? inverse_of(*scale) : unit * (k.codes + k.step * (float)(step - k.steps / 2));
        const vf begin = again ? *offset + low : vf_set1(0);
        sums s = total;
        for (int i = 0; i < n; i++) {
            const vf x = g->x[i * vectors + v] - low;
            add(&s, g->w[i * vectors + v], x, codes_of(x, inverse, begin, k.codes));
        }
        const vf determinant = s.w * s.ll - s.l * s.l;
        const vf_mask solvable = vf_less(1e-5f * s.w * s.ll, determinant);
        const vf over = inverse_of(vf_select(solvable, determinant, vf_set1(0)));
        vf slope = (s.w * s.xl - s.x * s.l) * over, base = (s.ll * s.x - s.l * s.xl) * over;
        /* w = slope l + base + low, where an offset is never negative, nor is a scale. */
        const vf_mask inside = vf_less(base + low, vf_set1(0)) & solvable;
        slope = vf_select(inside, slope, (s.xl + low * s.l) * inverse_of(s.ll));
        base = vf_select(inside, base, -low);
        const vf_mask rising = vf_less(vf_set1(0), slope);
        slope = vf_select(rising, slope, vf_set1(0));
        base = vf_select(rising, base, vf_min(s.x * inverse_of(s.w), -low));
        const vf error = squares - 2 * (slope * s.xl + base * s.x) + slope * slope * s.ll +
                         2 * slope * base * s.l + base * base * s.w;
        const vf_mask better = vf_less(error, best);
        best = vf_select(better, error, best);
        *scale = vf_select(better, slope, *scale);
        *offset = vf_select(better, -(base + low), *offset);
    }
}

/* The error of the groups in vector v, and the sums over their codes unless `s` is NULL. */
INLINE vf error_of(const groups *g, int n, int vectors, int v, float most, vf scale, vf offset,
                   sums *s) {
    const vf inverse = inverse_of(scale);
    vf error = vf_set1(0);
    for (int i = 0; i < n; i++) {
        const vf x = g->x[i * vectors + v], w = g->w[i * vectors + v];
        const vf l = codes_of(x, inverse, offset, most), difference = l * scale - offset - x;
        error += w * difference * difference;
        if (s) {
            s->w += w, s->x += w * x;
            add(s, w, x, l);
        }
    }
    return error;
}

/* Tries the neighboring scales of each group, each with the offset that suits it. */
INLINE void improve_groups(const groups *g, int n, int vectors, kind k, state *s) {
    for (int v = 0; v < vectors; v++) {
        const vf scale = s->scale[v], offset = s->offset[v];
        for (int by = -1; by <= 1; by++) {
            const vf tried = vf_clamp(scale + (float)by, 0, k.scales);
            sums of = {.w = vf_set1(0)};
            error_of(g, n, vectors, v, k.codes, tried * s->d, offset * s->m, &of);
            const vf wanted = (tried * s->d * of.l - of.x) * inverse_of(of.w);
            const vf with = s->m > 0 ? nearest(vf_clamp(wanted / s->m, 0, k.scales)) : vf_set1(0);
            const vf error = error_of(g, n, vectors, v, k.codes, tried * s->d, with * s->m, NULL);
            const vf_mask better = vf_less(error, s->error[v]);
            s->error[v] = vf_select(better, error, s->error[v]);
            s->scale[v] = vf_select(better, tried, s->scale[v]);
            s->offset[v] = vf_select(better, with, s->offset[v]);
        }
    }
}

INLINE float evaluate(const groups *g, int n, int vectors, kind k, state *s) {
    vf sum = vf_set1(0);
    for (int v = 0; v < vectors; v++) {
        s->error[v] =
            error_of(g, n, vectors, v, k.codes, s->scale[v] * s->d, s->offset[v] * s->m, NULL);
        sum += s->error[v];
    }
    return lanes_sum(sum);
}

/* d and m by least squares for the codes, scales and offsets of a state. */
INLINE void fit_factors(const groups *g, int n, int vectors, kind k, const state *s, state *to) {
    vf aa = vf_set1(0), ab = aa, bb = aa, ax = aa, bx = aa;
    for (int v = 0; v < vectors; v++) {
        sums of = {.w = vf_set1(0)};
        const vf scale = s->scale[v], offset = s->offset[v];
        error_of(g, n, vectors, v, k.codes, scale * s->d, offset * s->m, &of);
        aa += scale * scale * of.ll;
        ab += scale * offset * of.l;
        bb += offset * offset * of.w;
        ax += scale * of.xl;
        bx += offset * of.x;
    }
    const double a2 = lanes_sum(aa), b2 = lanes_sum(bb), c = lanes_sum(ab), x = lanes_sum(ax),
                 y = lanes_sum(bx), determinant = a2 * b2 - c * c;
    double d = s->d, m = s->m;
    if (determinant > 1e-6 * a2 * b2)
        d = (x * b2 - y * c) / determinant, m = (x * c - y * a2) / determinant;
    else if (a2 > 0 && m == 0) d = x / a2;
    *to = *s;
    if (d > 0 && m >= 0) {
        to->d = rounded_to_half(fmaxf((float)d, s->d > 0 ? LEAST_HALF : 0));
        to->m = rounded_to_half((float)m);
    }
}

INLINE void search(const groups *g, int n, int vectors, kind k, state *best) {
    vf scale[VECTORS], offset[VECTORS];
    multiples scales = {vectors * LANES, 0, k.scales, {0}, {0}}, offsets = scales;
    float slope[MOST_GROUPS], sum[MOST_GROUPS];
    for (int v = 0; v < vectors; v++) {
        fit(g, n, vectors, v, k, &scale[v], &offset[v]);
        sums of = {.w = vf_set1(0)};
        error_of(g, n, vectors, v, k.codes, scale[v], offset[v], &of);
        /* The curvature of the error along the scale, the best offset for each given. */
        const vf alone = vf_select(vf_less(vf_set1(0), offset[v]),
                                   of.ll - of.l * of.l * inverse_of(of.w), of.ll);
        for (int l = 0; l < LANES; l++) {
            const int at = v * LANES + l;
            scales.number[at] = scale[v][l], scales.weight[at] = fmaxf(alone[l], 0);
            offsets.number[at] = offset[v][l], offsets.weight[at] = of.w[l];
            slope[at] = of.l[l], sum[at] = of.w[l];
        }
    }
    float least = INFINITY;
    best->d = best->m = 0;
    try_factors(&scales, k.scales + 0.5f, k.scales * 0.55f, 18, &best->d, &least);
    for (int at = 0; at < vectors * LANES; at++) {
        const float code = multiple_of(scales.number[at], best->d, 0, k.scales);
        best->scale[at / LANES][at % LANES] = code;
        if (sum[at] > 0 && offsets.number[at] > 0)
            offsets.number[at] += (code * best->d - scales.number[at]) * slope[at] / sum[at];
        offsets.number[at] = fmaxf(offsets.number[at], 0);
    }
    least = INFINITY;
    try_factors(&offsets, k.scales + 0.5f, k.scales * 0.55f, 18, &best->m, &least);
    for (int at = 0; at < vectors * LANES; at++)
        best->offset[at / LANES][at % LANES] =
            multiple_of(offsets.number[at], best->m, 0, k.scales);
    evaluate(g, n, vectors, k, best);
    for (int round = 0; round < 2; round++) {
        improve_groups(g, n, vectors, k, best);
        vf error = vf_set1(0);
        for (int v = 0; v < vectors; v++) error += best->error[v];
        state other;
        fit_factors(g, n, vectors, k, best, &other);
        if (evaluate(g, n, vectors, k, &other) < lanes_sum(error)) *best = other;
    }
}

/* Where a block has its parts. */
typedef struct {
    int halves, scales, fifth, codes;
} places;
static const places PLACES_Q2 = {80, 0, 0, 16}, PLACES_Q4 = {0, 4, 0, 16},
                    PLACES_Q5 = {0, 4, 16, 48};

static void read_scales(int format, places at, const uint8_t *block, state *s) {
    s->d = half_at(block + at.halves), s->m = half_at(block + at.halves + 2);
    const uint8_t *p = block + at.scales;
    for (int g = 0; g < (format == PL_W_Q2_K ? 16 : 8); g++) {
        int scale, offset;
        if (format == PL_W_Q2_K) scale = p[g] & 15, offset = p[g] >> 4;
        else if (g < 4) scale = p[g] & 63, offset = p[g + 4] & 63;
        else {
            scale = (p[g + 4] & 15) | p[g - 4] >> 6 << 4;
            offset = p[g + 4] >> 4 | p[g] >> 6 << 4;
        }
        s->scale[g / LANES][g % LANES] = (float)scale;
        s->offset[g / LANES][g % LANES] = (float)offset;
    }
}

static void write_scales(int format, places at, const state *s, uint8_t *block) {
    put_half(block + at.halves, s->d), put_half(block + at.halves + 2, s->m);
    uint8_t *p = block + at.scales;
    for (int g = 0; g < (format == PL_W_Q2_K ? 16 : 8); g++) {
        const int scale = (int)s->scale[g / LANES][g % LANES],
                  offset = (int)s->offset[g / LANES][g % LANES];
        if (format == PL_W_Q2_K) p[g] = (uint8_t)(scale | offset << 4);
        else if (g < 4) p[g] = (uint8_t)scale, p[g + 4] = (uint8_t)offset;
        else {
            p[g + 4] = (uint8_t)((scale & 15) | (offset & 15) << 4);
            p[g - 4] |= (uint8_t)(scale >> 4 << 6);
            p[g] |= (uint8_t)(offset >> 4 << 6);
        }
    }
}

INLINE void encode(int format, places at, const groups *g, int n, int vectors, kind k,
                   const uint8_t *like, uint8_t *block) {
    state s;
    if (like) read_scales(format, at, like, &s);
    else search(g, n, vectors, k, &s);
    memset(block, 0, (size_t)pl_block_bytes(format));
    write_scales(format, at, &s, block);
    for (int v = 0; v < vectors; v++) {
        const vf inverse = inverse_of(s.scale[v] * s.d), offset = s.offset[v] * s.m;
        for (int i = 0; i < n; i++) {
            const vf codes = codes_of(g->x[i * vectors + v], inverse, offset, k.codes);
            for (int l = 0; l < LANES; l++) {
                const int e = (v * LANES + l) * n + i, code = (int)codes[l];
                if (format == PL_W_Q2_K)
                    block[at.codes + e / 128 * 32 + e % 32] |= (uint8_t)(code << e % 128 / 32 * 2);
                else {
                    block[at.codes + e / 64 * 32 + e % 32] |=
                        (uint8_t)((code & 15) << e % 64 / 32 * 4);
                    if (format == PL_W_Q5_K)
                        block[at.fifth + e % 32] |= (uint8_t)(code >> 4 << e / 32);
                }
            }
        }
    }
}

void pl_encode_offset(int format, const groups *g, const uint8_t *like, uint8_t *block) {
    const kind q2 = {3, 15, 17, 0.1f}, q4 = {15, 63, 15, 0.15f}, q5 = {31, 63, 11, 0.2f};
    if (format == PL_W_Q2_K) encode(PL_W_Q2_K, PLACES_Q2, g, 16, 4, q2, like, block);
    else if (format == PL_W_Q4_K) encode(PL_W_Q4_K, PLACES_Q4, g, 32, 2, q4, like, block);
    else encode(PL_W_Q5_K, PLACES_Q5, g, 32, 2, q5, like, block);
}
