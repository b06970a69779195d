/* The walk that takes a row's statistics: the largest logit, the sum of the weights, their mean.
 *
 * A row is walked in blocks that stay in the first-level cache. The weights are kept in scratch, so
 * that each is computed once: later walks scale the kept ones. Sums run in single vectors within a
 * block only, and in float64 from block to block, so that the longest rows keep their digits.
 */
#ifndef ROWLOSS_STATISTICS
#define ROWLOSS_STATISTICS
#include "gradient.tpl.h"
#include "rows.tpl.h"
#include "weights.tpl.h"

INLINE REAL block_max(const REAL *x, int64_t n) {
    REAL lowest = (REAL)-INFINITY;
    V a = v_set(lowest), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        a = v_max(v_load(x + i), a);
        b = v_max(v_load(x + i + WIDTH), b);
        c = v_max(v_load(x + i + 2 * WIDTH), c);
        d = v_max(v_load(x + i + 3 * WIDTH), d);
    }
    for (; i < n; i += WIDTH) a = v_max(load_lanes(x + i, n - i, lowest), a);
    return v_largest(v_max(v_max(a, b), v_max(c, d)));
}

/* w(scale (x - shift)); `kept` is what the gradient needs of it: the weight, or weight times
 * slope. */
INLINE V weigh(weight_family f, V x, V shift, V scale, int with_slope, V *kept) {
    V w = f.weight(f.shifted ? (x - shift) * scale : x);
    *kept = with_slope && f.slope ? w * f.slope(x) : w;
    return w;
}

/* The sum of a block's weights. Meanwhile `next`, in elements of `bytes` bytes, is prefetched into
 * the second-level cache (the first is full), and the pending gradient of another row written. */
INLINE double block_sum(weight_family f, const REAL *x, int64_t n, REAL shift, REAL scale,
                        int with_slope, REAL *kept, const char *next, int64_t bytes,
                        const pending_block *pending) {
    V s = v_set(shift), by = v_set(scale), a = {0}, b = {0}, k;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        for (int64_t line = 0; line < 2 * WIDTH * bytes; line += 64)
            __builtin_prefetch(next + i * bytes + line, 0, 2);
        write_step(pending, i);
        a += weigh(f, v_load(x + i), s, by, with_slope, &k);
        if (kept) v_store(kept + i, k);
        b += weigh(f, v_load(x + i + WIDTH), s, by, with_slope, &k);
        if (kept) v_store(kept + i + WIDTH, k);
    }
    double sum = (double)v_sum(a + b);
    for (; i < n; i += WIDTH) {
        int64_t m = n - i < WIDTH ? n - i : WIDTH;
        V w = weigh(f, load_lanes(x + i, m, 0), s, by, with_slope, &k);
        for (int64_t j = 0; j < m; j++) sum += (double)w[j];
        if (kept) store_lanes(kept + i, k, m);
    }
    return sum;
}

/* Adds the block's logits that are not masked to sum_x and count. `class_weight` may be NULL. */
INLINE void block_mean(const REAL *x, const REAL *class_weight, int64_t n, row_statistics *row) {
    V masked = v_set((REAL)-INFINITY), zero = {0}, one = v_set(1), sum = {0}, count = {0};
    V weights = {0};
    for (int64_t i = 0; i < n; i += WIDTH) {
        V v = load_lanes(x + i, n - i, (REAL)-INFINITY);
        count += v_select(v_equal(v, masked), zero, one);
        if (class_weight) {
            V w = load_lanes(class_weight + i, n - i, 0);
            weights += v_select(v_equal(v, masked), zero, w);
            sum += v_select(v_equal(v, masked), zero, w * v);
        } else sum += v_select(v_equal(v, masked), zero, v);
    }
    row->sum_x += (double)v_sum(sum);
    row->sum_class_weight += (double)v_sum(weights);
    row->count += (int64_t)v_sum(count);
}

/* How a row of logits is read: its storage, and what is done to each logit first. A prepared logit
 * is factor x, capped if softcap > 0. The walk that takes statistics keeps a row's prepared logits
 * in `keep`, unless that is NULL: the cap takes longer than the rest of a walk. */
typedef struct {
    const pl_rows *rows;
    REAL scale;
    int prepare;
    REAL factor, softcap;
    int with_slope, with_mean;
    const REAL *class_weight; /* [n], or NULL */
    REAL *keep;
} row_reading;

/* Elements [begin, begin + n) of row i as they are read, in place or in `buffer`. */
INLINE const REAL *read_block(row_reading in, int64_t i, int64_t begin, int64_t n, REAL *buffer) {
    const REAL *x = fetch(in.rows, i, begin, n, buffer);
    if (!in.prepare) return x;
    V factor = v_set(in.factor), softcap = v_set(in.softcap);
    for (int64_t j = 0; j < n; j += WIDTH) {
        V v = load_lanes(x + j, n - j, 0) * factor;
        store_lanes(buffer + j, in.softcap > 0 ? capped(v, softcap) : v, n - j);
    }
    if (in.keep) memcpy(in.keep + begin, buffer, (size_t)n * sizeof *buffer);
    return buffer;
}

/* `read_block` of a row whose statistics are taken: kept logits are copied. */
INLINE const REAL *reread_block(row_reading in, int64_t i, int64_t begin, int64_t n, REAL *buffer) {
    if (!in.keep) return read_block(in, i, begin, n, buffer);
    return memcpy(buffer, in.keep + begin, (size_t)n * sizeof *buffer);
}

/* One walk over row i into `row`, whose arrays exist already. A larger maximum rescales the
 * total. `pending`, which may be NULL, is written meanwhile: all of it, or with two walks per
 * row one half. */
INLINE void take_statistics(weight_family f, row_reading in, int64_t i, int64_t n,
                            row_statistics *row, const pending_gradient *pending, int walk,
                            int walks) {
    REAL buffer[ROW_BLOCK], shift = f.shifted ? (REAL)-INFINITY : 0;
    double total = 0;
    int64_t bytes = float_bytes[in.rows->type];
    row->sum_x = row->sum_class_weight = 0;
    row->count = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        const REAL *x = read_block(in, i, begin, m, buffer);
        REAL highest = f.shifted ? block_max(x, m) : 0;
        if (highest > shift) {
            /* e^-inf drops the sum over logits that were all -inf, but keeps a NaN. */
            total *= exp(((double)shift - (double)highest) * (double)in.scale);
            shift = highest;
        }
        row->block_shift[begin / ROW_BLOCK] = shift;
        pending_block block = {0};
        int write = pending && pending->out;
        if (write) {
            block = begin_block(pending, begin, m);
            share_block(&block, walk, walks);
        }
        /* As long as all logits are -inf they add e^(-inf - 0) = 0. */
        total += block_sum(f, x, m, shift == (REAL)-INFINITY ? 0 : shift, in.scale, in.with_slope,
                           row->kept ? row->kept + begin : NULL,
                           pl_row(in.rows, i) + (begin + ROW_BLOCK) * bytes + PREFETCH_BYTES, bytes,
                           &block);
        if (write && walk == walks - 1) finish_block(pending, &block, begin, m);
        if (in.with_mean) block_mean(x, in.class_weight ? in.class_weight + begin : NULL, m, row);
    }
    row->shift = shift;
    row->total = total;
}

#endif
