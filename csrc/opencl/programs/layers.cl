/* Rows and columns of float32 matrices: norms, rotary positions, gathering and scattering rows,
 * column sums, routing. A work-group has a row; for sums over rows a work-item has some columns.
 * The formulas are those of kernels/layers/. */
#define INDEX long
#include "types.cl"

#define IN(name) ARRAY(const float, name)
#define OUT(name) ARRAY(float, name)
#define INDICES(name) ARRAY(const int, name)
#define MY_ROW const long row = get_group_id(0)
#define EACH(i, n) for (long i = LANE * WIDTH; i < (n); i += STEP)
#define GET(name, row) fetch_f32(ROW(name, (row) * d), i, d, 0)
#define PUT(name, row, v) put_f32(v, ROW(name, (row) * d), i, d)

/* The sum over the row of a b w, without w where it is absent; all work-items get it. */
#define ROW_DOT(to, a, b, w, d) \
    { \
        exact total = {0, 0}; \
        EACH_BLOCK(begin, d) { \
            V sum = v_set(0); \
            EACH_VECTOR(block, i, begin, d) { \
                V t = GET(a, row) * GET(b, row); \
                sum += w##_data ? t * fetch_f32(w##_data + w##_offset, i, d, 0) : t; \
            } \
            add_to(&total, sum_of(sum)); \
        } \
        to = group_sum(value_of(total)); \
    }
constant int none_offset = 0;
#define none_data ((const global float *)0)

KERNEL rms_norm_forward(IN(x), IN(w), OUT(y), OUT(rstd), long d, float eps) {
    GROUP_MEMORY
    MY_ROW;
    SCALAR squares;
    ROW_DOT(squares, x, x, none, d)
    const float r = (float)(1 / sqrt(squares / (SCALAR)d + (SCALAR)eps));
    if (LANE == 0) *ROW(rstd, row) = r;
    EACH(i, d) PUT(y, row, GET(x, row) * r * GET(w, 0));
}

KERNEL rms_norm_grad(IN(dy), IN(x), IN(w), IN(rstd), OUT(dx), long d) {
    GROUP_MEMORY
    MY_ROW;
    SCALAR dot;
    ROW_DOT(dot, dy, x, w, d)
    const float r = *ROW(rstd, row), k = r * r * (float)(dot / (SCALAR)d);
    EACH(i, d) PUT(dx, row, r * (GET(dy, row) * GET(w, 0) - k * GET(x, row)));
}

/* Rotates the pairs (x[j], x[half_dim + j]) of each head by its position, backward with `inverse`;
 * the rest of a head stays; y may be x. */
KERNEL rope(IN(x), INDICES(positions), IN(cosine), IN(sine), OUT(y), long inverse, long heads,
            long d, long half_dim) {
    MY_ROW;
    const long angle = *ROW(positions, row) * half_dim;
    const float sign = inverse ? -1 : 1;
    for (long h = 0; h < heads; h++) {
        const long at = (row * heads + h) * d;
        for (long j = LANE; j < half_dim; j += GROUP) {
            float a = *ROW(x, at + j), b = *ROW(x, at + half_dim + j);
            float c = *ROW(cosine, angle + j), s = sign * *ROW(sine, angle + j);
            *ROW(y, at + j) = a * c - b * s;
            *ROW(y, at + half_dim + j) = b * c + a * s;
        }
        for (long j = 2 * half_dim + LANE; j < d; j += GROUP) *ROW(y, at + j) = *ROW(x, at + j);
    }
}

KERNEL gather_rows(IN(x), INDICES(rows), OUT(y), long d) {
    MY_ROW;
    const long from = *ROW(rows, row);
    EACH(i, d) PUT(y, row, GET(x, from));
}

/* y[row,:] (+)= the sum of x[rows[row,k],:] in the order of k. */
KERNEL combine_rows(IN(x), INDICES(rows), OUT(y), long accumulate, long count, long d) {
    MY_ROW;
    EACH(i, d) {
        V sum = accumulate ? GET(y, row) : v_set(0);
        for (long k = 0; k < count; k++) sum += GET(x, *ROW(rows, row * count + k));
        PUT(y, row, sum);
    }
}

KERNEL scale_rows(IN(x), IN(factor), OUT(y), long d) {
    MY_ROW;
    const float by = *ROW(factor, row);
    EACH(i, d) PUT(y, row, by * GET(x, row));
}

