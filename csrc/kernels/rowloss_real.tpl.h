/* The row drivers for one computed type; included by rowloss.tpl.h for each.
 *
 * A row is walked in blocks that stay in the first-level cache. The first walk takes the statistics of its weights and keeps them
 * in scratch, so that each is computed once; the next ones scale what was kept. Rows in other types than the computed one are
 * converted block by block. Sums run in single vectors within a block only, in float64 from block to block, so that the longest
 * rows keep their digits.
 */
#define REAL TYPED(real)
#define V TYPED(vector)
#define WIDTH TYPED(WIDTH)

/* ---- rows in memory */

static const int TYPED(native) = sizeof(REAL) == 4 ? PL_F32 : PL_F64;

/* n 16-bit floats as the computed type. */
INLINE void TYPED(widen)(const uint16_t *p, int64_t n, int bf16, REAL *to) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        vf v = bf16 ? vf_from_bf16((const uint8_t *)(p + j)) : vf_from_f16((const uint8_t *)(p + j));
        if (sizeof(REAL) == 4) memcpy(to + j, &v, sizeof v);
        else
            for (int l = 0; l < LANES; l++) to[j + l] = (REAL)v[l];
    }
    if (j == n) return;
    uint16_t part[LANES] = {0};
    memcpy(part, p + j, (size_t)(n - j) * 2);
    vf v = bf16 ? vf_from_bf16((const uint8_t *)part) : vf_from_f16((const uint8_t *)part);
    for (int64_t l = 0; l < n - j; l++) to[j + l] = (REAL)v[l];
}

/* Elements [begin, begin + n) of a stored row: where they lie if they are of the computed type, else converted into `buffer`. */
static const REAL *TYPED(fetch)(const pl_rows *rows, int64_t i, int64_t begin, int64_t n, REAL *buffer) {
    const char *row = pl_row(rows, i);
    if ((int)rows->type == TYPED(native)) return (const REAL *)row + begin;
    if (rows->type == PL_BF16) TYPED(widen)((const uint16_t *)row + begin, n, 1, buffer);
    else if (rows->type == PL_F16) TYPED(widen)((const uint16_t *)row + begin, n, 0, buffer);
    else
        for (int64_t j = 0; j < n; j++) buffer[j] = (REAL)((const float *)row)[begin + j];
    return buffer;
}

/* Where n elements of a stored row are to be computed: in place, or in `buffer`, from where `put` converts them. */
INLINE REAL *TYPED(target)(const pl_rows *rows, int64_t i, int64_t begin, REAL *buffer) {
    return (int)rows->type == TYPED(native) ? (REAL *)pl_row(rows, i) + begin : buffer;
}
INLINE void TYPED(narrow)(const REAL *values, int64_t n, int bf16, uint16_t *to) {
    for (int64_t j = 0; j < n; j += LANES) {
        vf v = {0};
        int64_t m = n - j < LANES ? n - j : LANES;
        if (sizeof(REAL) == 4 && m == LANES) memcpy(&v, values + j, sizeof v);
        else
            for (int64_t l = 0; l < m; l++) v[l] = (float)values[j + l];
        uint16_t part[LANES], *at = m < LANES ? part : to + j;
        if (bf16) vf_to_bf16(at, v);
        else vf_to_f16(at, v);
        if (m < LANES) memcpy(to + j, part, (size_t)m * 2);
    }
}
static void TYPED(put)(const pl_rows *rows, int64_t i, int64_t begin, int64_t n, const REAL *values) {
    if ((int)rows->type == TYPED(native)) return;
    char *row = pl_row(rows, i);
    if (rows->type == PL_F32) {
        for (int64_t j = 0; j < n; j++) ((float *)row)[begin + j] = (float)values[j];
        return;
    }
    if (rows->type == PL_BF16) TYPED(narrow)(values, n, 1, (uint16_t *)row + begin);
    else TYPED(narrow)(values, n, 0, (uint16_t *)row + begin);
}

static void TYPED(put_zeros)(const pl_rows *rows, int64_t i, int64_t n) {
    memset(pl_row(rows, i), 0, (size_t)(n * float_bytes[rows->type]));
}

