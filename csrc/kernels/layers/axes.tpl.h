/* Reductions of the middle axis of x [O,N,D]: sums, extremes, logarithms of sums of exponentials.
 *
 * An axis is cut into blocks, whose values are joined in their order, so that bits do not depend on
 * the number of threads. With D = 1 a block is a run of a row; else it is some rows of up to TILE
 * columns. Sums are float64, but for some ten additions of neighbors, or 32 rows of a column. */
#ifndef PYLOSS_AXES_TPL_H
#define PYLOSS_AXES_TPL_H
#include "maps.tpl.h"

enum { RUN = 8192, ROWS = 64, FLOAT_ROWS = 32, TILE = 1024 };

typedef enum { AXIS_SUM, AXIS_MAX, AXIS_MIN, AXIS_COUNT } axis_kind;

typedef struct {
    const float *x, *counted; /* [O,D]: AXIS_COUNT counts the elements that are equal to these */
    double scale, *partial;   /* [O,blocks,D]; NULL: a block is the whole axis */
    float *y;
    int64_t o, n, d, block, blocks, tiles;
    axis_kind kind;
} axis_job;

/* ---- one block */

INLINE vf extreme(const int largest, vf a, vf b) {
    return largest ? maximum_at(a, b) : minimum_at(a, b);
}
INLINE double extreme_of_two(const int largest, double a, double b) {
    if (a != a) return a;
    return b != b || (largest ? b > a : b < a) ? b : a;
}

/* A lane adds FLOAT_STEPS elements in float32, four lanes join, then the sum is float64. */
INLINE double run_sum(const float *x, int64_t n) {
    enum { SUMS = 4, FLOAT_STEPS = 8 };
    double total = 0;
    int64_t i = 0;
    while (i + SUMS * LANES <= n) {
        vf sum[SUMS] = {{0}};
        for (int s = 0; s < FLOAT_STEPS && i + SUMS * LANES <= n; s++, i += SUMS * LANES)
#pragma GCC unroll 4
            for (int l = 0; l < SUMS; l++) sum[l] += vf_load(x + i + l * LANES);
        total += (double)vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    vf rest = {0}; /* of at most four additions */
    for (; i < n; i += LANES) rest += load_some(x + i, at_most(n - i, LANES));
    return total + (double)vf_sum(rest);
}

/* The extreme of n > 0 elements; NaN if one is. */
INLINE double run_extreme(const int largest, const float *x, int64_t n) {
    enum { PARTS = 4 };
    vf part[PARTS];
    for (int l = 0; l < PARTS; l++) part[l] = vf_set1(x[0]);
    int64_t i = 0;
    for (; i + PARTS * LANES <= n; i += PARTS * LANES)
#pragma GCC unroll 4
        for (int l = 0; l < PARTS; l++)
            part[l] = extreme(largest, part[l], vf_load(x + i + l * LANES));
    for (; i + LANES <= n; i += LANES) part[0] = extreme(largest, part[0], vf_load(x + i));
    if (i < n) part[0] = extreme(largest, part[0], vf_load_part(x + i, n - i, x[0]));
    part[0] =
        extreme(largest, extreme(largest, part[0], part[1]), extreme(largest, part[2], part[3]));
    double found = part[0][0];
    for (int l = 1; l < LANES; l++) found = extreme_of_two(largest, found, part[0][l]);
    return found;
}

INLINE vf equal_ones(vf x, vf y) { return vf_select(vf_equal(x, y), vf_set1(1), vf_set1(0)); }

static double run_count(const float *x, int64_t n, float y) {
    vf count = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) count += equal_ones(vf_load(x + i), vf_set1(y));
    double total = (double)vf_sum(count);
    for (; i < n; i++) total += x[i] == y;
    return total;
}

static double run_value(axis_kind kind, const float *x, int64_t n) {
    if (kind == AXIS_SUM) return run_sum(x, n);
    return kind == AXIS_MAX ? run_extreme(1, x, n) : run_extreme(0, x, n);
}