KERNEL scale_columns(IN(x), IN(factor), OUT(y), long d) {
    MY_ROW;
    EACH(i, d) PUT(y, row, GET(factor, 0) * GET(x, row));
}

/* Adafactor's step before its size is bounded. */
KERNEL adafactor_update(IN(grad), IN(squares_of_row), IN(col), OUT(u), long d, float grad_scale,
                        float least) {
    MY_ROW;
    const float of_row = *ROW(squares_of_row, row);
    EACH(i, d) {
        const V square = v_max(v_set(least), of_row * GET(col, 0));
        PUT(u, row, GET(grad, row) * grad_scale / sqrt(square));
    }
}

KERNEL transpose(IN(x), OUT(y), long d, long n) {
    MY_ROW;
    const long first = row / n * n * d; /* of its matrix */
    for (long j = LANE; j < d; j += GROUP) *ROW(y, first + j * n + row % n) = *ROW(x, row * d + j);
}

KERNEL scale_rows_grad(IN(dy), IN(x), IN(factor), OUT(dx), OUT(dfactor), long d) {
    GROUP_MEMORY
    MY_ROW;
    SCALAR dot;
    ROW_DOT(dot, dy, x, none, d)
    if (LANE == 0) *ROW(dfactor, row) = (float)dot;
    const float by = *ROW(factor, row);
    EACH(i, d) PUT(dx, row, by * GET(dy, row));
}

KERNEL gather_columns(IN(x), INDICES(columns), OUT(y), long v, long count) {
    MY_ROW;
    for (long j = LANE; j < count; j += GROUP)
        *ROW(y, row * count + j) = *ROW(x, row * v + *ROW(columns, j));
}

/* The columns of a, b and c side by side; c may be absent, with of_c = 0. */
KERNEL concat_columns(IN(a), IN(b), IN(c), OUT(y), long of_a, long of_b, long of_c) {
    MY_ROW;
    const long at = row * (of_a + of_b + of_c);
    for (long j = LANE; j < of_a; j += GROUP) *ROW(y, at + j) = *ROW(a, row * of_a + j);
    for (long j = LANE; j < of_b; j += GROUP) *ROW(y, at + of_a + j) = *ROW(b, row * of_b + j);
    for (long j = LANE; j < of_c; j += GROUP)
        *ROW(y, at + of_a + of_b + j) = *ROW(c, row * of_c + j);
}

/* ---- Gated short convolutions, as in kernels/layers/short_conv.tpl.h */

