/* The gated delta rule, row by row: see kernels/layers/delta_rule.tpl.h. A work-group has a head,
 * its work-items have columns of the state, and in the gradient also rows. */
#define INDEX long
#include "types.cl"

#define IN(name) ARRAY(const float, name)
#define OUT(name) ARRAY(float, name)
#define INDICES(name) ARRAY(const int, name)
#define COLUMNS for (long j = LANE; j < e; j += GROUP)
#define EACH_ROW for (long i = LANE; i < d; i += GROUP)

/* One over the length of d numbers from `at` on; with eps < 0 1. */
#define INVERSE_LENGTH(name, at) inverse_length(ROW(name, at), d, eps)
INLINE float inverse_length(const global float *x, long d, float eps) {
    if (eps < 0) return 1;
    SCALAR sum = 0;
    for (long i = 0; i < d; i++) sum += (SCALAR)x[i] * x[i];
    return (float)(1 / sqrt(sum + (SCALAR)eps));
}

/* Goes through the rows of a sequence. States come from place from[s] of `first` and go to to[s] of
 * `last`; without these arrays, to those of the sequence. */
KERNEL delta_rule(IN(q), IN(k), IN(v), IN(g), IN(beta), INDICES(offsets), INDICES(from),
                  INDICES(to), IN(first), OUT(last), OUT(o), long groups, long heads, long d,
                  long e, float scale, float eps, long delta) {
    const long s = get_group_id(0) / heads, h = get_group_id(0) % heads;
    const long begin = *ROW(offsets, s), end = *ROW(offsets, s + 1);
    if (from_data && begin == end) return;
    const long before = ((from_data ? *ROW(from, s) : s) * heads + h) * d * e;
    const long state = ((to_data ? *ROW(to, s) : s) * heads + h) * d * e;
    COLUMNS {
        for (long i = 0; i < d; i++)
            *ROW(last, state + i * e + j) = first_data ? *ROW(first, before + i * e + j) : 0;
        for (long row = begin; row < end; row++) {
            const long value = row * heads + h, key = (row * groups + h / (heads / groups)) * d;
            const float of_k = INVERSE_LENGTH(k, key), of_q = scale * INVERSE_LENGTH(q, key);
            const float gate = exp(*ROW(g, value));
            float known = 0, read = 0;
            for (long i = 0; delta && i < d; i++)
                known += *ROW(k, key + i) * *ROW(last, state + i * e + j);
            const float u = *ROW(beta, value) * (*ROW(v, value * e + j) - gate * of_k * known);
            for (long i = 0; i < d; i++) {
                global float *at = ROW(last, state + i * e + j);
                *at = gate * *at + of_k * *ROW(k, key + i) * u;
                read += *ROW(q, key + i) * *at;
            }
            *ROW(o, value * e + j) = of_q * read;
        }
    }
}

/* The state of column j after a row, at `next`, from the one at `now`; they may be the same. */
#define NEXT_STATE(now, next) \
    { \
        const long value = row * heads + h, key = (row * groups + group) * d; \
        const float of_k = INVERSE_LENGTH(k, key), gate = exp(*ROW(g, value)); \
        float known = 0; \
        for (long i = 0; delta && i < d; i++) \
            known += *ROW(k, key + i) * *ROW(work, (now) + i * e + j); \
        const float u = *ROW(beta, value) * (*ROW(v, value * e + j) - gate * of_k * known); \
        for (long i = 0; i < d; i++) \
            *ROW(work, (next) + i * e + j) = \
                gate * *ROW(work, (now) + i * e + j) + of_k * *ROW(k, key + i) * u; \
    }
#define COPY_STATE(from, to) \
    for (long i = 0; i < d; i++) *ROW(work, (to) + i * e + j) = *ROW(work, (from) + i * e + j)

/* A group has a head of keys and its heads of values. Its memory, `each` floats of `work`: the
 * states before every `part` rows, those before and after the rows of one part, the gradient of the
 * state, and of one row u, dy, and the gradients of k and q of length 1. */