/* to[0, width) = the sum of `rows` rows, a distance of d apart. */
static void sum_rows(const float *x, int64_t rows, int64_t d, int64_t width, double *to) {
    float sum[TILE];
    for (int64_t j = 0; j < width; j++) to[j] = 0;
    for (int64_t first = 0; first < rows; first += FLOAT_ROWS) {
        const int64_t last = at_most(first + FLOAT_ROWS, rows);
        memcpy(sum, x + first * d, (size_t)width * sizeof *sum);
        for (int64_t i = first + 1; i < last; i++)
            for (int64_t j = 0; j < width; j++) sum[j] += x[i * d + j];
        for (int64_t j = 0; j < width; j++) to[j] += (double)sum[j];
    }
}
INLINE void extremes_of_rows(const int largest, const float *x, int64_t rows, int64_t d,
                             int64_t width, double *to) {
    float found[TILE];
    memcpy(found, x, (size_t)width * sizeof *found);
    for (int64_t i = 1; i < rows; i++) {
        const float *row = x + i * d;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES)
            vf_store(found + j, extreme(largest, vf_load(found + j), vf_load(row + j)));
        for (; j < width; j++) found[j] = (float)extreme_of_two(largest, found[j], row[j]);
    }
    for (int64_t j = 0; j < width; j++) to[j] = (double)found[j];
}

static void count_rows(const float *x, int64_t rows, int64_t d, int64_t width, const float *y,
                       double *to) {
    float count[TILE];
    memset(count, 0, (size_t)width * sizeof *count);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) count[j] += x[i * d + j] == y[j] ? 1.0f : 0.0f;
    for (int64_t j = 0; j < width; j++) to[j] = (double)count[j];
}

/* Items: block b of the axis at o, or its tile t: (o * blocks + b) * tiles + t. */
static void axis_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const axis_job *job = context;
    double values[TILE];
    for (int64_t i = begin; i < end; i++) {
        /* Divisions take as long as a short row. */
        const int64_t at = job->tiles == 1 ? i : i / job->tiles,
                      o = job->blocks == 1 ? at : at / job->blocks,
                      first = (at - o * job->blocks) * job->block,
                      rows = at_most(job->block, job->n - first), j = (i - at * job->tiles) * TILE
        , width = at_most(TILE, job->d - j);
        const float *x = job->x + (o * job->n + first) * job->d + j;
        const float *y = job->counted ? job->counted + o * job->d + j : NULL;
        if (y && job->d == 1) values[0] = run_count(x, rows, *y);
        else if (y) count_rows(x, rows, job->d, width, y, values);
        else if (job->d == 1) values[0] = run_value(job->kind, x, rows);
        else if (job->kind == AXIS_SUM) sum_rows(x, rows, job->d, width, values);
        else if (job->kind == AXIS_MAX) extremes_of_rows(1, x, rows, job->d, width, values);
        else extremes_of_rows(0, x, rows, job->d, width, values);
        if (job->partial)
            memcpy(job->partial + at * job->d + j, values, (size_t)width * sizeof *values);
        else
            for (int64_t l = 0; l < width; l++)
                job->y[o * job->d + j + l] = (float)(values[l] * job->scale);
    }
}

static void join_blocks(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const axis_job *job = context;
    for (int64_t i = begin; i < end; i++) {
        const double *part = job->partial + i / job->d * job->blocks * job->d + i % job->d;
        double value = *part;
        for (int64_t b = 1; b < job->blocks; b++) {
            const double next = part[b * job->d];
            value = job->kind == AXIS_MAX || job->kind == AXIS_MIN
                        ? extreme_of_two(job->kind == AXIS_MAX, value, next)
                        : value + next;
        }
        job->y[i] = (float)(value * job->scale);
    }
}

