/* Few rows against many keys, as in generation (split-KV). A piece is a range of keys of all heads,
 * read in place. Its result for each row of each head is [width] sums of values, then the maximum
 * and the sum of exponentials. attn_split_join combines the pieces. */
#ifndef PYLOSS_ATTENTION_SPLIT_KV_TPL_H
#define PYLOSS_ATTENTION_SPLIT_KV_TPL_H
#include "../pieces.h"
#include "../simd/transpose.h"
#include "../simd/vec.h"
#include "rows.tpl.h"
#include "tile.tpl.h"

INLINE int64_t attn_split_stride(const attn *g) { return g->width + 2; }
static int64_t attn_split_size(const attn *g) {
    return g->kv_heads * ATTN_SPLIT_ROWS * (ATTN_SPLIT_KEYS + g->width) + LANES * g->width;
}

/* Fetches n floats into the cache by reading a word of every line in order. The heads read
 * scattered parts of them, which the hardware would not prefetch. */
INLINE void attn_touch(const float *p, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) (void)*(const volatile float *)(p + i);
}

/* Scores of one row against LANES keys, `stride` apart. If there are only `keys` < LANES, the last
 * one repeats. A transposition at the end sums all dot products at once. */
static void attn_split_scores(const float *q, const float *k, int64_t stride, int64_t d,
                              int64_t keys, float *s) {
    vf v[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) v[l] = vf_set1(0);
    const float *row[LANES];
    for (int l = 0; l < LANES; l++) row[l] = k + at_most(l, keys - 1) * stride;
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        vf x = vf_load(q + i);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) v[l] += x * vf_load(row[l] + i);
    }
    if (i < d)
        for (int l = 0; l < LANES; l++) v[l] += vf_load(q + i) * vf_load_part(row[l] + i, d - i, 0);
    float sums[LANES][LANES];
    for (int l = 0; l < LANES; l++) {
        vf_store(sums[l], v[l]);
        row[l] = sums[l];
    }
    load_transposed(row, 0, v);
#pragma GCC unroll 4
    for (int h = LANES / 2; h; h /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < h; l++) v[l] += v[l + h];
    vf_store(s, v[0]);
}

/* Turns a row's scores into exponentials relative to their maximum, 0 for keys that it does not
 * see. last[0] is the maximum, last[1] the sum of the exponentials. */
static void attn_split_softmax(const attn *g, const attn_piece *p, int64_t r, float *s,
                               float *last) {
    int64_t seen = attn_visible(g, p, r) - p->from, hidden = attn_hidden(g, p, r) - p->from;
    int64_t whole = round_up(p->to - p->from, LANES);
    for (int64_t j = 0; g->softcap > 0 && j < whole; j += LANES)
        vf_store(s + j, capped_f32(vf_load(s + j), vf_set1(g->softcap)));
    for (int64_t j = seen < 0 ? 0 : seen; j < whole; j++) s[j] = -INFINITY;
    for (int64_t j = 0; j < at_most(hidden, whole); j++) s[j] = -INFINITY;
    vf max = vf_set1(-FLT_MAX), sum = vf_set1(0);
    for (int64_t j = 0; j < whole; j += LANES) max = vf_max(vf_load(s + j), max);
    last[0] = vf_hmax(max);
    for (int64_t j = 0; j < whole; j += LANES) {
        vf e = vf_exp(vf_load(s + j) - last[0]);
        vf_store(s + j, e);
        sum += e;
    }
    last[1] = vf_sum(sum);
}

/* A piece of keys for all heads. Row i of the piece is row i % rows of head i / rows. */
static void attn_forward_keys(const attn *g, attn_piece p, float *scratch) {
    int64_t width = g->width, stride = g->kv_heads * g->d, out_stride = attn_split_stride(g);
    int64_t keys = p.to - p.from, all = p.rows * g->kv_heads, at = (p.key + p.from) * stride;
    float *s = scratch, *q = s + all * ATTN_SPLIT_KEYS, *packed = q + all * width,
          *out = g->partial + p.partial;
    const float *k = (const float *)g->k.data + at, *v = (const float *)g->v.data + at;
    for (p.kv_head = 0; p.kv_head < g->kv_heads; p.kv_head++)
        for (int64_t r = 0; r < p.rows; r++)
            attn_pad_row(q + (p.kv_head * p.rows + r) * width,
                         act_at(g->q, attn_at(g, &p, r) * g->d), g->d, width, g->scale);
    for (int64_t j = 0; j < keys; j += LANES) {
        attn_touch(k + j * stride, at_most(keys - j, LANES) * stride);
        for (int64_t i = 0; i < all; i++)
            attn_split_scores(q + i * width, k + j * stride + i / p.rows * g->d, stride, g->d,
                              keys - j, s + i * ATTN_SPLIT_KEYS + j);
    }
    for (int64_t i = 0; i < all; i++)
        attn_split_softmax(g, &p, i % p.rows, s + i * ATTN_SPLIT_KEYS,
                           out + i * out_stride + width);
    for (int64_t j = 0; j < keys; j += LANES) {
        int64_t n = at_most(keys - j, LANES);
        attn_touch(v + j * stride, n * stride);
        for (int64_t h = 0; h < g->kv_heads; h++) {
            attn_product t = {p.rows,
                              width,
                              n,
                              s + h * p.rows * ATTN_SPLIT_KEYS + j,
                              ATTN_SPLIT_KEYS,
                              v + j * stride + h * g->d,
                              stride,
                              out + h * p.rows * out_stride,
                              out_stride,
                              j ? attn_ones : NULL};
            if (width != g->d) {
                for (int64_t l = 0; l < n; l++)
                    attn_pad_row(packed + l * width, act_of_floats(t.b + l * stride), g->d, width,
                                 1);
                t.b = packed;
                t.ldb = width;
            }
            attn_by_row(t, 0, 0);
        }
    }
}

/* Combines the pieces of a sequence into o and lse. */
static void attn_split_join(const attn *g, attn_piece p, const attn_piece *piece, int64_t count) {
    for (int64_t i = 0; i < p.rows * g->kv_heads; i++) {
        float *acc = g->scratch, max = -FLT_MAX, sum = 0;
        int64_t at = i * attn_split_stride(g);
        memset(acc, 0, (size_t)g->width * sizeof *acc);
        for (int64_t c = 0; c < count; c++)
            max = fmaxf(max, g->partial[piece[c].partial + at + g->width]);
        for (int64_t c = 0; c < count; c++) {
            const float *part = g->partial + piece[c].partial + at;
            float factor = expf(part[g->width] - max);
            for (int64_t l = 0; l < g->width; l += LANES)
                vf_store(acc + l, vf_load(acc + l) + vf_load(part + l) * factor);
            sum += part[g->width + 1] * factor;
        }
        p.kv_head = i / p.rows;
        attn_finish_row(g, attn_at(g, &p, i % p.rows), acc, max, sum);
    }
}

#endif