/* The vector at p, of which n elements are to be used; and its storing. */
INLINE V TYPED(load)(const REAL *p, int64_t n, REAL fill) { return n >= WIDTH ? VEC(load)(p) : VEC(load_part)(p, n, fill); }
INLINE void TYPED(store)(REAL *p, V v, int64_t n) {
    if (n >= WIDTH) VEC(store)(p, v);
    else VEC(store_part)(p, v, n);
}

/* ---- formulas, and the weight families as the driver takes them */

#include "../losses/formulas.h"
#include "../losses.def"

typedef struct {
    V (*weight)(V x);
    V (*slope)(V x); /* NULL where it is 1 */
    V (*log_weight)(V x);
    int shifted;
} TYPED(family);

#define FAMILY_softmax ((TYPED(family)){TYPED(softmax_weight), NULL, TYPED(softmax_log_weight), 1})
#define FAMILY_stablemax ((TYPED(family)){TYPED(stablemax_weight), TYPED(stablemax_slope), TYPED(stablemax_log_weight), 0})

/* ---- statistics of a row of weights */

/* The sum of the weights w(scale x) is total * e^(scale shift); shift is 0 if the family is not shifted. */
typedef struct {
    REAL shift;
    double total;
    double sum_x; /* of the logits that are not -inf, and their number */
    int64_t count;
    REAL *kept;        /* the weights, [n], or NULL where they are not needed again */
    REAL *block_shift; /* what is kept of each block is relative to, [blocks] */
} TYPED(row_statistics);

INLINE REAL TYPED(block_max)(const REAL *x, int64_t n) {
    REAL lowest = (REAL)-INFINITY;
    V a = VEC(set1)(lowest), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        a = VEC(max)(VEC(load)(x + i), a);
        b = VEC(max)(VEC(load)(x + i + WIDTH), b);
        c = VEC(max)(VEC(load)(x + i + 2 * WIDTH), c);
        d = VEC(max)(VEC(load)(x + i + 3 * WIDTH), d);
    }
    for (; i < n; i += WIDTH) a = VEC(max)(TYPED(load)(x + i, n - i, lowest), a);
    return VEC(hmax)(VEC(max)(VEC(max)(a, b), VEC(max)(c, d)));
}

/* w(scale (x - shift)), and what of it is kept for the gradient: itself, or times the slope. */
INLINE V TYPED(weigh)(TYPED(family) f, V x, V shift, V scale, int with_slope, V *kept) {
    V w = f.weight(f.shifted ? (x - shift) * scale : x);
    *kept = with_slope && f.slope ? w * f.slope(x) : w;
    return w;
}

/* The sum of a block's weights. Meanwhile the next block, stored at `next` in elements of `bytes`, is fetched from memory. */
INLINE double TYPED(block_sum)(TYPED(family) f, const REAL *x, int64_t n, REAL shift, REAL scale, int with_slope, REAL *kept,
                               const char *next, int64_t bytes) {
    V s = VEC(set1)(shift), by = VEC(set1)(scale), a = {0}, b = {0}, k;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        for (int64_t line = 0; line < 2 * WIDTH * bytes; line += 64) __builtin_prefetch(next + i * bytes + line);
        a += TYPED(weigh)(f, VEC(load)(x + i), s, by, with_slope, &k);
        if (kept) VEC(store)(kept + i, k);
        b += TYPED(weigh)(f, VEC(load)(x + i + WIDTH), s, by, with_slope, &k);
        if (kept) VEC(store)(kept + i + WIDTH, k);
    }
    double sum = (double)VEC(sum)(a + b);
    for (; i < n; i += WIDTH) {
        int64_t m = n - i < WIDTH ? n - i : WIDTH;
        V w = TYPED(weigh)(f, TYPED(load)(x + i, m, 0), s, by, with_slope, &k);
        for (int64_t j = 0; j < m; j++) sum += (double)w[j];
        if (kept) TYPED(store)(kept + i, k, m);
    }
    return sum;
}

/* Adds a block's logits to the statistics, those that are not masked. */
INLINE void TYPED(block_mean)(const REAL *x, int64_t n, TYPED(row_statistics) *row) {
    V masked = VEC(set1)((REAL)-INFINITY), zero = {0}, one = VEC(set1)(1), sum = {0}, count = {0};
    for (int64_t i = 0; i < n; i += WIDTH) {
        V v = TYPED(load)(x + i, n - i, (REAL)-INFINITY);
        sum += VEC(select)(v == masked, zero, v);
        count += VEC(select)(v == masked, zero, one);
    }
    row->sum_x += (double)VEC(sum)(sum);
    row->count += (int64_t)VEC(sum)(count);
}

