/* Elementwise maps of float32 arrays: the operations of maps.def, with the formulas of maps.h. */
#ifndef PYLOSS_MAPS_TPL_H
#define PYLOSS_MAPS_TPL_H
#include "../kernel.h"
#include "../pieces.h"
#include "../regions.h"
#include "../rowloss/f32.h"

#undef FORMULA
#define FORMULA(name) name##_at
#define v_log(x) vf_log(x)
#define v_sqrt(x) vf_sqrt(x)
#define v_copysign(x, s) vf_copysign(x, s)
#define v_residue(a, b, p) vf_fma(a, b, -(p))
#include "../../maps.h"

/* Results of more bytes are stored past the caches: they would not be there when they are read. */
enum { PAST_CACHES = 24 << 20 };

INLINE int may_stream(const float *y, int64_t n, const float *x, const float *x2) {
    return y != x && y != x2 && n > PAST_CACHES / (int64_t)sizeof *y &&
           (uintptr_t)y % PL_BYTES == 0;
}

INLINE vf load_some(const float *p, int64_t n) {
    return n == LANES ? vf_load(p) : vf_load_part(p, n, 0);
}
INLINE void store_some(float *p, vf v, int64_t n, const int stream) {
    if (n < LANES) vf_store_part(p, v, n);
    else if (stream) vf_stream(p, v);
    else vf_store(p, v);
}

typedef vf (*one_fn)(vf x);
typedef vf (*two_fn)(vf a, vf b);