/* The sequence of a row: the last one that begins there or before. */
INLINE long sequence_at(const global int *offsets, long count, long row) {
    long low = 0, high = count - 1;
    while (high - low > 1) {
        const long middle = low + (high - low) / 2;
        if (offsets[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}
#define SEQUENCE(offsets) const long s = sequence_at(ROW(offsets, 0), count, row)
#define FIRST_TAP(seen) max(0L, taps - (seen))
#define GATED(row) (*ROW(x, (row) * 3 * d + j) * *ROW(x, (row) * 3 * d + 2 * d + j))
#define GATE(row) *ROW(x, (row) * 3 * d + d + j)
#define TAP(t) *ROW(w, j * taps + (t))
#define CONVOLVED(sum, seen, u) \
    float sum = bias_data ? *ROW(bias, j) : 0; \
    for (long t = FIRST_TAP(seen); t < taps; t++) sum += TAP(t) * (u)

KERNEL short_conv_forward(IN(x), IN(w), IN(bias), INDICES(offsets), OUT(y), long d, long taps,
                          long count) {
    MY_ROW;
    SEQUENCE(offsets);
    for (long j = LANE; j < d; j += GROUP) {
        CONVOLVED(sum, row - *ROW(offsets, s) + 1, GATED(row - taps + 1 + t));
        *ROW(y, row * d + j) = GATE(row) * sum;
    }
}

KERNEL short_conv_put(IN(x), INDICES(rows), OUT(store), long d) {
    MY_ROW;
    for (long j = LANE; j < d; j += GROUP) *ROW(store, *ROW(rows, row) * d + j) = GATED(row);
}
KERNEL short_conv_step(IN(x), IN(w), IN(bias), INDICES(q_offsets), INDICES(k_offsets), IN(store),
                       OUT(y), long d, long taps, long count) {
    MY_ROW;
    SEQUENCE(q_offsets);
    const long at = *ROW(k_offsets, s + 1) - (*ROW(q_offsets, s + 1) - row);
    const long seen = max(0L, at - *ROW(k_offsets, s) + 1);
    for (long j = LANE; j < d; j += GROUP) {
        CONVOLVED(sum, seen, *ROW(store, (at - taps + 1 + t) * d + j));
        *ROW(y, row * d + j) = GATE(row) * sum;
    }
}

KERNEL short_conv_grad(IN(dy), IN(x), IN(w), IN(bias), INDICES(offsets), OUT(dx), long d, long taps,
                       long count) {
    MY_ROW;
    SEQUENCE(offsets);
    const long left = *ROW(offsets, s + 1) - row;
    for (long j = LANE; j < d; j += GROUP) {
        CONVOLVED(sum, row - *ROW(offsets, s) + 1, GATED(row - taps + 1 + t));
        float du = 0;
        for (long t = FIRST_TAP(left); t < taps; t++) {
            const long later = row + taps - 1 - t;
            du += TAP(t) * *ROW(dy, later * d + j) * GATE(later);
        }
        *ROW(dx, row * 3 * d + j) = du * *ROW(x, row * 3 * d + 2 * d + j);
        *ROW(dx, row * 3 * d + d + j) = *ROW(dy, row * d + j) * sum;
        *ROW(dx, row * 3 * d + 2 * d + j) = du * *ROW(x, row * 3 * d + j);
    }
}
/* A work-item has one tap of one column; the bias is a last tap. */
KERNEL short_conv_weight_grad(IN(dy), IN(x), INDICES(offsets), OUT(dw), OUT(dbias), long d,
                              long taps, long count) {
    const long j = get_global_id(0) / (taps + 1), t = get_global_id(0) % (taps + 1);
    if (j >= d) return;
    exact sum = {0, 0};
    for (long s = 0; s + 1 < count; s++) {
        const long ago = t < taps ? taps - 1 - t : 0;
        for (long row = *ROW(offsets, s) + ago; row < *ROW(offsets, s + 1); row++) {
            const float dv = *ROW(dy, row * d + j) * GATE(row);
            add_to(&sum, t < taps ? dv * GATED(row - ago) : dv);
        }
    }
    if (t < taps && dw_data) *ROW(dw, j * taps + t) = (float)value_of(sum);
    if (t == taps && dbias_data) *ROW(dbias, j) = (float)value_of(sum);
}

/* The same convolutions with silu in place of gates. */
#define SIGMOID(x) (1.0f / (1.0f + exp(-(x))))

KERNEL conv_silu_forward(IN(x), IN(w), IN(bias), INDICES(offsets), OUT(y), long d, long taps,
                         long count) {
    MY_ROW;
    SEQUENCE(offsets);
    for (long j = LANE; j < d; j += GROUP) {
        CONVOLVED(sum, row - *ROW(offsets, s) + 1, *ROW(x, (row - taps + 1 + t) * d + j));
        *ROW(y, row * d + j) = sum * SIGMOID(sum);
    }
}
KERNEL conv_silu_put(IN(x), INDICES(rows), OUT(store), long d) {
    MY_ROW;
    for (long j = LANE; j < d; j += GROUP)
        *ROW(store, *ROW(rows, row) * d + j) = *ROW(x, row * d + j);
}
KERNEL conv_silu_step(IN(w), IN(bias), INDICES(q_offsets), INDICES(k_offsets), IN(store), OUT(y),
                      long d, long taps, long count) {
    MY_ROW;
    SEQUENCE(q_offsets);
    const long at = *ROW(k_offsets, s + 1) - (*ROW(q_offsets, s + 1) - row);
    const long seen = max(0L, at - *ROW(k_offsets, s) + 1);
    for (long j = LANE; j < d; j += GROUP) {
        CONVOLVED(sum, seen, *ROW(store, (at - taps + 1 + t) * d + j));
        *ROW(y, row * d + j) = sum * SIGMOID(sum);
    }
}
/* The gradient of the sum under silu. */
KERNEL conv_silu_slope(IN(dy), IN(x), IN(w), IN(bias), INDICES(offsets), OUT(du), long d, long taps,
                       long count) {
    MY_ROW;
    SEQUENCE(offsets);
    for (long j = LANE; j < d; j += GROUP) {
        CONVOLVED(sum, row - *ROW(offsets, s) + 1, *ROW(x, (row - taps + 1 + t) * d + j));
        const float one = SIGMOID(sum);
        *ROW(du, row * d + j) = *ROW(dy, row * d + j) * one * (1 + sum * (1 - one));
    }
}
KERNEL conv_silu_grad(IN(du), IN(w), INDICES(offsets), OUT(dx), long d, long taps, long count) {
    MY_ROW;
    SEQUENCE(offsets);
    const long left = *ROW(offsets, s + 1) - row;
    for (long j = LANE; j < d; j += GROUP) {
        float sum = 0;
        for (long t = FIRST_TAP(left); t < taps; t++)
            sum += TAP(t) * *ROW(du, (row + taps - 1 - t) * d + j);
        *ROW(dx, row * d + j) = sum;
    }
}
KERNEL conv_silu_weight_grad(IN(du), IN(x), INDICES(offsets), OUT(dw), OUT(dbias), long d,
                             long taps, long count) {
    const long j = get_global_id(0) / (taps + 1), t = get_global_id(0) % (taps + 1);
    if (j >= d) return;
    exact sum = {0, 0};
    for (long s = 0; s + 1 < count; s++) {
        const long ago = t < taps ? taps - 1 - t : 0;
        for (long row = *ROW(offsets, s) + ago; row < *ROW(offsets, s + 1); row++) {
            const float one = *ROW(du, row * d + j);
            add_to(&sum, t < taps ? one * *ROW(x, (row - ago) * d + j) : one);
        }
    }
    if (t < taps && dw_data) *ROW(dw, j * taps + t) = (float)value_of(sum);
    if (t == taps && dbias_data) *ROW(dbias, j) = (float)value_of(sum);
}

/* ---- Work-items with some columns, for all rows or one part of them */

/* `i`: the work-item's first column. `part`: its part of the rows; a part is a run of groups. */
#define MY_COLUMNS(d) \
    const long across = ((d) + STEP - 1) / STEP, part = get_group_id(0) / across; \
    const long i = (get_group_id(0) % across) * STEP + LANE * WIDTH; \
    if (i >= (d)) return

/* to[rows[m],:] += from[m,:] in the order of m, or with `put` = from[m,:]. Part p has the rows r
 * with r % parts == p. */
KERNEL add_rows(IN(from), INDICES(rows), OUT(to), long put, long count, long parts, long d) {
    MY_COLUMNS(d);
    for (long m = 0; m < count; m++) {
        const long row = *ROW(rows, m);
        if (row % parts == part) PUT(to, row, put ? GET(from, m) : GET(to, row) + GET(from, m));
    }
}

/* out[part,:] = the sum over the part's rows of a, a b or a (b - offset), times rstd of the row if
 * that is given. */
KERNEL sum_columns(IN(a), IN(b), IN(offset), IN(rstd), OUT(out), long n, long each, long d) {
    MY_COLUMNS(d);
    V sum = v_set(0), minus = offset_data ? GET(offset, 0) : v_set(0);
    for (long row = part * each; row < min(n, (part + 1) * each); row++) {
        V v = GET(a, row);
        if (b_data) v *= GET(b, row) - minus;
        if (rstd_data) v *= *ROW(rstd, row);
        sum += v;
    }
    PUT(out, part, sum);
}

/* out = the sum of the parts. */
KERNEL join_columns(IN(parts), OUT(out), long count, long d) {
    const long j = get_global_id(0);
    if (j >= d) return;
    exact sum = {0, 0};
    for (long part = 0; part < count; part++) add_to(&sum, *ROW(parts, part * d + j));
    *ROW(out, j) = (float)value_of(sum);
}

/* above[j] = 1 where some |x[i,j]| is above bound[i], or either is NaN. */
KERNEL columns_above(IN(x), IN(bound), ARRAY(uchar, above), long n, long v) {
    const long j = get_global_id(0);
    if (j >= v) return;
    int below = 1;
    for (long row = 0; row < n; row++) below &= fabs(*ROW(x, row * v + j)) <= *ROW(bound, row);
    *ROW(above, j) = !below;
}

/* ---- Routing of mixtures of experts, one token per work-item, as in
 * kernels/layers/routing.tpl.h */

#define MY_TOKEN \
    const long token = get_global_id(0); \
    if (token >= n) return
INLINE float ranked(float x) { return x == x ? x : -INFINITY; }

KERNEL top_experts(IN(logits), ARRAY(int, chosen), long experts, long k, long n) {
    MY_TOKEN;
    const global float *x = ROW(logits, token * experts);
    float last = INFINITY;
    long last_at = -1, count = 0;
    for (long i = 0; i < k && i < experts; i++) {
        float best = -INFINITY;
        long best_at = -1;
        for (long e = 0; e < experts; e++) {
            const float v = ranked(x[e]);
            if ((v < last || (v == last && e > last_at)) && (best_at < 0 || v > best)) {
                best = v;
                best_at = e;
            }
        }
        last = best;
        last_at = best_at;
    }
    for (long e = 0; e < experts && count < k; e++) {
        const float v = ranked(x[e]);
        if (v > last || (v == last && e <= last_at)) *ROW(chosen, token * k + count++) = (int)e;
    }
    for (; count < k; count++) *ROW(chosen, token * k + count) = -1;
}

/* Work-item e counts the visits of the experts before e, then gives out those of e. */
KERNEL sort_visits(INDICES(chosen), ARRAY(int, tokens), ARRAY(int, visits), ARRAY(int, offsets),
                   long experts, long k, long n) {
    const long e = get_global_id(0);
    if (e > experts) return;
    int visit = 0;
    for (long i = 0; i < n * k; i++) visit += *ROW(chosen, i) < e;
    *ROW(offsets, e) = visit;
    for (long i = 0; i < n * k && e < experts; i++)
        if (*ROW(chosen, i) == e) {
            *ROW(visits, i) = visit;
            *ROW(tokens, visit++) = (int)(i / k);
        }
}

/* The shares of a token: an expert's is its own number / total; in a softmax that number is
 * e^(logit - top). */
typedef struct {
    SCALAR top, total;
} router_share;
#define ROUTER_EPS ((SCALAR)1e-6)
#define RULE long normalize, long sigmoid, SCALAR factor
INLINE SCALAR router_own(float x, router_share share, long sigmoid) {
    return sigmoid ? 1 / (1 + exp(-(SCALAR)x)) : exp((SCALAR)x - share.top);
}
INLINE router_share router_share_of(const global float *x, long experts, const global int *chosen,
                                    long k, long normalize, long sigmoid) {
    router_share share;
    float top = -INFINITY;
    for (long e = 0; e < experts; e++) top = x[e] > top || x[e] != x[e] ? x[e] : top;
    share.top = top;
    share.total = sigmoid ? (normalize ? ROUTER_EPS : 1) : 0;
    const long count = normalize ? k : sigmoid ? 0 : experts;
    for (long i = 0; i < count; i++)
        share.total += router_own(x[normalize ? chosen[i] : i], share, sigmoid);
    return share;
}
#define SHARE(e) (router_own(x[e], share, sigmoid) / share.total)

KERNEL sigmoid_scores(IN(logits), IN(bias), OUT(scores), long experts, long n) {
    MY_TOKEN;
    for (long e = 0; e < experts; e++) {
        const long at = token * experts + e;
        const SCALAR shift = bias_data ? *ROW(bias, e) : 0;
        *ROW(scores, at) = (float)(1 / (1 + exp(-(SCALAR)*ROW(logits, at))) + shift);
    }
}

KERNEL visit_weights(IN(logits), INDICES(chosen), INDICES(visits), OUT(weights), RULE,
                     long experts, long k, long n) {
    MY_TOKEN;
    const global float *x = ROW(logits, token * experts);
    const global int *mine = ROW(chosen, token * k);
    const router_share share = router_share_of(x, experts, mine, k, normalize, sigmoid);
    for (long i = 0; i < k; i++)
        *ROW(weights, *ROW(visits, token * k + i)) = (float)(factor * SHARE(mine[i]));
}

KERNEL visit_weights_grad(IN(slope), IN(logits), INDICES(chosen), INDICES(visits), OUT(dlogits),
                          RULE, long experts, long k, long n) {
    MY_TOKEN;
    const global float *x = ROW(logits, token * experts);
    const global int *mine = ROW(chosen, token * k);
    const router_share share = router_share_of(x, experts, mine, k, normalize, sigmoid);
    SCALAR mean = 0;
    for (long i = 0; i < k && (normalize || !sigmoid); i++)
        mean += SHARE(mine[i]) * *ROW(slope, *ROW(visits, token * k + i));
    for (long e = 0; e < experts; e++)
        *ROW(dlogits, token * experts + e) =
            normalize || sigmoid ? 0 : (float)(factor * SHARE(e) * -mean);
    for (long i = 0; i < k; i++) {
        const SCALAR slope_of = *ROW(slope, *ROW(visits, token * k + i)) - mean;
        const SCALAR inner = sigmoid ? 1 - router_own(x[mine[i]], share, sigmoid) : 1;
        *ROW(dlogits, token * experts + mine[i]) =
            (float)(factor * SHARE(mine[i]) * slope_of * inner);
    }
}