INLINE void TYPED(cap_block)(const REAL *x, int64_t n, REAL softcap, REAL *to) {
    for (int64_t i = 0; i < n; i += WIDTH)
        TYPED(store)(to + i, TYPED(capped)(TYPED(load)(x + i, n - i, 0), VEC(set1)(softcap)), n - i);
}

/* How a row of logits is read: its storage, and what is done to each before anything else. */
typedef struct {
    const pl_rows *rows;
    REAL softcap, scale; /* no cap where softcap is 0 */
    int with_slope, with_mean;
} TYPED(reading);

/* One walk over row i; the total is taken anew relative to each larger maximum. `row` brings its arrays along. */
INLINE void TYPED(take_statistics)(TYPED(family) f, TYPED(reading) how, int64_t i, int64_t n, TYPED(row_statistics) *row) {
    REAL buffer[ROW_BLOCK], shift = f.shifted ? (REAL)-INFINITY : 0;
    double total = 0;
    int64_t bytes = float_bytes[how.rows->type];
    row->sum_x = 0;
    row->count = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        const REAL *x = TYPED(fetch)(how.rows, i, begin, m, buffer);
        if (how.softcap > 0) {
            TYPED(cap_block)(x, m, how.softcap, buffer);
            x = buffer;
        }
        REAL highest = f.shifted ? TYPED(block_max)(x, m) : 0;
        if (highest > shift) {
            /* e^-inf drops what only -inf logits left, but keeps a NaN. */
            total *= exp(((double)shift - (double)highest) * (double)how.scale);
            shift = highest;
        }
        row->block_shift[begin / ROW_BLOCK] = shift;
        /* As long as all logits are -inf they add e^(-inf - 0) = 0. */
        total += TYPED(block_sum)(f, x, m, shift == (REAL)-INFINITY ? 0 : shift, how.scale, how.with_slope,
                                  row->kept ? row->kept + begin : NULL, pl_row(how.rows, i) + (begin + ROW_BLOCK) * bytes, bytes);
        if (how.with_mean) TYPED(block_mean)(x, m, row);
    }
    row->shift = shift;
    row->total = total;
}

/* What makes probabilities (times `by`) of the weights that were kept of the block that begins at `begin`. */
INLINE V TYPED(block_factor)(const TYPED(row_statistics) *row, int64_t begin, REAL scale, double by) {
    REAL shift = row->block_shift[begin / ROW_BLOCK];
    double relative = shift == row->shift ? 1 : exp(((double)shift - (double)row->shift) * (double)scale);
    return VEC(set1)((REAL)(relative * by / row->total));
}

/* A worker's scratch: `part` is one padded row with the shifts of its blocks behind it. */
INLINE REAL *TYPED(scratch)(const row_job *job, int worker, int part) {
    return (REAL *)(job->scratch + (size_t)worker * job->stride + (size_t)part * job->row);
}
INLINE TYPED(row_statistics) TYPED(statistics_in)(REAL *scratch, int64_t n) {
    return (TYPED(row_statistics)){.kept = scratch, .block_shift = scratch + (n + WIDTH - 1) / WIDTH * WIDTH};
}

/* ---- class losses: arguments logits, labels, options..., dloss, loss, dlogits */

typedef void (*TYPED(class_formula))(TYPED(class_row) *row, const double *option);

/* to[i] = kept[i] * factor, past the caches if `stream`. */
INLINE void TYPED(scale_block)(const REAL *kept, int64_t n, V factor, REAL *to, int stream) {
    int64_t i = 0;
    if (stream) {
        for (; i < n && (uintptr_t)(to + i) % sizeof(V); i++) to[i] = kept[i] * factor[0];
        for (; i + WIDTH <= n; i += WIDTH) VEC(stream)(to + i, VEC(load)(kept + i) * factor);
    }
    for (; i + WIDTH <= n; i += WIDTH) VEC(store)(to + i, VEC(load)(kept + i) * factor);
    for (; i < n; i++) to[i] = kept[i] * factor[0];
}