KERNEL delta_rule_grad(IN(d_o), IN(dlast), IN(q), IN(k), IN(v), IN(g), IN(beta), INDICES(offsets),
                       IN(state), OUT(dq), OUT(dk), OUT(dv), OUT(dg), OUT(dbeta), OUT(dstate),
                       OUT(work), long each, long part, long groups, long heads, long d, long e,
                       float scale, float eps, long delta) {
    GROUP_MEMORY
    const long s = get_group_id(0) / groups, group = get_group_id(0) % groups;
    const long begin = *ROW(offsets, s), end = *ROW(offsets, s + 1), size = d * e;
    const long kept = get_group_id(0) * each, parts = (end - begin + part - 1) / part;
    const long slope = kept + each - size - 2 * e - 2 * d, us = slope + size, dys = us + e;
    const long slopes_k = dys + e, slopes_q = slopes_k + d;
    const long inside = slope - (part + 1) * size;
    const long share = heads / groups;
    for (long h = group * share; h < (group + 1) * share; h++) {
        const long given = (s * heads + h) * size;
        COLUMNS {
            for (long i = 0; i < d; i++) {
                *ROW(work, inside + i * e + j) = state_data ? *ROW(state, given + i * e + j) : 0;
                *ROW(work, slope + i * e + j) = dlast_data ? *ROW(dlast, given + i * e + j) : 0;
            }
            for (long row = begin; row < end; row++) {
                if ((row - begin) % part == 0)
                    COPY_STATE(inside, kept + (row - begin) / part * size);
                NEXT_STATE(inside, inside)
            }
        }
        for (long p = parts - 1; p >= 0; p--) {
            const long first = begin + p * part, after = min(first + part, end);
            COLUMNS {
                COPY_STATE(kept + p * size, inside);
                for (long row = first; row < after; row++)
                    NEXT_STATE(inside + (row - first) * size, inside + (row + 1 - first) * size)
            }
            for (long row = after - 1; row >= first; row--) {
                const long value = row * heads + h, key = (row * groups + group) * d;
                const float of_k = INVERSE_LENGTH(k, key), of_q = INVERSE_LENGTH(q, key);
                const float gate = exp(*ROW(g, value)), rate = *ROW(beta, value);
                const long now = inside + (row - first) * size, next = now + size;
                float by_rate = 0;
                COLUMNS {
                    const float up = scale * of_q * *ROW(d_o, value * e + j);
                    float du = 0, known = 0;
                    for (long i = 0; i < d; i++) {
                        global float *at = ROW(work, slope + i * e + j);
                        *at += *ROW(q, key + i) * up;
                        du += *ROW(k, key + i) * *at;
                        if (delta) known += *ROW(k, key + i) * *ROW(work, now + i * e + j);
                    }
                    const float y = *ROW(v, value * e + j) - gate * of_k * known;
                    by_rate += of_k * du * y;
                    *ROW(work, us + j) = rate * y;
                    *ROW(dv, value * e + j) = rate * of_k * du;
                    *ROW(work, dys + j) = delta ? rate * of_k * du : 0;
                }
                const SCALAR of_rate = group_sum(by_rate);
                if (LANE == 0) *ROW(dbeta, value) = (float)of_rate;
                float by_gate = 0, along_k = 0, along_q = 0;
                EACH_ROW {
                    const float key_i = of_k * *ROW(k, key + i);
                    float slope_k = 0, slope_q = 0;
                    for (long j = 0; j < e; j++) {
                        global float *at = ROW(work, slope + i * e + j);
                        const float old = gate * *ROW(work, now + i * e + j);
                        const float dy = *ROW(work, dys + j);
                        slope_q += *ROW(d_o, value * e + j) * *ROW(work, next + i * e + j);
                        slope_k += *ROW(work, us + j) * *at - dy * old;
                        const float one = *at - key_i * dy;
                        by_gate += one * old;
                        *at = gate * one;
                    }
                    along_k += key_i * slope_k;
                    along_q += of_q * *ROW(q, key + i) * slope_q;
                    *ROW(work, slopes_k + i) = slope_k;
                    *ROW(work, slopes_q + i) = slope_q;
                }
                const SCALAR of_gate = group_sum(by_gate);
                if (LANE == 0) *ROW(dg, value) = (float)of_gate;
                const float k_along = (float)group_sum(eps < 0 ? 0 : along_k);
                const float q_along = (float)group_sum(eps < 0 ? 0 : along_q);
                EACH_ROW {
                    const float to_k =
                        of_k * (*ROW(work, slopes_k + i) - k_along * of_k * *ROW(k, key + i));
                    const float to_q =
                        scale * of_q *
                        (*ROW(work, slopes_q + i) - q_along * of_q * *ROW(q, key + i));
                    const int add = h > group * share;
                    *ROW(dk, key + i) = to_k + (add ? *ROW(dk, key + i) : 0);
                    *ROW(dq, key + i) = to_q + (add ? *ROW(dq, key + i) : 0);
                }
            }
        }
        (void)group_sum(0); /* columns are written; a sequence without rows has not waited for it */
        if (dstate_data)
            EACH_ROW for (long j = 0; j < e; j++) * ROW(dstate, given + i * e + j) =
                *ROW(work, slope + i * e + j);
        (void)group_sum(0);
    }
}