/* Runs of n elements. f and the other constants are known in every instance. */
INLINE void run_one(one_fn f, const float *x, float *y, int64_t n, const int stream) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_some(y + i, f(vf_load(x + i)), LANES, stream);
    if (i < n) store_some(y + i, f(load_some(x + i, n - i)), n - i, 0);
}
/* With one_a or one_b, that operand is one element for all. */
INLINE void run_two(two_fn f, const float *a, const float *b, float *y, int64_t n, const int one_a,
                    const int one_b, const int stream) {
    const vf all_a = vf_set1(n ? *a : 0), all_b = vf_set1(n ? *b : 0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store_some(y + i, f(one_a ? all_a : vf_load(a + i), one_b ? all_b : vf_load(b + i)), LANES,
                   stream);
    if (i < n)
        store_some(
            y + i,
            f(one_a ? all_a : load_some(a + i, n - i), one_b ? all_b : load_some(b + i, n - i)),
            n - i, 0);
}

/* Pieces begin at multiples of a cache line, so that streamed stores are aligned. */
#define PL_MAP(name, of) \
    static void name##_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) { \
        const map_##name##_args args = map_##name##_args_of(context); \
        const float *x = args.x + begin; \
        float *y = args.y + begin; \
        if (may_stream(args.y, PL_DIM((const pl_call *)context, 'N'), args.x, NULL)) \
            run_one(name##_at, x, y, end - begin, 1); \
        else run_one(name##_at, x, y, end - begin, 0); \
    } \
    pl_status KERNEL(map_##name)(const pl_call *c) { \
        in_regions(PL_DIM(c, 'N'), 1, name##_piece, c); \
        return PL_OK; \
    } \
    static void name##_grad_piece(const void *context, int64_t begin, int64_t end, \
                                  int worker UNUSED) { \
        const map_##name##_grad_args args = map_##name##_grad_args_of(context); \
        const float *dy = args.dy + begin, *of_ = args.of + begin; \
        float *dx = args.dx + begin; \
        if (may_stream(args.dx, PL_DIM((const pl_call *)context, 'N'), args.dy, args.of)) \
            run_two(name##_grad_at, dy, of_, dx, end - begin, 0, 0, 1); \
        else run_two(name##_grad_at, dy, of_, dx, end - begin, 0, 0, 0); \
    } \
    pl_status KERNEL(map_##name##_grad)(const pl_call *c) { \
        in_regions(PL_DIM(c, 'N'), 1, name##_grad_piece, c); \
        return PL_OK; \
    }
#define PL_PAIR_MAP(name)
#include "../../maps.def"

/* ---- pairs: y [O,N,D] of a [P,Q,R] and b [S,T,U], whose axes broadcast */

typedef void (*pair_run)(const float *a, const float *b, float *y, int64_t n, int stream);

/* An operand's steps along the axes of y; 0 where it broadcasts, having another size. */
typedef struct {
    const float *data;
    int64_t size[3], step[3];
} pair_operand;
typedef struct {
    pair_operand a, b;
    float *y;
    int64_t size[3];
    pair_run run;
    int stream;
} pair_job;

INLINE const float *pair_at(const pair_operand *x, int64_t outer, int64_t inner, int64_t column) {
    return x->data + outer * x->step[0] + inner * x->step[1] + column * x->step[2];
}

/* Elements [begin, end) of y. */
static void pair_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const pair_job *job = context;
    const int64_t n = job->size[1], d = job->size[2];
    int64_t column = begin % d, inner = begin / d % n, outer = begin / d / n;
    for (int64_t at = begin; at < end; column = 0) {
        const int64_t some = at_most(d - column, end - at);
        job->run(pair_at(&job->a, outer, inner, column), pair_at(&job->b, outer, inner, column),
                 job->y + at, some, job->stream && at % LANES == 0);
        at += some;
        if (++inner == n) inner = 0, outer++;
    }
}

static void set_steps(pair_operand *x, const int64_t whole[3]) {
    int64_t step = 1;
    for (int i = 2; i >= 0; i--) {
        x->step[i] = x->size[i] == whole[i] && whole[i] > 1 ? step : 0;
        step *= x->size[i];
    }
}

/* Whether an operand is read along `axis` as if this were part of the next axis. */
INLINE int joins(const pair_operand *x, const int64_t whole[3], int axis) {
    return x->step[axis] == x->step[axis + 1] * whole[axis + 1];
}
/* Makes one axis of `axis` and the next one. */
static void join_axes(pair_job *job, int axis) {
    if (!joins(&job->a, job->size, axis) || !joins(&job->b, job->size, axis)) return;
    job->size[axis + 1] *= job->size[axis];
    job->size[axis] = 1;
    job->a.step[axis] = job->b.step[axis] = 0;
}

static pl_status run_pair(const pl_call *c, pair_operand a, pair_operand b, float *y,
                          const pair_run runs[2][2]) {
    pair_job job = {a, b, y, {PL_DIM(c, 'O'), PL_DIM(c, 'N'), PL_DIM(c, 'D')}, NULL, 0};
    int64_t total = 1, operands = 1;
    for (int i = 0; i < 3; i++) {
        total *= job.size[i];
        operands *= a.size[i] * b.size[i];
    }
    if (!total || !operands) return PL_OK;
    set_steps(&job.a, job.size);
    set_steps(&job.b, job.size);
    join_axes(&job, 1);
    if (job.size[1] == 1) {
        /* The axis that is left over: the first one takes its place. */
        job.size[1] = job.size[0], job.size[0] = 1;
        job.a.step[1] = job.a.step[0], job.b.step[1] = job.b.step[0];
        join_axes(&job, 1);
    } else {
        join_axes(&job, 0);
    }
    job.run = runs[!job.a.step[2]][!job.b.step[2]];
    job.stream = may_stream(y, total, a.data, b.data);
    in_regions(total, 1, pair_piece, &job);
    return PL_OK;
}

#define PL_MAP(name, of)
#define PAIR_RUN(name, one_a, one_b) \
    static void name##_run_##one_a##one_b(const float *a, const float *b, float *y, int64_t n, \
                                          int stream) { \
        if (stream) run_two(name##_at, a, b, y, n, one_a, one_b, 1); \
        else run_two(name##_at, a, b, y, n, one_a, one_b, 0); \
    }
#define PL_PAIR_MAP(name) \
    PAIR_RUN(name, 0, 0) \
    PAIR_RUN(name, 0, 1) \
    PAIR_RUN(name, 1, 0) PAIR_RUN(name, 1, 1) pl_status KERNEL(map_##name)(const pl_call *c) { \
        static const pair_run runs[2][2] = {{name##_run_00, name##_run_01}, \
                                            {name##_run_10, name##_run_11}}; \
        const map_##name##_args args = map_##name##_args_of(c); \
        const pair_operand a = {args.a, {PL_DIM(c, 'P'), PL_DIM(c, 'Q'), PL_DIM(c, 'R')}, {0}}, \
                           b = {args.b, {PL_DIM(c, 'S'), PL_DIM(c, 'T'), PL_DIM(c, 'U')}, {0}}; \
        return run_pair(c, a, b, args.y, runs); \
    }
#include "../../maps.def"
#undef PAIR_RUN

#endif