/* The gradient of row i: slope (by_p p + [not masked] by_mean + [label] by_label). */
INLINE void TYPED(class_gradient)(TYPED(family) f, TYPED(reading) how, const row_job *job, int64_t i,
                                  const TYPED(row_statistics) *row, double by_p, double by_mean, double by_label) {
    const pl_call *c = job->call;
    const pl_rows *out = &c->arg[c->count - 1].rows;
    int64_t n = PL_DIM(c, 'V'), label = ((const int32_t *)c->arg[1].in)[i];
    REAL buffer[ROW_BLOCK], logits[ROW_BLOCK], at_label = TYPED(fetch)(how.rows, i, label, 1, logits)[0];
    int again = how.softcap > 0 || how.with_mean;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK;
        REAL *to = TYPED(target)(out, i, begin, buffer);
        if (again) { /* before the gradient, which may lie where the logits do */
            const REAL *x = TYPED(fetch)(how.rows, i, begin, m, logits);
            if (x != logits) memcpy(logits, x, (size_t)m * sizeof *x);
        }
        V factor = TYPED(block_factor)(row, begin, how.scale, by_p);
        TYPED(scale_block)(row->kept + begin, m, factor, to, job->stream && !again && to != buffer);
        if (how.with_mean) {
            V masked = VEC(set1)((REAL)-INFINITY), by = VEC(set1)((REAL)by_mean), zero = {0};
            for (int64_t j = 0; j < m; j += WIDTH) {
                V x = TYPED(load)(logits + j, m - j, 0), y = TYPED(load)(to + j, m - j, 0);
                TYPED(store)(to + j, y + VEC(select)(x == masked, zero, by), m - j);
            }
        }
        if (label >= begin && label < begin + m)
            to[label - begin] += (REAL)by_label * (f.slope ? f.slope(VEC(set1)(at_label))[0] : 1);
        if (how.softcap > 0)
            for (int64_t j = 0; j < m; j += WIDTH) {
                V x = TYPED(load)(logits + j, m - j, 0), t = TYPED(capped)(x, VEC(set1)(how.softcap)) / how.softcap;
                V slope = VEC(select)(x == VEC(set1)((REAL)-INFINITY), VEC(set1)(0), 1 - t * t);
                TYPED(store)(to + j, TYPED(load)(to + j, m - j, 0) * slope, m - j);
            }
        TYPED(put)(out, i, begin, m, to);
    }
}

/* Rows [begin, end) of a class loss. A row with label -1 gives 0 and gradient 0. */
INLINE void TYPED(class_rows)(TYPED(family) f, TYPED(class_formula) formula, int mean_option, int softcap_option,
                              const row_job *job, int64_t begin, int64_t end, int worker) {
    const pl_call *c = job->call;
    int64_t n = PL_DIM(c, 'V');
    const int32_t *labels = c->arg[1].in;
    const REAL *dloss = c->arg[c->count - 3].in;
    REAL *loss = c->arg[c->count - 2].out, *scratch = TYPED(scratch)(job, worker, 0), at[1];
    const pl_rows *out = &c->arg[c->count - 1].rows;
    double option[PL_MAX_ARGS];
    for (int o = 2; o < c->count - 3; o++) option[o - 2] = c->arg[o].f;
    TYPED(reading) how = {.rows = &c->arg[0].rows, .scale = 1, .with_slope = 1};
    if (softcap_option >= 0) how.softcap = (REAL)option[softcap_option];
    if (mean_option >= 0) how.with_mean = option[mean_option] > 0;
    for (int64_t i = begin; i < end; i++) {
        int silent = out->data && (labels[i] < 0 || (dloss && dloss[i] == 0)), gradient = out->data && !silent;
        if (labels[i] < 0) {
            loss[i] = 0;
            if (silent) TYPED(put_zeros)(out, i, n);
            continue;
        }
        V at_label = VEC(set1)(TYPED(fetch)(how.rows, i, labels[i], 1, at)[0]);
        if (how.softcap > 0) at_label = TYPED(capped)(at_label, VEC(set1)(how.softcap));
        /* The plain ways are instances of their own. */
        TYPED(row_statistics) row = TYPED(statistics_in)(scratch, n);
        TYPED(reading) plain = {.rows = how.rows, .scale = 1, .with_slope = 1};
        if (how.softcap > 0 || how.with_mean) {
            TYPED(take_statistics)(f, how, i, n, &row);
        } else if (gradient) {
            TYPED(take_statistics)(f, plain, i, n, &row);
        } else {
            row.kept = NULL;
            TYPED(take_statistics)(f, plain, i, n, &row);
        }
        double log_total = log(row.total);
        TYPED(class_row) r = {.log_p = ((double)f.log_weight(at_label)[0] - (double)row.shift) - log_total,
                              .log_sum = log_total + (double)row.shift};
        if (how.with_mean) r.mean_log_p = (row.sum_x / (double)row.count - (double)row.shift) - log_total;
        formula(&r, option);
        loss[i] = (REAL)r.loss;
        if (silent) TYPED(put_zeros)(out, i, n); /* only now: it may lie where the logits do */
        if (!gradient) continue;
        double given = dloss ? (double)dloss[i] : 1;
        double by_p = given * (r.d_log_sum - r.d_log_p - r.d_mean_log_p), by_mean = 0;
        if (how.with_mean) by_mean = given * r.d_mean_log_p / (double)row.count;
        TYPED(class_gradient)(f, how, job, i, &row, by_p, by_mean, given * r.d_log_p);
    }
}

