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

/* ---- y [O,N,D] of operands whose axes broadcast */

enum { MOST_OPERANDS = 3 };

/* An operand's steps along the axes of y; 0 where it broadcasts, having another size. */
typedef struct {
    const void *data;
    int64_t size[3], step[3];
} operand;

typedef struct broadcast_job broadcast_job;
/* n elements along the last axis, from element at[i] of operand i on. */
typedef void (*broadcast_run)(const broadcast_job *job, const int64_t *at, float *y, int64_t n,
                              int stream);
struct broadcast_job {
    operand of[MOST_OPERANDS];
    int operands, stream;
    float *y;
    int64_t size[3];
    broadcast_run run;
};

/* Elements [begin, end) of y. */
static void broadcast_piece(const void *context, int64_t begin, int64_t end, int worker UNUSED) {
    const broadcast_job *job = context;
    const int64_t n = job->size[1], d = job->size[2];
    int64_t column = begin % d, inner = begin / d % n, outer = begin / d / n;
    for (int64_t at = begin; at < end; column = 0) {
        const int64_t some = at_most(d - column, end - at);
        int64_t from[MOST_OPERANDS];
        for (int i = 0; i < job->operands; i++) {
            const int64_t *step = job->of[i].step;
            from[i] = outer * step[0] + inner * step[1] + column * step[2];
        }
        job->run(job, from, job->y + at, some, job->stream && at % LANES == 0);
        at += some;
        if (++inner == n) inner = 0, outer++;
    }
}

/* Makes one axis of `axis` and the next one, if all operands are read so. */
static void join_axes(broadcast_job *job, int axis) {
    for (int i = 0; i < job->operands; i++) {
        const int64_t *step = job->of[i].step;
        if (step[axis] != step[axis + 1] * job->size[axis + 1]) return;
    }
    job->size[axis + 1] *= job->size[axis];
    job->size[axis] = 1;
    for (int i = 0; i < job->operands; i++) job->of[i].step[axis] = 0;
}

/* Sets steps and joins axes; 0 if there is nothing to compute. */
static int begin_broadcast(broadcast_job *job, const pl_call *c) {
    const int64_t whole[] = {PL_DIM(c, 'O'), PL_DIM(c, 'N'), PL_DIM(c, 'D')};
    memcpy(job->size, whole, sizeof whole);
    if (!(whole[0] && whole[1] && whole[2])) return 0;
    for (operand *x = job->of; x < job->of + job->operands; x++) {
        int64_t step = 1;
        for (int i = 2; i >= 0; step *= x->size[i], i--)
            x->step[i] = x->size[i] == whole[i] && whole[i] > 1 ? step : 0;
        if (!step) return 0;
    }
    join_axes(job, 1);
    if (job->size[1] == 1) {
        /* The first axis takes its place. */
        job->size[1] = job->size[0], job->size[0] = 1;
        for (int i = 0; i < job->operands; i++)
            job->of[i].step[1] = job->of[i].step[0], job->of[i].step[0] = 0;
        join_axes(job, 1);
    } else {
        join_axes(job, 0);
    }
    return 1;
}
static void run_broadcast(const broadcast_job *job) {
    in_regions(job->size[0] * job->size[1] * job->size[2], 1, broadcast_piece, job);
}
INLINE int is_one(const operand *x) { return !x->step[2]; }
INLINE const float *floats_at(const broadcast_job *job, int i, const int64_t *at) {
    return (const float *)job->of[i].data + at[i];
}

#define OPERAND(data, p, q, r) \
    { \
        data, {PL_DIM(c, p), PL_DIM(c, q), PL_DIM(c, r)}, { 0 } \
    }