/* Takes the shape of a call, and reduces. An empty axis has sum 0, and no extreme: NaN. */
static pl_status reduce_axis(const pl_call *c, axis_job job) {
    job.o = PL_DIM(c, 'O'), job.n = PL_DIM(c, 'N'), job.d = PL_DIM(c, 'D');
    if (!job.n)
        for (int64_t i = 0; i < job.o * job.d; i++) job.y[i] = job.kind == AXIS_SUM ? 0 : NAN;
    if (!(job.o && job.n && job.d)) return PL_OK;
    job.block = at_most(job.n, job.d == 1 ? RUN : ROWS);
    job.blocks = (job.n + job.block - 1) / job.block;
    job.tiles = (job.d + TILE - 1) / TILE;
    if (job.blocks > 1) {
        job.partial = pl_acquire((size_t)(job.o * job.blocks * job.d) * sizeof *job.partial);
        if (!job.partial) return PL_NO_MEMORY;
    }
    in_regions(job.o * job.blocks * job.tiles, job.block * at_most(job.d, TILE), axis_piece, &job);
    if (job.partial) in_regions(job.o * job.d, job.blocks, join_blocks, &job);
    pl_release(job.partial);
    return PL_OK;
}
pl_status KERNEL(axis_sum)(const pl_call *c) {
    const axis_sum_args args = axis_sum_args_of(c);
    return reduce_axis(c, (axis_job){.x = args.x, .scale = args.scale, .y = args.y});
}
pl_status KERNEL(axis_max)(const pl_call *c) {
    const axis_max_args args = axis_max_args_of(c);
    return reduce_axis(c, (axis_job){.x = args.x, .scale = 1, .y = args.y, .kind = AXIS_MAX});
}
pl_status KERNEL(axis_min)(const pl_call *c) {
    const axis_min_args args = axis_min_args_of(c);
    return reduce_axis(c, (axis_job){.x = args.x, .scale = 1, .y = args.y, .kind = AXIS_MIN});
}

typedef struct {
    const float *x, *y, *share; /* share [O,D] */
    float *dx;
    int64_t n, d;
    int stream;
} extreme_job;

/* Elements [begin, end) of dx. */
static void extreme_grad_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const extreme_job *job = context;
    const int64_t run = job->d == 1 ? job->n : job->d; /* elements of a row that are contiguous */
    for (int64_t at = begin; at < end;) {
        const int64_t row = at / run, column = at - row * run, n = at_most(run - column, end - at);
        const int64_t of = job->d == 1 ? row : row / job->n * job->d + column;
        const float *x = job->x + at, *y = job->y + of, *share = job->share + of;
        const int one = job->d == 1, stream = job->stream && at % LANES == 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const int64_t some = at_most(n - i, LANES);
            const vf extreme_of = one ? vf_set1(*y) : load_some(y + i, some),
                     part = one ? vf_set1(*share) : load_some(share + i, some);
            store_some(job->dx + at + i,
                       vf_select(vf_equal(load_some(x + i, some), extreme_of), part, vf_set1(0)),
                       some, stream);
        }
        at += n;
    }
}

/* dx = dy, in even shares, where x is its axis's extreme y; else 0 */
pl_status KERNEL(axis_extreme_grad)(const pl_call *c) {
    const axis_extreme_grad_args args = axis_extreme_grad_args_of(c);
    const int64_t n = PL_DIM(c, 'N'), d = PL_DIM(c, 'D'), results = PL_DIM(c, 'O') * d;
    if (!results || !n) return PL_OK;
    float *share = pl_acquire((size_t)results * sizeof *share);
    if (!share) return PL_NO_MEMORY;
    const pl_status status = reduce_axis(
        c, (axis_job){.x = args.x, .counted = args.y, .scale = 1, .y = share, .kind = AXIS_COUNT});
    if (status == PL_OK) {
        for (int64_t i = 0; i < results; i++) share[i] = args.dy[i] / fmaxf(share[i], 1);
        const extreme_job job = {
            args.x, args.y, share, args.dx, n, d, may_stream(args.dx, results * n, args.x, NULL)};
        in_regions(results * n, 1, extreme_grad_piece, &job);
    }
    pl_release(share);
    return status;
}

/* ---- running sums of rows, in float64 */