/* ---- pair losses: arguments q, p, temperature, options..., dloss, loss, dq, dp */

typedef void (*TYPED(pair_formula))(TYPED(pair_element) *e, const double *option);

/* What one of the two rows needs: its weights, its derivatives where they have to wait for their sum, and that sum. */
typedef struct {
    TYPED(row_statistics) row;
    REAL *by;
    double sum;
} TYPED(pair_side);

/* gradient = factor (by - prob * sum) of one row, prob from its kept weights. */
INLINE void TYPED(pair_gradient)(const row_job *job, const pl_rows *out, int64_t i, const TYPED(pair_side) *s, REAL scale,
                                 double factor) {
    int64_t n = PL_DIM(job->call, 'V');
    REAL buffer[ROW_BLOCK];
    V by = VEC(set1)((REAL)factor);
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK, j = 0;
        REAL *to = TYPED(target)(out, i, begin, buffer);
        const REAL *derivative = s->by + begin, *kept = s->row.kept + begin;
        V prob = TYPED(block_factor)(&s->row, begin, scale, -factor * s->sum);
        if (job->stream && to != buffer) {
            for (; j < m && (uintptr_t)(to + j) % sizeof(V); j++) to[j] = derivative[j] * by[0] + kept[j] * prob[0];
            for (; j + WIDTH <= m; j += WIDTH) VEC(stream)(to + j, VEC(load)(derivative + j) * by + VEC(load)(kept + j) * prob);
        }
        for (; j + WIDTH <= m; j += WIDTH) VEC(store)(to + j, VEC(load)(derivative + j) * by + VEC(load)(kept + j) * prob);
        for (; j < m; j++) to[j] = derivative[j] * by[0] + kept[j] * prob[0];
        TYPED(put)(out, i, begin, m, to);
    }
}

/* What a walk over two rows is asked for. With q_direct, the table says that by_q sums to 0: it is q's gradient itself. */
typedef struct {
    int want_q, want_p, q_direct;
} TYPED(pair_mode);

/* `left` elements of the two rows at once; returns their part of the loss. */
INLINE V TYPED(pair_step)(TYPED(pair_formula) formula, const double *option, TYPED(pair_mode) mode, const REAL *xq,
                          const REAL *xp, const REAL *kept_q, const REAL *kept_p, int64_t left, const V constants[6], V *by_q,
                          V *by_p) {
    V max_q = constants[0], max_p = constants[1], scale = constants[2], offset = constants[3];
    TYPED(pair_element) e = {.q = TYPED(load)(kept_q, left, 0) * constants[4], .p = TYPED(load)(kept_p, left, 0) * constants[5]};
    /* log(q / p) = scale ((x_q - max_q) - (x_p - max_p)) - (log total_q - log total_p): large common parts go first. */
    e.log_ratio = ((TYPED(load)(xq, left, 0) - max_q) - (TYPED(load)(xp, left, 0) - max_p)) * scale - offset;
    formula(&e, option);
    if (left < WIDTH) /* lanes past the end of a row may hold anything */
        for (int64_t l = left; l < WIDTH; l++) e.loss[l] = e.by_q[l] = e.by_p[l] = 0;
    if (mode.want_q) *by_q = e.by_q;
    if (mode.want_p) *by_p = e.by_p;
    return e.loss;
}