#define PL_MAP(name, of)
#define PAIR_RUN(name, one_a, one_b) \
    static void name##_run_##one_a##one_b(const broadcast_job *job, const int64_t *at, float *y, \
                                          int64_t n, int stream) { \
        const float *a = floats_at(job, 0, at), *b = floats_at(job, 1, at); \
        if (stream) run_two(name##_at, a, b, y, n, one_a, one_b, 1); \
        else run_two(name##_at, a, b, y, n, one_a, one_b, 0); \
    }
#define PL_PAIR_MAP(name) \
    PAIR_RUN(name, 0, 0) \
    PAIR_RUN(name, 0, 1) \
    PAIR_RUN(name, 1, 0) \
    PAIR_RUN(name, 1, 1) \
    pl_status KERNEL(map_##name)(const pl_call *c) { \
        static const broadcast_run runs[2][2] = {{name##_run_00, name##_run_01}, \
                                                 {name##_run_10, name##_run_11}}; \
        const map_##name##_args args = map_##name##_args_of(c); \
        broadcast_job job = { \
            .of = {OPERAND(args.a, 'P', 'Q', 'R'), OPERAND(args.b, 'S', 'T', 'U')}, \
            .operands = 2, \
            .y = args.y}; \
        if (!begin_broadcast(&job, c)) return PL_OK; \
        job.run = runs[is_one(job.of)][is_one(job.of + 1)]; \
        job.stream = may_stream(args.y, job.size[0] * job.size[1] * job.size[2], args.a, args.b); \
        run_broadcast(&job); \
        return PL_OK; \
    }
#include "../../maps.def"
#undef PAIR_RUN

/* y = mask ? a : b */
INLINE vf chosen(const uint8_t *mask, vf a, vf b) {
    return vf_select(vi_equal(vi_load_bytes(mask), vi_set1(0)), b, a);
}
INLINE void run_select(const uint8_t *mask, const float *a, const float *b, float *y, int64_t n,
                       const int one_a, const int one_b, const int stream) {
    const vf all_a = vf_set1(*a), all_b = vf_set1(*b);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store_some(y + i,
                   chosen(mask + i, one_a ? all_a : vf_load(a + i), one_b ? all_b : vf_load(b + i)),
                   LANES, stream);
    for (; i < n; i++) y[i] = mask[i] ? a[one_a ? 0 : i] : b[one_b ? 0 : i];
}
INLINE vf first_of(vf a, vf b UNUSED) { return a; }

/* A run whose mask is one element copies a or b. */
INLINE void select_run(const broadcast_job *job, const int64_t *at, float *y, int64_t n,
                       const int one_a, const int one_b, const int stream) {
    const uint8_t *mask = (const uint8_t *)job->of[0].data + at[0];
    const float *a = floats_at(job, 1, at), *b = floats_at(job, 2, at);
    if (!is_one(job->of)) run_select(mask, a, b, y, n, one_a, one_b, stream);
    else if (*mask) run_two(first_of, a, a, y, n, one_a, one_a, stream);
    else run_two(first_of, b, b, y, n, one_b, one_b, stream);
}
#define SELECT_RUN(one_a, one_b) \
    static void select_run_##one_a##one_b(const broadcast_job *job, const int64_t *at, float *y, \
                                          int64_t n, int stream) { \
        if (stream) select_run(job, at, y, n, one_a, one_b, 1); \
        else select_run(job, at, y, n, one_a, one_b, 0); \
    }
SELECT_RUN(0, 0)
SELECT_RUN(0, 1)
SELECT_RUN(1, 0)
SELECT_RUN(1, 1)
#undef SELECT_RUN
pl_status KERNEL(select)(const pl_call *c) {
    static const broadcast_run runs[2][2] = {{select_run_00, select_run_01},
                                             {select_run_10, select_run_11}};
    const select_args args = select_args_of(c);
    broadcast_job job = {.of = {OPERAND(args.mask, 'M', 'K', 'L'), OPERAND(args.a, 'P', 'Q', 'R'),
                                OPERAND(args.b, 'S', 'T', 'U')},
                         .operands = 3,
                         .y = args.y};
    if (!begin_broadcast(&job, c)) return PL_OK;
    job.run = runs[is_one(job.of + 1)][is_one(job.of + 2)];
    job.stream = may_stream(args.y, job.size[0] * job.size[1] * job.size[2], args.a, args.b);
    run_broadcast(&job);
    return PL_OK;
}
#undef OPERAND

#endif