/* Sums of `rows` rows, a constant: side by side, since each addition waits for the one before. */
INLINE void run_cumsum(const float *x, float *y, int64_t v, const int rows, const int reverse) {
    double sum[4] = {0};
    for (int64_t j = 0; j < v; j++) {
        const int64_t at = reverse ? v - 1 - j : j;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            sum[r] += (double)x[r * v + at];
            y[r * v + at] = (float)sum[r];
        }
    }
}
static void cumsum_rows(const float *x, float *y, int64_t v, int64_t rows, int reverse) {
    if (rows == 4 && reverse) run_cumsum(x, y, v, 4, 1);
    else if (rows == 4) run_cumsum(x, y, v, 4, 0);
    else
        for (int64_t r = 0; r < rows; r++) run_cumsum(x + r * v, y + r * v, v, 1, reverse);
}
/* Items of four rows. */
static void cumsum_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const row_cumsum_args args = row_cumsum_args_of(c);
    const int64_t v = PL_DIM(c, 'V'), n = PL_DIM(c, 'N');
    for (int64_t i = begin; i < end; i++)
        cumsum_rows(args.x + 4 * i * v, args.y + 4 * i * v, v, at_most(4, n - 4 * i),
                    args.reverse != 0);
}
/* y[n,v] = the sum of x[n,0] to x[n,v]; reverse: of x[n,v] to the last one */
pl_status KERNEL(row_cumsum)(const pl_call *c) {
    if (PL_DIM(c, 'V')) in_regions((PL_DIM(c, 'N') + 3) / 4, 4 * PL_DIM(c, 'V'), cumsum_piece, c);
    return PL_OK;
}

/* ---- log sum exp of rows */

enum { EXP_RUN = 4096 };

/* largest + log(sum) is the log of a sum of exponentials. */
typedef struct {
    double largest, sum;
} log_sum;

typedef struct {
    const float *x;
    log_sum *partial; /* [N,blocks] */
    float *y;
    int64_t v, blocks;
} log_sum_job;

static log_sum run_log_sum(const float *x, int64_t n) {
    enum { FLOAT_STEPS = 32 };
    const float largest = (float)run_extreme(1, x, n);
    /* Without a finite largest element the sum is not needed. */
    if (!(fabsf(largest) < INFINITY)) return (log_sum){(double)largest, largest == largest};
    const vf shift = vf_set1(largest);
    double total = 0;
    for (int64_t i = 0; i < n;) {
        vf sum = {0};
        for (int s = 0; s < FLOAT_STEPS && i < n; s++, i += LANES)
            sum += vf_decay(
                (n - i < LANES ? vf_load_part(x + i, n - i, -INFINITY) : vf_load(x + i)) - shift);
        total += (double)vf_sum(sum);
    }
    return (log_sum){(double)largest, total};
}
static void log_sum_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const log_sum_job *job = context;
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = i % job->blocks * EXP_RUN;
        job->partial[i] = run_log_sum(job->x + i / job->blocks * job->v + first,
                                      at_most(EXP_RUN, job->v - first));
    }
}

static void join_log_sums(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const log_sum_job *job = context;
    for (int64_t i = begin; i < end; i++) {
        const log_sum *part = job->partial + i * job->blocks;
        double largest = part->largest, sum = 0;
        for (int64_t b = 1; b < job->blocks; b++)
            largest = extreme_of_two(1, largest, part[b].largest);
        if (fabs(largest) < INFINITY) {
            for (int64_t b = 0; b < job->blocks; b++)
                sum += part[b].largest == largest ? part[b].sum
                                                  : part[b].sum * exp(part[b].largest - largest);
            largest += log(sum);
        }
        job->y[i] = (float)largest;
    }
}