/* Row i after the statistics of both: the loss; by_q and by_p kept and summed where wanted, or the gradient of q itself, times
 * `direct`. */
INLINE double TYPED(pair_walk)(TYPED(pair_formula) formula, const double *option, const row_job *job, int64_t i, REAL scale,
                               TYPED(pair_side) *q, TYPED(pair_side) *p, TYPED(pair_mode) mode, double direct) {
    const pl_call *c = job->call;
    const pl_rows *out = &c->arg[c->count - 2].rows;
    int64_t n = PL_DIM(c, 'V');
    REAL from_q[ROW_BLOCK], from_p[ROW_BLOCK], buffer[ROW_BLOCK];
    V by = VEC(set1)((REAL)direct);
    V constants[6] = {VEC(set1)(q->row.shift), VEC(set1)(p->row.shift), VEC(set1)(scale),
                      VEC(set1)((REAL)(log(q->row.total) - log(p->row.total)))};
    double total = 0;
    q->sum = p->sum = 0;
    for (int64_t begin = 0; begin < n; begin += ROW_BLOCK) {
        int64_t m = n - begin < ROW_BLOCK ? n - begin : ROW_BLOCK, j = 0;
        const REAL *xq = TYPED(fetch)(&c->arg[0].rows, i, begin, m, from_q),
                   *xp = TYPED(fetch)(&c->arg[1].rows, i, begin, m, from_p);
        const REAL *kept_q = q->row.kept + begin, *kept_p = p->row.kept + begin;
        REAL *to = mode.q_direct && mode.want_q ? TYPED(target)(out, i, begin, buffer) : q->by + begin, *to_p = p->by + begin;
        int stream = mode.q_direct && mode.want_q && job->stream && to != buffer && (uintptr_t)to % sizeof(V) == 0;
        constants[4] = TYPED(block_factor)(&q->row, begin, scale, 1);
        constants[5] = TYPED(block_factor)(&p->row, begin, scale, 1);
        V sum = {0}, sum_q = {0}, sum_p = {0}, by_q = {0}, by_p = {0};
        for (; j < m; j += WIDTH) {
            int64_t left = m - j;
            sum += TYPED(pair_step)(formula, option, mode, xq + j, xp + j, kept_q + j, kept_p + j, left, constants, &by_q, &by_p);
            if (mode.want_q && mode.q_direct) {
                if (stream && left >= WIDTH) VEC(stream)(to + j, by_q * by);
                else TYPED(store)(to + j, by_q * by, left);
            } else if (mode.want_q) {
                sum_q += by_q;
                TYPED(store)(to + j, by_q, left);
            }
            if (mode.want_p) {
                sum_p += by_p;
                TYPED(store)(to_p + j, by_p, left);
            }
        }
        total += (double)VEC(sum)(sum);
        if (mode.want_q && !mode.q_direct) q->sum += (double)VEC(sum)(sum_q);
        if (mode.want_p) p->sum += (double)VEC(sum)(sum_p);
        if (mode.want_q && mode.q_direct) TYPED(put)(out, i, begin, m, to);
    }
    return total < 0 ? 0 : total; /* a divergence is not negative, but rounding may be */
}