/* ---- gates, an element for each work-item */

#define SIGMOID(x) (1 / (1 + exp(-(x))))

KERNEL delta_gates_forward(IN(a), IN(b), IN(a_log), IN(dt_bias), OUT(g), OUT(beta), long n,
                           long h) {
    const long i = get_global_id(0);
    if (i >= n) return;
    const float x = *ROW(a, i) + *ROW(dt_bias, i % h);
    *ROW(g, i) = -exp(*ROW(a_log, i % h)) * (fmax(x, 0.0f) + log1p(exp(-fabs(x))));
    *ROW(beta, i) = SIGMOID(*ROW(b, i));
}
KERNEL delta_gates_grad(IN(dg), IN(dbeta), IN(a), IN(b), IN(a_log), IN(dt_bias), OUT(da), OUT(db),
                        long n, long h) {
    const long i = get_global_id(0);
    if (i >= n) return;
    const float rate = SIGMOID(*ROW(b, i));
    *ROW(da, i) =
        -exp(*ROW(a_log, i % h)) * *ROW(dg, i) * SIGMOID(*ROW(a, i) + *ROW(dt_bias, i % h));
    *ROW(db, i) = *ROW(dbeta, i) * rate * (1 - rate);
}

KERNEL scan_gates_forward(IN(x), IN(a_log), IN(dt_bias), OUT(dt), OUT(g), long n, long h, float low,
                          float high) {
    const long i = get_global_id(0);
    if (i >= n) return;
    const float y = *ROW(x, i) + *ROW(dt_bias, i % h);
    const float step = fmin(high, fmax(low, fmax(y, 0.0f) + log1p(exp(-fabs(y)))));
    *ROW(dt, i) = step;
    *ROW(g, i) = -exp(*ROW(a_log, i % h)) * step;
}
KERNEL scan_gates_grad(IN(ddt), IN(dg), IN(x), IN(a_log), IN(dt_bias), OUT(dx), long n, long h,
                       float low, float high) {
    const long i = get_global_id(0);
    if (i >= n) return;
    const float y = *ROW(x, i) + *ROW(dt_bias, i % h);
    const float step = fmax(y, 0.0f) + log1p(exp(-fabs(y)));
    const float by_dt = *ROW(ddt, i) - exp(*ROW(a_log, i % h)) * *ROW(dg, i);
    *ROW(dx, i) = step < low || step > high ? 0 : by_dt * SIGMOID(y);
}
