/* Encodes Q3_K, Q6_K, IQ4_XS and IQ4_NL: w = d scale value, with whole scales of the groups, and a
 * float16 factor d of 256 values; in IQ4_NL a group has only a factor. The values are the codes
 * less an offset, or stand in a table.
 *
 * The search is that of offset.c, without offsets. */
#include "encoder.h"

/* The numbers of a format. */
typedef struct {
    int table;         /* whether the codes are places in the table of IQ4 */
    float low, high;   /* the least and the largest value */
    float least, most; /* the same of scales */
    int tries;         /* scales tried for a group with either sign */
    float first, last; /* the multiples that its largest value is of these */
} kind;

static const float TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};

INLINE vf inverse_of(vf scale) {
    const vf_mask usable = vf_less(vf_set1(0), scale * scale);
    return vf_select(usable, 1 / vf_select(usable, scale, vf_set1(1)), vf_set1(0));
}

/* The stored value that is nearest to v, and its code. */
INLINE vf value_near(vf v, kind k, vi *code) {
    if (!k.table) {
        const vf near = nearest(vf_clamp(v, k.low, k.high));
        if (code) *code = __builtin_convertvector(near - k.low, vi);
        return near;
    }
    vf near = vf_set1(TABLE[0]);
    vi at = vi_set1(0);
    for (int c = 1; c < 16; c++) {
        const vi above = v >= vf_set1(0.5f * (TABLE[c - 1] + TABLE[c]));
        near += (vf)(above & (vi)vf_set1(TABLE[c] - TABLE[c - 1]));
        at -= above;
    }
    if (code) *code = at;
    return near;
}

typedef struct {
    float d;
    vf scale[VECTORS]; /* multiples of d */
    vf error[VECTORS]; /* of the groups */
} state;

/* The error of the groups in vector v, and the sums of w l^2 and w x l over their values l. */
INLINE vf error_of(const groups *g, int n, int vectors, int v, kind k, vf scale, vf *ll, vf *xl) {
    const vf inverse = inverse_of(scale);
    vf error = vf_set1(0), sum_ll = error, sum_xl = error;
    for (int i = 0; i < n; i++) {
        const vf x = g->x[i * vectors + v], w = g->w[i * vectors + v];
        const vf l = value_near(x * inverse, k, NULL), difference = l * scale - x, wl = w * l;
        error += w * difference * difference;
        sum_ll += wl * l;
        sum_xl += wl * x;
    }
    *ll = sum_ll, *xl = sum_xl;
    return error;
}

/* The best scales of the groups in vector v, without regard to their storage. */
INLINE vf fit(const groups *g, int n, int vectors, int v, kind k, vf *curvature) {
    vf extreme = vf_set1(0), best = vf_set1(0), scale = best;
    for (int i = 0; i < n; i++) {
        const vf x = g->x[i * vectors + v];
        extreme = vf_select(vf_less(extreme * extreme, x * x), x, extreme);
    }
    extreme = vf_select(vf_less(extreme * extreme, vf_set1(LEAST * LEAST)), vf_set1(0), extreme);
    *curvature = vf_set1(0);
    for (int t = 0; t < 2 * k.tries + 2; t++) {
        const float reach = k.first + (k.last - k.first) * (float)(t / 2) / (float)(k.tries - 1);
        /* The last two begin with the best so far. */
        const vf tried = t >= 2 * k.tries ? scale : extreme / (t % 2 ? reach : -reach);
        vf ll, xl;
        error_of(g, n, vectors, v, k, tried, &ll, &xl);
        const vf fitted = xl * inverse_of(ll), gain = xl * fitted;
        const vf_mask better = vf_less(best, gain);
        best = vf_select(better, gain, best);
        scale = vf_select(better, fitted, scale);
        *curvature = vf_select(better, ll, *curvature);
    }
    return scale;
}