INLINE void TYPED(pair_rows)(TYPED(pair_formula) formula, const int q_direct, const row_job *job, int64_t begin, int64_t end,
                             int worker) {
    const pl_call *c = job->call;
    int64_t n = PL_DIM(c, 'V');
    const REAL *dloss = c->arg[c->count - 4].in;
    REAL *loss = c->arg[c->count - 3].out;
    const pl_rows *dq = &c->arg[c->count - 2].rows, *dp = &c->arg[c->count - 1].rows;
    double option[PL_MAX_ARGS], inverse = 1 / c->arg[2].f;
    for (int o = 3; o < c->count - 4; o++) option[o - 3] = c->arg[o].f;
    REAL scale = (REAL)inverse;
    TYPED(pair_side) q = {.row = TYPED(statistics_in)(TYPED(scratch)(job, worker, 0), n), .by = TYPED(scratch)(job, worker, 2)};
    TYPED(pair_side) p = {.row = TYPED(statistics_in)(TYPED(scratch)(job, worker, 1), n), .by = TYPED(scratch)(job, worker, 3)};
    TYPED(reading) how_q = {.rows = &c->arg[0].rows, .scale = scale}, how_p = {.rows = &c->arg[1].rows, .scale = scale};
    for (int64_t i = begin; i < end; i++) {
        int silent = dloss && dloss[i] == 0, want_q = dq->data && !silent, want_p = dp->data && !silent;
        TYPED(take_statistics)(FAMILY_softmax, how_q, i, n, &q.row);
        TYPED(take_statistics)(FAMILY_softmax, how_p, i, n, &p.row);
        double factor = (dloss ? (double)dloss[i] : 1) * inverse, total;
#define WALK(want_q, want_p) \
    TYPED(pair_walk)(formula, option, job, i, scale, &q, &p, (TYPED(pair_mode)){want_q, want_p, q_direct}, factor)
        if (want_p) total = WALK(want_q, 1);
        else if (want_q) total = WALK(1, 0);
        else total = WALK(0, 0);
#undef WALK
        loss[i] = (REAL)total;
        if (dq->data && silent) TYPED(put_zeros)(dq, i, n); /* only now: a gradient may lie where the logits do */
        if (dp->data && silent) TYPED(put_zeros)(dp, i, n);
        if (want_q && !q_direct) TYPED(pair_gradient)(job, dq, i, &q, scale, factor);
        if (want_p) TYPED(pair_gradient)(job, dp, i, &p, scale, factor);
    }
}

/* ---- element losses: arguments x, t, options..., dloss, loss, dx, dt */

typedef void (*TYPED(element_formula))(TYPED(element) *e, const double *option);

INLINE void TYPED(element_rows)(TYPED(element_formula) formula, const row_job *job, int64_t begin, int64_t end) {
    const pl_call *c = job->call;
    int64_t n = PL_DIM(c, 'V');
    const pl_rows *dx = &c->arg[c->count - 2].rows, *dt = &c->arg[c->count - 1].rows;
    double option[PL_MAX_ARGS];
    for (int o = 2; o < c->count - 4; o++) option[o - 2] = c->arg[o].f;
    REAL from_x[ROW_BLOCK], from_t[ROW_BLOCK], to_x[ROW_BLOCK], to_t[ROW_BLOCK];
    for (int64_t i = begin; i < end; i++)
        for (int64_t at = 0; at < n; at += ROW_BLOCK) {
            int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
            const REAL *x = TYPED(fetch)(&c->arg[0].rows, i, at, m, from_x), *t = TYPED(fetch)(&c->arg[1].rows, i, at, m, from_t);
            const REAL *dloss = c->arg[c->count - 4].in ? (const REAL *)c->arg[c->count - 4].in + i * n + at : NULL;
            REAL *loss = (REAL *)c->arg[c->count - 3].out + i * n + at;
            for (int64_t j = 0; j < m; j += WIDTH) {
                TYPED(element) e = {.x = TYPED(load)(x + j, m - j, 0), .t = TYPED(load)(t + j, m - j, 0)};
                formula(&e, option);
                V given = dloss ? TYPED(load)(dloss + j, m - j, 0) : VEC(set1)(1), zero = {0};
                TYPED(store)(loss + j, e.loss, m - j);
                TYPED(store)(to_x + j, VEC(select)(given == zero, zero, e.by_x * given), m - j);
                TYPED(store)(to_t + j, VEC(select)(given == zero, zero, e.by_t * given), m - j);
            }
            for (int k = 0; k < 2; k++) {
                const pl_rows *out = k ? dt : dx;
                if (!out->data) continue;
                const REAL *from = k ? to_t : to_x;
                REAL *to = TYPED(target)(out, i, at, NULL);
                if (to) memcpy(to, from, (size_t)m * sizeof *to);
                else TYPED(put)(out, i, at, m, from);
            }
        }
}

/* ---- row maps: arguments x, dy, y, dx */