/* y[n] = log sum over v of exp x[n,v]; -inf of no element. */
pl_status KERNEL(row_logsumexp)(const pl_call *c) {
    const row_logsumexp_args args = row_logsumexp_args_of(c);
    const int64_t n = PL_DIM(c, 'N'), v = PL_DIM(c, 'V');
    if (!v)
        for (int64_t i = 0; i < n; i++) args.y[i] = -INFINITY;
    if (!n || !v) return PL_OK;
    log_sum_job job = {args.x, NULL, args.y, v, (v + EXP_RUN - 1) / EXP_RUN};
    job.partial = pl_acquire((size_t)(n * job.blocks) * sizeof *job.partial);
    if (!job.partial) return PL_NO_MEMORY;
    in_regions(n * job.blocks, at_most(v, EXP_RUN), log_sum_piece, &job);
    in_regions(n, 64 + job.blocks, join_log_sums, &job);
    pl_release(job.partial);
    return PL_OK;
}

/* dx[n,v] = dy[n] exp(x[n,v] - y[n]), 0 in a row of -inf */
static void log_sum_grad_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pl_call *c = context;
    const row_logsumexp_grad_args args = row_logsumexp_grad_args_of(c);
    const int64_t v = PL_DIM(c, 'V');
    const int stream = may_stream(args.dx, PL_DIM(c, 'N') * v, args.x, NULL);
    for (int64_t at = begin; at < end;) {
        const int64_t row = at / v, last = at_most(end, (row + 1) * v);
        const float y = args.y[row];
        const vf dy = vf_set1(args.dy[row]), shift = vf_set1(y == -INFINITY ? 0 : y);
        const int aligned = stream && at % LANES == 0;
        for (; at < last; at += LANES) {
            const int64_t n = at_most(last - at, LANES);
            store_some(args.dx + at, dy * vf_exp(load_some(args.x + at, n) - shift), n, aligned);
        }
        at = last;
    }
}
pl_status KERNEL(row_logsumexp_grad)(const pl_call *c) {
    in_regions(PL_DIM(c, 'N') * PL_DIM(c, 'V'), 1, log_sum_grad_piece, c);
    return PL_OK;
}

/* ---- gradients of softmax and its logarithm by their results */

/* dx = y (dy - sum y dy); logarithm: dx = dy - e^y sum dy */
INLINE void softmax_grad_row(const int logarithm, const float *dy, const float *y, float *dx,
                             int64_t v, const int stream) {
    enum { FLOAT_STEPS = 32 };
    double total = 0;
    for (int64_t i = 0; i < v;) {
        vf sum = {0};
        for (int s = 0; s < FLOAT_STEPS && i < v; s++, i += LANES) {
            const int64_t n = at_most(v - i, LANES);
            const vf d = load_some(dy + i, n);
            sum += logarithm ? d : d * load_some(y + i, n);
        }
        total += (double)vf_sum(sum);
    }
    const vf all = vf_set1((float)total);
    for (int64_t i = 0; i < v; i += LANES) {
        const int64_t n = at_most(v - i, LANES);
        const vf d = load_some(dy + i, n), of_y = load_some(y + i, n);
        store_some(dx + i, logarithm ? d - vf_exp(of_y) * all : of_y * (d - all), n, stream);
    }
}
#define SOFTMAX_GRAD(name, logarithm) \
    static void name##_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) { \
        const pl_call *c = context; \
        const name##_args args = name##_args_of(c); \
        const int64_t v = PL_DIM(c, 'V'); \
        const int stream = \
            may_stream(args.dx, PL_DIM(c, 'N') * v, args.dy, args.y) && v % LANES == 0; \
        for (int64_t at = begin * v; at < end * v; at += v) \
            softmax_grad_row(logarithm, args.dy + at, args.y + at, args.dx + at, v, stream); \
    } \
    pl_status KERNEL(name)(const pl_call *c) { \
        if (PL_DIM(c, 'V')) in_regions(PL_DIM(c, 'N'), PL_DIM(c, 'V'), name##_piece, c); \
        return PL_OK; \
    }
SOFTMAX_GRAD(row_softmax_grad, 0)
SOFTMAX_GRAD(row_log_softmax_grad, 1)
#undef SOFTMAX_GRAD

#endif