INLINE float evaluate(const groups *g, int n, int vectors, kind k, state *s) {
    vf sum = vf_set1(0), ll, xl;
    for (int v = 0; v < vectors; v++) {
        s->error[v] = error_of(g, n, vectors, v, k, s->scale[v] * s->d, &ll, &xl);
        sum += s->error[v];
    }
    return lanes_sum(sum);
}

INLINE void improve(const groups *g, int n, int vectors, kind k, state *s) {
    vf ll, xl, aa = vf_set1(0), ax = aa, sum = aa;
    for (int v = 0; v < vectors; v++) {
        const vf scale = s->scale[v];
        for (int by = -1; by <= 1; by += 2) {
            const vf tried = vf_clamp(scale + (float)by, k.least, k.most);
            const vf error = error_of(g, n, vectors, v, k, tried * s->d, &ll, &xl);
            const vf_mask better = vf_less(error, s->error[v]);
            s->error[v] = vf_select(better, error, s->error[v]);
            s->scale[v] = vf_select(better, tried, s->scale[v]);
        }
        sum += error_of(g, n, vectors, v, k, s->scale[v] * s->d, &ll, &xl);
        aa += s->scale[v] * s->scale[v] * ll;
        ax += s->scale[v] * xl;
    }
    state other = *s;
    if (lanes_sum(aa) > 0) other.d = rounded_to_half(lanes_sum(ax) / lanes_sum(aa));
    if (evaluate(g, n, vectors, k, &other) < lanes_sum(sum)) *s = other;
}

INLINE void search(const groups *g, int n, int vectors, kind k, state *s) {
    multiples scales = {vectors * LANES, k.least, k.most, {0}, {0}};
    for (int v = 0; v < vectors; v++) {
        vf curvature;
        const vf scale = fit(g, n, vectors, v, k, &curvature);
        for (int l = 0; l < LANES; l++)
            scales.number[v * LANES + l] = scale[l], scales.weight[v * LANES + l] = curvature[l];
    }
    float least = INFINITY;
    s->d = 0;
    try_factors(&scales, k.least - 0.5f, k.least * 0.55f, 18, &s->d, &least);
    try_factors(&scales, k.most + 0.5f, k.most * 0.55f, 18, &s->d, &least);
    for (int at = 0; at < vectors * LANES; at++)
        s->scale[at / LANES][at % LANES] = multiple_of(scales.number[at], s->d, k.least, k.most);
    evaluate(g, n, vectors, k, s);
    for (int round = 0; round < 2; round++) improve(g, n, vectors, k, s);
}

static float read_scales(int format, const uint8_t *block, vf *scale) {
    if (format == PL_W_IQ4_XS) {
        const int high = block[2] | block[3] << 8;
        for (int g = 0; g < 8; g++)
            scale[g / LANES][g % LANES] =
                (float)(((block[4 + g / 2] >> g % 2 * 4 & 15) | (high >> 2 * g & 3) << 4) - 32);
        return half_at(block);
    }
    for (int g = 0; g < 16; g++)
        scale[g / LANES][g % LANES] = format == PL_W_Q6_K
                                          ? (float)(int8_t)block[192 + g]
                                          : (float)(((block[96 + g % 8] >> g / 8 * 4 & 15) |
                                                     (block[104 + g % 4] >> g / 4 * 2 & 3) << 4) -
                                                    32);
    return half_at(block + (format == PL_W_Q6_K ? 208 : 108));
}

static void write_scales(int format, const state *s, uint8_t *block) {
    put_half(block + (format == PL_W_Q6_K ? 208 : format == PL_W_Q3_K ? 108 : 0), s->d);
    for (int g = 0; g < (format == PL_W_IQ4_XS ? 8 : 16); g++) {
        const int scale = (int)s->scale[g / LANES][g % LANES], code = scale + 32;
        if (format == PL_W_Q6_K) block[192 + g] = (uint8_t)scale;
        else if (format == PL_W_Q3_K) {
            block[96 + g % 8] |= (uint8_t)((code & 15) << g / 8 * 4);
            block[104 + g % 4] |= (uint8_t)(code >> 4 << g / 4 * 2);
        } else {
            block[2 + g / 4] |= (uint8_t)(code >> 4 << g % 4 * 2);
            block[4 + g / 2] |= (uint8_t)((code & 15) << g % 2 * 4);
        }
    }
}