/* y = w / sum w, dx = slope y (dy - sum y dy); or y = log(w / sum w), dx = slope (dy - w / sum w * sum dy). */
INLINE void TYPED(map_rows)(TYPED(family) f, const int logarithm, const row_job *job, int64_t begin, int64_t end, int worker) {
    const pl_call *c = job->call;
    int64_t n = PL_DIM(c, 'V');
    const pl_rows *in = &c->arg[0].rows, *dy = &c->arg[1].rows, *y = &c->arg[2].rows, *dx = &c->arg[3].rows;
    REAL from_x[ROW_BLOCK], from_dy[ROW_BLOCK], buffer[ROW_BLOCK];
    TYPED(reading) how = {.rows = in, .scale = 1};
    TYPED(row_statistics) row = TYPED(statistics_in)(TYPED(scratch)(job, worker, 0), n);
    for (int64_t i = begin; i < end; i++) {
        TYPED(take_statistics)(f, how, i, n, &row);
        V log_sum = VEC(set1)((REAL)(log(row.total) + (double)row.shift));
        double dot = 0;
        /* First y and the sum, then dx. */
        for (int pass = 0; pass < (dx->data ? 2 : 1); pass++) {
            const pl_rows *out = pass ? dx : y;
            V less = VEC(set1)((REAL)dot);
            for (int64_t at = 0; at < n; at += ROW_BLOCK) {
                int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
                const REAL *x = TYPED(fetch)(in, i, at, m, from_x), *g = dy->data ? TYPED(fetch)(dy, i, at, m, from_dy) : NULL;
                REAL *to = out->data ? TYPED(target)(out, i, at, buffer) : buffer;
                V sum = {0}, factor = TYPED(block_factor)(&row, at, 1, 1);
                for (int64_t j = 0; j < m; j += WIDTH) {
                    int64_t left = m - j;
                    V v = TYPED(load)(x + j, left, 0), d = g ? TYPED(load)(g + j, left, 0) : VEC(set1)(0);
                    V prob = TYPED(load)(row.kept + at + j, left, 0) * factor;
                    V result = logarithm ? f.log_weight(v) - log_sum : prob;
                    if (pass) result = logarithm ? d - prob * less : prob * (d - less);
                    if (pass && f.slope) result *= f.slope(v);
                    sum += logarithm ? d : d * prob;
                    TYPED(store)(to + j, result, left);
                }
                if (!pass) dot += (double)VEC(sum)(sum);
                if (out->data) TYPED(put)(out, i, at, m, to);
            }
        }
    }
}

/* The position of the first largest element of row i, or of its first NaN. */
static int64_t TYPED(row_argmax)(const pl_rows *rows, int64_t i, int64_t n, REAL *buffer) {
    int64_t best = 0;
    REAL highest = (REAL)-INFINITY;
    for (int64_t at = 0; at < n; at += ROW_BLOCK) {
        int64_t m = n - at < ROW_BLOCK ? n - at : ROW_BLOCK;
        const REAL *x = TYPED(fetch)(rows, i, at, m, buffer);
        V sum = {0};
        for (int64_t j = 0; j < m; j += WIDTH) {
            V v = TYPED(load)(x + j, m - j, 0);
            sum += v - v; /* NaN where an element is NaN or infinite */
        }
        REAL block = TYPED(block_max)(x, m), odd = VEC(sum)(sum);
        if (odd != odd)
            for (int64_t j = 0; j < m; j++)
                if (x[j] != x[j]) return at + j;
        if (!(block > highest)) continue;
        highest = block;
        for (best = at; x[best - at] != block;) best++;
    }
    return best;
}

/* ---- the work of each line of the table */

#define PL_LOSS_TABLE
#define PL_CLASS_LOSS(name, family, options, mean_option, softcap_option) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        TYPED(class_rows)(FAMILY_##family, TYPED(name), mean_option, softcap_option, job, begin, end, worker); \
    }
#define PL_PAIR_LOSS(name, options, q_sums_to_0) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        TYPED(pair_rows)(TYPED(name), q_sums_to_0, job, begin, end, worker); \
    }
#define PL_ELEMENT_LOSS(name, options) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker UNUSED) { \
        TYPED(element_rows)(TYPED(name), job, begin, end); \
    }
#define PL_ROW_MAP(name, family, logarithm) \
    static void TYPED(name##_rows)(const void *job, int64_t begin, int64_t end, int worker) { \
        TYPED(map_rows)(FAMILY_##family, logarithm, job, begin, end, worker); \
    }
#include "../losses.def"
#undef PL_CLASS_LOSS
#undef PL_PAIR_LOSS
#undef PL_ELEMENT_LOSS
#undef PL_ROW_MAP
#undef PL_LOSS_TABLE

#undef FAMILY_softmax
#undef FAMILY_stablemax
#undef REAL
#undef V
#undef WIDTH