/* The code of element e of a block. */
INLINE void put_code(int format, int e, int code, uint8_t *block) {
    if (format == PL_W_Q3_K) {
        block[32 + e / 128 * 32 + e % 32] |= (uint8_t)((code & 3) << e % 128 / 32 * 2);
        block[e % 32] |= (uint8_t)(code >> 2 << e / 32);
    } else if (format == PL_W_Q6_K) {
        block[e / 128 * 64 + e % 64] |= (uint8_t)((code & 15) << e % 128 / 64 * 4);
        block[128 + e / 128 * 32 + e % 32] |= (uint8_t)(code >> 4 << e % 128 / 32 * 2);
    } else {
        const int head = format == PL_W_IQ4_XS ? 8 + e / 32 * 16 : 2 + e / 32 * 18;
        block[head + e % 16] |= (uint8_t)(code << e % 32 / 16 * 4);
    }
}

INLINE void encode(int format, const groups *g, int n, int vectors, kind k, int blocks,
                   const uint8_t *like, uint8_t *block) {
    const int single = format == PL_W_IQ4_NL;
    state s = {.d = 1};
    for (int v = 0; v < vectors; v++) s.scale[v] = vf_set1(0);
    if (!single && like) s.d = read_scales(format, like, s.scale);
    else if (!single) search(g, n, vectors, k, &s);
    else
        for (int b = 0; b < vectors * LANES; b++) {
            vf curvature;
            if (!like && b % LANES == 0)
                s.scale[b / LANES] = fit(g, n, vectors, b / LANES, k, &curvature);
            float *scale = (float *)&s.scale[b / LANES] + b % LANES;
            if (like && b < blocks) *scale = half_at(like + 18 * b);
            if (fabsf(*scale) >= LEAST && fabsf(*scale) < LEAST_HALF)
                *scale = copysignf(LEAST_HALF, *scale);
            *scale = rounded_to_half(*scale);
        }
    memset(block, 0, (size_t)pl_block_bytes(format) * (single ? (size_t)blocks : 1));
    if (!single) write_scales(format, &s, block);
    for (int v = 0; v < vectors; v++) {
        const vf inverse = inverse_of(s.scale[v] * s.d);
        for (int l = 0; single && l < LANES && v * LANES + l < blocks; l++)
            put_half(block + 18 * (v * LANES + l), s.scale[v][l]);
        for (int i = 0; i < n; i++) {
            vi codes;
            value_near(g->x[i * vectors + v] * inverse, k, &codes);
            for (int l = 0; l < LANES; l++)
                if (!single || v * LANES + l < blocks)
                    put_code(format, (v * LANES + l) * n + i, codes[l], block);
        }
    }
}

void pl_encode_signed(int format, const groups *g, int blocks, const uint8_t *like,
                      uint8_t *block) {
    const kind q3 = {0, -4, 3, -32, 31, 9, 2.6f, 5.0f},
               q6 = {0, -32, 31, -128, 127, 6, 30.5f, 33.0f},
               iq4 = {1, -127, 113, -32, 31, 7, 95, 135};
    if (format == PL_W_Q3_K) encode(PL_W_Q3_K, g, 16, 4, q3, 1, like, block);
    else if (format == PL_W_Q6_K) encode(PL_W_Q6_K, g, 16, 4, q6, 1, like, block);
    else if (format == PL_W_IQ4_XS) encode(PL_W_IQ4_XS, g, 32, 2, iq4, 1, like, block);
    else encode(PL_W_IQ4_NL, g, 32, 2, iq4, blocks, like, block);
}
